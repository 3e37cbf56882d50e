package nftables

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// IsJSON reports whether a ruleset is in the form of nft -j.
func IsJSON(text string) bool { return strings.HasPrefix(strings.TrimSpace(text), "{") }

// FromJSON turns what nft -j list ruleset prints (libnftables-json(5), schema 1)
// into what nft list ruleset prints, so that there is one reader of rules. What it
// does not know of a rule becomes a word that no reader knows either: it is told,
// and not passed over.
func FromJSON(b []byte) (string, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var in struct {
		NFTables []map[string]json.RawMessage `json:"nftables"`
	}
	if err := d.Decode(&in); err != nil {
		return "", fmt.Errorf("nftables: reading what nft -j prints: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return "", fmt.Errorf("nftables: something stands behind what nft -j prints: give one ruleset")
	}
	if in.NFTables == nil {
		return "", fmt.Errorf(`nftables: JSON without "nftables": give what nft -j list ruleset prints`)
	}
	var r jsonRuleset
	for i, o := range in.NFTables {
		for kind, raw := range o {
			if err := r.add(kind, raw); err != nil {
				return "", fmt.Errorf("nftables: object %d, %s: %w", i, kind, err)
			}
		}
	}
	return r.text(), nil
}

// jsonRuleset collects tables as they are listed.
type jsonRuleset struct {
	tables []*jsonTable
}

type jsonTable struct {
	family, name string
	sets         []string
	chains       []*jsonChain
}

type jsonChain struct {
	name, head string
	rules      []string
}

// jsonObject is any object of a ruleset.
type jsonObject struct {
	Family, Table, Name, Chain string
	Type                       any // of a chain a word, of a set a type or several
	Hook, Policy, Dev          string
	Prio                       json.Number
	Map                        any
	Flags                      any
	Timeout, Size              json.Number
	Comment                    string
	Elem                       []any
	Expr                       []map[string]any
}

func (r *jsonRuleset) add(kind string, raw json.RawMessage) error {
	switch kind {
	case "table", "chain", "set", "map", "rule":
	default: // metainfo; counters, flowtables and the like lead no packet anywhere by themselves
		return nil
	}
	var o jsonObject
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&o); err != nil {
		return err
	}
	if kind == "table" {
		r.tables = append(r.tables, &jsonTable{family: o.Family, name: o.Name})
		return nil
	}
	t := r.table(o.Family, o.Table)
	if t == nil {
		return fmt.Errorf("there is no table %s %s before it", o.Family, o.Table)
	}
	switch kind {
	case "chain":
		t.chains = append(t.chains, &jsonChain{name: o.Name, head: o.chainHead()})
	case "rule":
		c := t.chain(o.Chain)
		if c == nil {
			return fmt.Errorf("there is no chain %s before it", o.Chain)
		}
		words := make([]string, 0, len(o.Expr)+1)
		for _, e := range o.Expr {
			words = append(words, statement(e))
		}
		if o.Comment != "" {
			words = append(words, "comment "+strconv.Quote(o.Comment))
		}
		c.rules = append(c.rules, strings.Join(words, " "))
	default:
		t.sets = append(t.sets, o.set(kind))
	}
	return nil
}

func (r *jsonRuleset) table(family, name string) *jsonTable {
	for _, t := range r.tables {
		if t.family == family && t.name == name {
			return t
		}
	}
	return nil
}

func (t *jsonTable) chain(name string) *jsonChain {
	for i := len(t.chains) - 1; i >= 0; i-- { // rules stand behind their chain
		if t.chains[i].name == name {
			return t.chains[i]
		}
	}
	return nil
}

