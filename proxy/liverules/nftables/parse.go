package nftables

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
)

// ownTable is the name of kube-proxy's tables.
const ownTable = "kube-proxy"

// table is one of kube-proxy's, ip or ip6, or one of others, inet too.
type table struct {
	family, name string
	six          bool // its family is ip6
	dormant      bool // its chains are at no hook
	chains       map[string]*chain
	sets         map[string]*set
	// bases are the chains at hooks, in the order in which packets meet them.
	bases []*chain
}

type chain struct {
	table            string
	name, kind, hook string
	priority         int
	drop             bool // its policy
	rules            []rule
}

// rule is a rule in its words, lists in braces one word each, and as it was printed.
type rule struct {
	words []string
	text  string
}

// set is a set or a map: elements by key, with what a map has for them.
type set struct {
	name    string
	keys    []string
	values  map[string][]string
	comment map[string]string
	timeout time.Duration
	// ranges are keys that stand for more than themselves, once indexed.
	indexed bool
	ranges  []string
}

// words takes text apart. Ends of lines are words, but not within the braces of a
// list; quoted text keeps its quotes.
func words(text string) []string {
	out, _ := lex(text)
	return out
}

// lex is words, with the place behind each.
func lex(text string) (out []string, ends []int) {
	for i := 0; i < len(text); {
		switch c := text[i]; c {
		case '\n', ';':
			out = append(out, "\n")
			i++
		case ' ', '\t', '\r':
			i++
		case '{', '}', ',':
			out = append(out, string(c))
			i++
		case '#': // a comment to the end of the line
			for i < len(text) && text[i] != '\n' {
				i++
			}
		case '"':
			end := strings.IndexByte(text[i+1:], '"')
			if end < 0 {
				end = len(text) - i - 2
			}
			out = append(out, text[i:min(len(text), i+end+2)])
			i += end + 2
		default:
			start := i
			for i < len(text) && !strings.ContainsRune(" \t\r\n;{},\"", rune(text[i])) {
				i++
			}
			out = append(out, text[start:i])
		}
		if len(ends) < len(out) {
			ends = append(ends, min(i, len(text)))
		}
	}
	return out, ends
}

// parser goes through the words of a text; ends has the place behind each.
type parser struct {
	text   string
	words  []string
	ends   []int
	at     int
	tables []*table
	// foreign are those of others whose hooks packets of IPv4 or IPv6 meet.
	foreign []*table
	others  int
	// order are all tables' families and names as they are listed.
	order []string
}

// line is one in its words, lists in braces single ones, and as it was printed.
type line struct {
	words []string
	text  string
}

func (p *parser) next() string {
	if p.at >= len(p.words) {
		return ""
	}
	p.at++
	return p.words[p.at-1]
}

var errCut = errors.New("nftables: the text ends in the middle of a table")

// parse reads all tables.
func (p *parser) parse() error {
	for p.at < len(p.words) {
		w := p.next()
		if w == "\n" {
			continue
		}
		if w != "table" {
			return fmt.Errorf("nftables: %q where a table should begin: give what nft list ruleset prints", w)
		}
		family, name := p.next(), p.next()
		p.order = append(p.order, family+" "+name)
		if p.next() != "{" {
			return fmt.Errorf("nftables: table %s %s has no body", family, name)
		}
		if name != ownTable || family != "ip" && family != "ip6" {
			ours := name == xtables.EarlyTable
			if !ours {
				p.others++
			}
			if ours || family != "ip" && family != "ip6" && family != "inet" {
				if _, err := p.block(); err != nil {
					return err
				}
				continue
			}
			t, err := p.table(family, name)
			if err != nil {
				return err
			}
			p.foreign = append(p.foreign, t)
			continue
		}
		if slices.ContainsFunc(p.tables, func(t *table) bool { return t.six == (family == "ip6") }) {
			return fmt.Errorf("nftables: table %s %s is there twice: give the rules of one node", family, name)
		}
		t, err := p.table(family, name)
		if err != nil {
			return err
		}
		p.tables = append(p.tables, t)
	}
	return nil
}

// block returns the lines up to the brace that closes.
func (p *parser) block() (lines []line, err error) {
	var now []string
	from := 0
	end := func(to int) {
		if len(now) > 0 {
			text := p.text[p.ends[from]-len(p.words[from]) : p.ends[to]]
			lines = append(lines, line{now, unbroken(text)})
		}
		now = nil
	}
	for {
		if p.at >= len(p.words) {
			return nil, errCut
		}
		w := p.next()
		switch w {
		case "}":
			end(p.at - 2)
			return lines, nil
		case "\n":
			end(p.at - 2)
			continue
		}
		if len(now) == 0 {
			from = p.at - 1
		}
		if w == "{" {
			if w, err = p.list(); err != nil {
				return nil, err
			}
		}
		now = append(now, w)
	}
}

// unbroken puts what stands on several lines on one.
func unbroken(text string) string {
	if !strings.Contains(text, "\n") {
		return text
	}
	var parts []string
	for l := range strings.Lines(text) {
		parts = append(parts, strings.TrimSpace(l))
	}
	return strings.Join(parts, " ")
}

// list is all up to the brace that closes, in one word.
func (p *parser) list() (string, error) {
	var b strings.Builder
	b.WriteString("{")
	for depth := 1; depth > 0; {
		if p.at >= len(p.words) {
			return "", errCut
		}
		w := p.next()
		switch w {
		case "{":
			depth++
		case "}":
			depth--
		case "\n":
			continue
		}
		b.WriteString(" " + w)
	}
	return b.String(), nil
}

func (p *parser) table(family, name string) (*table, error) {
	t := &table{family: family, name: name, six: family == "ip6", chains: map[string]*chain{}, sets: map[string]*set{}}
	for {
		if p.at >= len(p.words) {
			return nil, errCut
		}
		switch w := p.next(); w {
		case "}":
			slices.SortStableFunc(t.bases, func(a, b *chain) int { return a.priority - b.priority })
			return t, nil
		case "{": // of an object that is not looked at, as a flowtable
			if _, err := p.block(); err != nil {
				return nil, err
			}
		case "dormant": // a flag
			t.dormant = true
		case "set", "map", "chain":
			name := p.next()
			if p.next() != "{" {
				return nil, fmt.Errorf("nftables: %s %s has no body", w, name)
			}
			lines, err := p.block()
			if err != nil {
				return nil, err
			}
			if w == "chain" {
				t.chain(name, lines)
			} else {
				t.set(name, lines)
			}
		default: // a comment, a flag
		}
	}
}

func (t *table) chain(name string, lines []line) {
	c := &chain{table: t.name, name: name}
	t.chains[name] = c
	for i := range lines {
		l := lines[i].words
		switch {
		case len(l) > 5 && l[0] == "type" && l[2] == "hook":
			c.kind, c.hook, c.priority = l[1], l[3], priority(l[5:])
			t.bases = append(t.bases, c)
		case l[0] == "policy" && len(l) > 1:
			c.drop = l[1] == "drop"
		case l[0] == "comment":
		default:
			c.rules = append(c.rules, rule{words: l, text: lines[i].text})
		}
	}
}

// priority reads "dstnat - 10", "filter" or "-110".
func priority(l []string) int {
	named := map[string]int{"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
	n, ok := named[l[0]]
	if !ok {
		n, _ = strconv.Atoi(l[0]) // what is no number is 0, as filter
	}
	if len(l) > 2 {
		if d, err := strconv.Atoi(l[2]); err == nil && l[1] == "-" {
			n -= d
		} else if err == nil && l[1] == "+" {
			n += d
		}
	}
	return n
}

func (t *table) set(name string, lines []line) {
	s := &set{name: name, values: map[string][]string{}, comment: map[string]string{}}
	t.sets[name] = s
	for i := range lines {
		l := lines[i].words
		switch {
		case l[0] == "timeout" && len(l) > 1:
			s.timeout = duration(l[1])
		case l[0] == "elements" && len(l) > 2:
			for _, e := range elements(l[2]) {
				s.keys = append(s.keys, e.key)
				s.values[e.key], s.comment[e.key] = e.value, e.comment
			}
		}
	}
}

// duration reads "1d2h3m4s".
func duration(s string) time.Duration {
	var total time.Duration
	for s != "" {
		i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
		if i <= 0 {
			return total
		}
		n, err := strconv.Atoi(s[:i])
		if err != nil {
			return total
		}
		unit := map[byte]time.Duration{'d': 24 * time.Hour, 'h': time.Hour, 'm': time.Minute, 's': time.Second}[s[i]]
		if strings.HasPrefix(s[i:], "ms") {
			return total
		}
		total += time.Duration(n) * unit
		s = s[i+1:]
	}
	return total
}

// element is one of a list: "10.96.0.10 . tcp . 80 comment "x" : goto y".
type element struct {
	key, comment string
	value        []string
}

func elements(list string) []element {
	var out []element
	e, value := element{}, false
	add := func() {
		if e.key != "" {
			out = append(out, e)
		}
		e, value = element{}, false
	}
	ws := words(strings.TrimSuffix(strings.TrimPrefix(list, "{"), "}"))
	for i := 0; i < len(ws); i++ {
		switch w := ws[i]; {
		case w == ",":
			add()
		case w == ":":
			value = true
		case w == "comment" && i+1 < len(ws):
			i++
			e.comment = strings.Trim(ws[i], `"`)
		case (w == "timeout" || w == "expires") && i+1 < len(ws):
			i++
		case w == "counter" && i+4 < len(ws):
			i += 4 // packets N bytes N
		case value:
			e.value = append(e.value, w)
		case e.key == "":
			e.key = w
		default:
			e.key += " " + w
		}
	}
	add()
	return out
}