func (r *jsonRuleset) text() string {
	var b strings.Builder
	for _, t := range r.tables {
		fmt.Fprintf(&b, "table %s %s {\n", t.family, t.name)
		for _, s := range t.sets {
			b.WriteString(s)
		}
		for _, c := range t.chains {
			fmt.Fprintf(&b, "\tchain %s {\n", c.name)
			if c.head != "" {
				b.WriteString("\t\t" + c.head + "\n")
			}
			for _, rule := range c.rules {
				b.WriteString("\t\t" + rule + "\n")
			}
			b.WriteString("\t}\n")
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// chainHead is "type nat hook output priority -100; policy accept;", empty where
// the chain is at no hook.
func (o *jsonObject) chainHead() string {
	if o.Hook == "" {
		return ""
	}
	dev := ""
	if o.Dev != "" {
		dev = " device " + strconv.Quote(o.Dev)
	}
	s := fmt.Sprintf("type %v hook %s%s priority %s;", o.Type, o.Hook, dev, o.Prio)
	if o.Policy != "" {
		s += " policy " + o.Policy + ";"
	}
	return s
}

func (o *jsonObject) set(kind string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s", kind, o.Name, joined(o.Type, " . "))
	if kind == "map" {
		b.WriteString(" : " + joined(o.Map, " . "))
	}
	b.WriteString("\n")
	for _, l := range []struct{ word, value string }{
		{"size", o.Size.String()}, {"flags", joined(o.Flags, ",")}, {"timeout", seconds(o.Timeout)},
	} {
		if l.value != "" {
			fmt.Fprintf(&b, "\t\t%s %s\n", l.word, l.value)
		}
	}
	if o.Comment != "" {
		fmt.Fprintf(&b, "\t\tcomment %q\n", o.Comment)
	}
	if len(o.Elem) > 0 {
		b.WriteString("\t\telements = " + list(o.Elem, false) + "\n")
	}
	b.WriteString("\t}\n")
	return b.String()
}

func joined(v any, sep string) string {
	switch v := v.(type) {
	case nil:
		return ""
	case []any:
		parts := make([]string, len(v))
		for i := range v {
			parts[i] = fmt.Sprint(v[i])
		}
		return strings.Join(parts, sep)
	}
	return fmt.Sprint(v)
}

// seconds is a number of seconds as nft prints it: "3h", "1d30m".
func seconds(n json.Number) string {
	s, err := n.Int64()
	if err != nil || s <= 0 {
		return ""
	}
	out := ""
	for _, u := range []struct {
		size int64
		name string
	}{{86400, "d"}, {3600, "h"}, {60, "m"}, {1, "s"}} {
		if q := s / u.size; q > 0 {
			out += strconv.FormatInt(q, 10) + u.name
			s %= u.size
		}
	}
	return out
}

// unknownWord stands for what is not known here.
func unknownWord(what string, v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		b = nil
	}
	return "json:" + what + " " + strconv.Quote(string(b))
}

// one returns the only member of an object.
func one(m map[string]any) (string, any) {
	if len(m) != 1 {
		return "", m
	}
	for k, v := range m {
		return k, v
	}
	return "", nil
}

// statement is one of a rule.
func statement(e map[string]any) string {
	kind, v := one(e)
	m, _ := v.(map[string]any)
	switch kind {
	case "accept", "drop", "continue", "return", "notrack":
		return kind
	case "jump", "goto":
		return kind + " " + text(m["target"])
	case "match":
		return match(m)
	case "vmap":
		return expr(m["key"], false) + " vmap " + data(m["data"], isMark(m["key"]))
	case "mangle":
		return expr(m["key"], false) + " set " + expr(m["value"], isMark(m["key"]))
	case "set":
		stmt := text(m["op"]) + " " + text(m["set"]) + " { " + expr(m["elem"], false)
		return stmt + " }"
	case "dnat", "snat", "redirect", "masquerade":
		return translate(kind, m)
	case "reject":
		return reject(m)
	case "counter":
		if m == nil {
			return "counter"
		}
		if m["packets"] != nil {
			return fmt.Sprintf("counter packets %s bytes %s", text(m["packets"]), text(m["bytes"]))
		}
	case "log":
		s := "log"
		for _, k := range []string{"prefix", "group", "snaplen", "queue-threshold", "level"} {
			if m[k] == nil {
				continue
			}
			s += " " + k + " "
			if k == "prefix" {
				s += strconv.Quote(text(m[k]))
			} else {
				s += text(m[k])
			}
		}
		return s
	case "limit":
		return limit(m)
	}
	return unknownWord(kind, v)
}

func match(m map[string]any) string {
	left, right := m["left"], m["right"]
	mark := isMark(left)
	op := text(m["op"])
	s := expr(left, mark)
	if op != "in" && (op != "==" || operator(left)) {
		s += " " + op
	}
	if items, ok := right.([]any); ok { // flags
		return s + " " + joined(items, ",")
	}
	return s + " " + expr(right, mark)
}

// operator reports whether an expression is two that are combined.
func operator(v any) bool {
	m, _ := v.(map[string]any)
	kind, _ := one(m)
	switch kind {
	case "&", "|", "^", "<<", ">>":
		return true
	}
	return false
}

// translate is a statement of NAT.
func translate(kind string, m map[string]any) string {
	s := kind
	addr := m["addr"]
	if _, plain := addr.(string); !plain && m["family"] != nil {
		s += " " + text(m["family"])
	}
	if addr != nil || m["port"] != nil {
		s += " to "
	}
	a := expr(addr, false)
	if m["port"] != nil {
		if strings.Contains(a, ":") && !strings.HasPrefix(a, "numgen") {
			a = "[" + a + "]"
		}
		a += ":" + expr(m["port"], false)
	}
	s += a
	if f := joined(m["flags"], ","); f != "" {
		s += " " + f
	}
	return s
}

// reject leaves out what nft does not print, its default.
func reject(m map[string]any) string {
	kind, why := text(m["type"]), text(m["expr"])
	switch {
	case kind == "" || kind != "tcp reset" && why == "port-unreachable":
		return "reject"
	case kind == "tcp reset":
		return "reject with tcp reset"
	}
	return "reject with " + kind + " " + why
}

func limit(m map[string]any) string {
	s := "limit rate"
	if inv, _ := m["inv"].(bool); inv {
		s += " over"
	}
	unit := ""
	if u := text(m["rate_unit"]); u != "" && u != "packets" {
		unit = " " + u
	}
	s += " " + text(m["rate"]) + unit + "/" + text(m["per"])
	u := text(m["burst_unit"])
	if u == "" {
		u = "packets"
	}
	if b := text(m["burst"]); b != "" && b != "0" && (b != "5" || u != "packets") { // the default
		s += " burst " + b + " " + u
	}
	return s
}

func text(v any) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

// isMark reports whether an expression is a mark, whose numbers nft prints in
// hexadecimal.
func isMark(v any) bool {
	m, ok := v.(map[string]any)
	if !ok {
		return false
	}
	kind, of := one(m)
	switch of := of.(type) {
	case map[string]any:
		return (kind == "meta" || kind == "ct") && of["key"] == "mark"
	case []any: // of an operator
		return len(of) > 0 && isMark(of[0])
	}
	return false
}

// expr is an expression: what a packet has, a constant, a list.
func expr(v any, hex bool) string {
	switch v := v.(type) {
	case nil:
		return ""
	case json.Number:
		if n, err := strconv.ParseUint(v.String(), 10, 32); err == nil && hex {
			return fmt.Sprintf("0x%08x", n)
		}
		return v.String()
	case string:
		return v
	case []any:
		return list(v, hex)
	case map[string]any:
		return object(v, hex)
	}
	return unknownWord("value", v)
}

func object(v map[string]any, hex bool) string {
	kind, of := one(v)
	m, _ := of.(map[string]any)
	items, _ := of.([]any)
	switch kind {
	case "payload":
		if m["field"] != nil {
			return text(m["protocol"]) + " " + text(m["field"])
		}
	case "meta":
		switch key := text(m["key"]); key {
		case "iif", "iifname", "oif", "oifname", "iiftype", "oiftype", "iifgroup", "oifgroup", "skuid", "skgid":
			return key
		default:
			return "meta " + key
		}
	case "ct":
		s := "ct"
		if d := text(m["dir"]); d != "" {
			s += " " + d
		}
		if f := text(m["family"]); f != "" {
			s += " " + f
		}
		return s + " " + text(m["key"])
	case "fib":
		return "fib " + joined(m["flags"], " . ") + " " + text(m["result"])
	case "numgen":
		s := "numgen " + text(m["mode"]) + " mod " + text(m["mod"])
		if o := text(m["offset"]); o != "" && o != "0" {
			s += " offset " + o
		}
		return s
	case "map":
		return expr(m["key"], false) + " map " + data(m["data"], isMark(m["key"]))
	case "set":
		return list(items, hex)
	case "concat":
		parts := make([]string, len(items))
		for i := range items {
			parts[i] = expr(items[i], hex)
		}
		return strings.Join(parts, " . ")
	case "prefix":
		return expr(m["addr"], hex) + "/" + text(m["len"])
	case "range":
		if len(items) == 2 {
			return expr(items[0], hex) + "-" + expr(items[1], hex)
		}
	case "&", "|", "^", "<<", ">>":
		if len(items) == 2 {
			return expr(items[0], hex) + " " + kind + " " + expr(items[1], hex)
		}
	case "elem":
		s := expr(m["val"], hex)
		if c := text(m["comment"]); c != "" {
			s += " comment " + strconv.Quote(c)
		}
		return s
	case "accept", "drop", "continue", "return":
		return kind
	case "jump", "goto":
		return kind + " " + text(m["target"])
	}
	return unknownWord(kind, v)
}

// data is what a map is looked up in: one by name, or a list.
func data(v any, hex bool) string {
	if name, ok := v.(string); ok {
		return name
	}
	return expr(v, hex)
}

// list is a list in braces. Of a map each element is a key and what it gives.
func list(items []any, hex bool) string {
	parts := make([]string, len(items))
	for i, e := range items {
		if pair, ok := e.([]any); ok && len(pair) == 2 {
			parts[i] = expr(pair[0], hex) + " : " + expr(pair[1], false)
			continue
		}
		parts[i] = expr(e, hex)
	}
	return "{ " + strings.Join(parts, ", ") + " }"
}
