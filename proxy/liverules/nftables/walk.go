package nftables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// way is a packet under way, with the chance of having come here.
type way struct {
	proto    conntrack.Proto
	src, dst netip.AddrPort
	in       string            // the interface it came in by
	orig     [2]netip.AddrPort // source and destination as it was sent
	chance   float64
	mark     uint32
	// masked says that it is masqueraded, masquerade why it is to be.
	masked     bool
	masquerade string
	picked     bool
	// bound says that nat has decided on the packet's destination, and source.
	bound [2]bool
	// untracked says that connection tracking does not see it.
	untracked bool
	service   proxy.PortName
	via       proxy.Via
	local     bool
	refused   proxy.Verdict
	reason    string
	hook      string
	steps     []proxy.Step
}

func (w *way) step(c *chain, i int, r *rule, effect, purpose string) {
	w.steps = append(slices.Clip(w.steps), proxy.Step{
		Hook: w.hook, Table: c.table, Chain: c.name, Rule: i + 1, Text: r.text, Effect: effect, Purpose: purpose,
	})
}

const policyDrops = "the policy of the chain drops what no rule accepted"

// end is the end of a chain, or with a verdict its policy.
func (w *way) end(c *chain, verdict string) {
	s := proxy.Step{Hook: w.hook, Table: c.table, Chain: c.name, Effect: verdict}
	if verdict == "drop" {
		s.Purpose = policyDrops
	}
	w.steps = append(slices.Clip(w.steps), s)
}

// next is what follows a rule or a chain.
type next uint8

const (
	goOn next = iota // to the next rule, or for a chain to the one that jumped there
	over             // the hook has accepted it, or translated it
	gone             // it is refused
)

type result struct {
	way
	then next
}

// maxDepth bounds jumps, as the kernel does.
const maxDepth = 16

// walker walks one table.
type walker struct {
	*table
	local   func(netip.Addr) bool
	unknown map[Doubt]bool
	strange map[string]bool
	// clients says that the sets of clients with session affinity are asked.
	clients bool
	depth   int
}

// in is the walker of a table of others.
func (k *walker) in(t *table) *walker {
	x := *k
	x.table, x.depth = t, 0
	return &x
}

// doubt notes a rule that cannot be evaluated.
func (k *walker) doubt(r *rule, hook string) {
	k.unknown[Doubt{hook, k.name, r.text}] = true
	if k.name == ownTable {
		k.strange[r.text] = true
	}
}

// chain walks a chain.
func (k *walker) chain(name string, in way) []result {
	c := k.chains[name]
	if c == nil || k.depth >= maxDepth {
		return []result{{in, goOn}}
	}
	k.depth++
	defer func() { k.depth-- }()
	k.about(&in, name)
	ways := []way{in}
	var out []result
	for i := range c.rules {
		var left []way
		for _, w := range ways {
			for _, r := range k.rule(c, i, w) {
				switch {
				case r.then == goOn && r.returned:
					out = append(out, result{r.way, goOn})
				case r.then == goOn:
					left = append(left, r.way)
				default:
					out = append(out, r.result)
				}
			}
		}
		ways = left
	}
	for _, w := range ways {
		switch {
		case c.drop:
			w.refused, w.reason = proxy.Drop, "policy-drop"
			w.end(c, "drop")
			out = append(out, result{w, gone})
			continue
		case c.hook == "":
			w.end(c, "return")
		}
		out = append(out, result{w, goOn})
	}
	return out
}

// about takes from a chain's name which Service it is of.
func (k *walker) about(w *way, name string) {
	kind, n, _, ok := parseName(name)
	if !ok {
		return
	}
	w.service = n
	if kind == "local" {
		w.local = true
	}
}

// parseName reads "service-ULMVA6XW-ns1/svc1/tcp/p80", for endpoints with
// "__10.180.0.1/80" behind it.
func parseName(name string) (kind string, n proxy.PortName, ep netip.AddrPort, ok bool) {
	kind, rest, _ := strings.Cut(name, "-")
	code, rest, ok := strings.Cut(rest, "-")
	if !ok || len(code) != 8 {
		return "", n, ep, false
	}
	rest, endpoint, _ := strings.Cut(rest, "__")
	parts := strings.Split(rest, "/")
	if len(parts) < 3 {
		return "", n, ep, false
	}
	proto, err := conntrack.ParseProto(parts[2])
	if err != nil {
		return "", n, ep, false
	}
	n = proxy.PortName{Namespace: parts[0], Name: parts[1], Proto: proto}
	if len(parts) > 3 {
		n.Port = parts[3]
	}
	if i := strings.LastIndexByte(endpoint, '/'); i > 0 {
		a, err1 := netip.ParseAddr(endpoint[:i])
		if err1 != nil { // IPv6 has points in the place of colons there
			a, err1 = netip.ParseAddr(strings.ReplaceAll(endpoint[:i], ".", ":"))
		}
		p, err2 := strconv.ParseUint(endpoint[i+1:], 10, 16)
		if err1 == nil && err2 == nil {
			ep = netip.AddrPortFrom(a, uint16(p))
		}
	}
	return kind, n, ep, true
}

// ruled is a result of one rule; returned says that it left its chain by it.
type ruled struct {
	result
	returned bool
}

func on(w way) []ruled { return []ruled{{result: result{w, goOn}}} }

// rule evaluates a rule for a packet.
func (k *walker) rule(c *chain, i int, w way) []ruled {
	r := &c.rules[i]
	ws := r.words
	purpose := ""
	for at := 0; at < len(ws); {
		rest := ws[at:]
		switch {
		case has(rest, "ct", "state"):
			n, matched, target := state(rest[2:], &w)
			if n == 0 {
				k.doubt(r, w.hook)
				return on(w)
			}
			if !matched {
				return on(w)
			}
			if target != nil {
				return k.verdict(c, i, target, w, "")
			}
			at += 2 + n
		case has(rest, "ct", "status", "dnat"):
			if !w.picked {
				return on(w)
			}
			at += 3
		case has(rest, "comment"), has(rest, "update"):
			at = len(ws) // they come last, and change nothing that is looked at here
		case has(rest, "counter"), has(rest, "log"):
			at += idle(rest)
		case has(rest, "notrack"):
			w.untracked = true
			w.step(c, i, r, "notrack", "keep it from connection tracking")
			return on(w)
		case has(rest, "redirect"):
			to := w.dst
			if j := slices.Index(rest, "to"); j > 0 && j+1 < len(rest) {
				n, err := strconv.ParseUint(strings.TrimPrefix(rest[j+1], ":"), 10, 16)
				if err != nil {
					k.doubt(r, w.hook)
					return on(w)
				}
				to = netip.AddrPortFrom(to.Addr(), uint16(n))
			}
			w.dst, w.picked = to, true
			w.step(c, i, r, "redirect", "")
			return []ruled{{result: result{w, over}}}
		case has(rest, "fib", "saddr", "type", "local"):
			if !k.local(w.src.Addr()) {
				return on(w)
			}
			at += 4
		case has(rest, "fib", "daddr", "type", "local"):
			if !k.local(w.dst.Addr()) {
				return on(w)
			}
			at += 4
		case has(rest, "meta", "mark", "set"):
			to, ok := remark(rest[3:], w.mark)
			if !ok {
				k.doubt(r, w.hook)
				return on(w)
			}
			if to&^w.mark != 0 {
				purpose = "mark it to be masqueraded"
				if w.masquerade == "" {
					w.masquerade = k.why(c, r)
				}
			}
			w.mark = to
			at += 3 + markWords
		case has(rest, "meta", "mark", "&") && len(rest) >= 6:
			mask, err1 := strconv.ParseUint(rest[3], 0, 32)
			want, err2 := strconv.ParseUint(rest[5], 0, 32)
			if err1 != nil || err2 != nil || rest[4] != "==" && rest[4] != "!=" {
				k.doubt(r, w.hook)
				return on(w)
			}
			if (w.mark&uint32(mask) == uint32(want)) != (rest[4] == "==") {
				return on(w)
			}
			at += 6
		case has(rest, "masquerade"):
			w.masked = true
			purpose = "masquerade it, for it is marked"
			if w.masquerade == "" {
				w.masquerade = k.why(c, r)
				purpose = "masquerade it, for the client is the endpoint itself"
			}
			w.step(c, i, r, "masquerade", purpose)
			return []ruled{{result: result{w, over}}}
		case has(rest, "dnat"):
			return k.dnat(c, i, rest, w)
		case has(rest, "numgen", "random", "mod") && len(rest) > 5 && rest[4] == "vmap":
			return k.branch(c, i, rest[3], elements(rest[5]), w)
		case isVerdict(rest[0]):
			return k.verdict(c, i, rest, w, "")
		default:
			n, matched, target, comment := k.match(rest, &w)
			if n == 0 {
				k.doubt(r, w.hook)
				return on(w)
			}
			if !matched {
				return on(w)
			}
			if target != nil {
				return k.verdict(c, i, target, w, comment)
			}
			at += n
		}
	}
	if _, _, ep, ok := parseName(c.name); ok && has(ws, "update") {
		purpose = "affinity: remember that the client was sent to " + ep.String()
	}
	w.step(c, i, r, "match", purpose)
	return on(w)
}

// state evaluates what follows "ct state" for a first packet: n is how many words it
// took, 0 if it is not understood. With a target it is a map's verdict.
func state(words []string, w *way) (n int, matched bool, target []string) {
	is := "new"
	if w.untracked {
		is = "untracked"
	}
	if len(words) > 1 && words[0] == "vmap" {
		for _, e := range elements(words[1]) {
			if e.key == is {
				return 2, true, e.value
			}
		}
		return 2, false, nil
	}
	not := false
	if len(words) > 0 && (words[0] == "!=" || words[0] == "==") {
		not = words[0] == "!="
		n++
	}
	if n >= len(words) {
		return 0, false, nil
	}
	if strings.HasPrefix(words[n], "{") {
		for _, e := range elements(words[n]) {
			matched = matched || e.key == is
		}
		return n + 1, matched != not, nil
	}
	for { // "established,related"
		matched = matched || words[n] == is
		if n++; n+1 >= len(words) || words[n] != "," {
			return n, matched != not, nil
		}
		n++
	}
}

// idle is how many words a statement has that counts or tells, and does nothing to a
// packet.
func idle(words []string) int {
	n := 1
	if words[0] == "counter" {
		switch {
		case has(words[1:], "packets"):
			n = 5
		case has(words[1:], "name"):
			n = 3
		}
		return min(n, len(words))
	}
	for n+1 < len(words) && slices.Contains([]string{"prefix", "level", "group", "snaplen", "queue-threshold", "flags"}, words[n]) {
		n += 2
	}
	return min(n, len(words))
}

// markWords is how many words "meta mark | 0x4000" has.
const markWords = 4

// remark evaluates "meta mark | 0x4000".
func remark(words []string, mark uint32) (uint32, bool) {
	if len(words) < markWords || !has(words, "meta", "mark") {
		return 0, false
	}
	n, err := strconv.ParseUint(words[3], 0, 32)
	if err != nil {
		return 0, false
	}
	switch words[2] {
	case "|":
		return mark | uint32(n), true
	case "^":
		return mark ^ uint32(n), true
	case "&":
		return mark & uint32(n), true
	}
	return 0, false
}

func has(words []string, prefix ...string) bool {
	return len(words) >= len(prefix) && slices.Equal(words[:len(prefix)], prefix)
}

func isVerdict(word string) bool {
	return slices.Contains([]string{"accept", "drop", "reject", "return", "jump", "goto", "continue"}, word)
}

// why says why a rule marks a packet: see proxy.Choice.
func (k *walker) why(c *chain, r *rule) string {
	kind, _, _, _ := parseName(c.name)
	switch {
	case strings.Contains(r.text, "@hairpin-connections"), kind == "endpoint":
		return "hairpin"
	case kind == "external" && slices.Contains(r.words, "fib"):
		return "node"
	case kind == "external":
		return "external"
	case slices.Contains(r.words, "!="):
		return "not-local"
	}
	return "all"
}

// verdict follows a verdict; comment is that of the element that led to it.
func (k *walker) verdict(c *chain, i int, words []string, w way, comment string) []ruled {
	r := &c.rules[i]
	switch words[0] {
	case "accept":
		w.step(c, i, r, "accept", "")
		return []ruled{{result: result{w, over}}}
	case "drop", "reject":
		w.refused, w.reason = proxy.Drop, "dropped-by-rule"
		if words[0] == "reject" {
			w.refused = proxy.Reject
		}
		if n, ok := parseKey(comment, w.proto); ok {
			w.service = n
		}
		switch kind, _, _, _ := parseName(c.name); {
		case kind == "firewall":
			w.reason, w.via = "source-range", proxy.ViaLoadBalancer
		case strings.HasSuffix(c.name, "-endpoints-check") && words[0] == "drop":
			w.reason = "no-local-endpoints"
		case c.name == "reject-chain", strings.HasSuffix(c.name, "-endpoints-check"):
			w.reason = "no-endpoints"
		}
		w.step(c, i, r, words[0], strings.ReplaceAll(w.reason, "-", " "))
		return []ruled{{result: result{w, gone}}}
	case "return":
		w.step(c, i, r, "return", "")
		return []ruled{{result{w, goOn}, true}}
	case "continue":
		return on(w)
	}
	if len(words) < 2 {
		k.doubt(r, w.hook)
		return on(w)
	}
	if n, ok := parseKey(comment, w.proto); ok {
		w.service = n
	}
	w.step(c, i, r, words[0], purposeOf(words[1], r))
	var out []ruled
	for _, res := range k.chain(words[1], w) {
		out = append(out, ruled{res, words[0] == "goto" && res.then == goOn})
	}
	return out
}

// parseKey reads "namespace/name:port".
func parseKey(key string, proto conntrack.Proto) (proxy.PortName, bool) {
	namespace, rest, ok := strings.Cut(key, "/")
	name, port, _ := strings.Cut(rest, ":")
	return proxy.PortName{Namespace: namespace, Name: name, Port: port, Proto: proto}, ok && name != "" && !strings.Contains(key, " ")
}

// purposeOf says why a rule leads to a chain.
func purposeOf(to string, r *rule) string {
	kind, n, ep, ok := parseName(to)
	if !ok {
		return ""
	}
	switch kind {
	case "endpoint":
		if strings.Contains(r.text, "@affinity-") {
			return "affinity: the client was sent to " + ep.String() + " before"
		}
		return "take " + ep.String() + " by chance"
	case "external":
		return "outside address of " + n.String()
	case "firewall":
		return "see whether the source ranges of " + n.String() + " let it in"
	case "local":
		return "endpoints of " + n.String() + " on this node only"
	}
	return "endpoints of " + n.String()
}

// branch takes each way of a random choice.
func (k *walker) branch(c *chain, i int, mod string, choices []element, w way) []ruled {
	n, err := strconv.Atoi(mod)
	if err != nil || n < 1 {
		k.doubt(&c.rules[i], w.hook)
		return on(w)
	}
	var out []ruled
	met := 0
	for _, e := range choices {
		if !below(e.key, n) {
			continue
		}
		one := w
		one.chance /= float64(n)
		if met++; len(e.value) > 0 {
			out = append(out, k.verdict(c, i, e.value, one, e.comment)...)
		}
	}
	if d := n - met; d > 0 { // numbers that the map does not have
		one := w
		one.chance *= float64(d) / float64(n)
		out = append(out, on(one)...)
	}
	return out
}

// below reports whether a key of a map is a number that a random choice of n can be.
func below(key string, n int) bool {
	i, err := strconv.Atoi(key)
	return err == nil && 0 <= i && i < n
}

// dnat reads "dnat to 10.1.0.2:80" and "dnat ip to numgen random mod 2 map { … }".
func (k *walker) dnat(c *chain, i int, words []string, w way) []ruled {
	r := &c.rules[i]
	at := slices.Index(words, "to")
	rest := words[at+1:]
	send := func(w way, to netip.AddrPort) ruled {
		w.dst, w.picked = to, true
		w.step(c, i, r, "dnat", "send it to "+to.String())
		return ruled{result: result{w, over}}
	}
	if at >= 0 && len(rest) > 0 {
		if to, err := netip.ParseAddrPort(rest[0]); err == nil {
			return []ruled{send(w, to)}
		}
	}
	if at < 0 || !has(rest, "numgen", "random", "mod") || len(rest) < 6 || rest[4] != "map" {
		k.doubt(r, w.hook)
		return on(w)
	}
	n, err := strconv.Atoi(rest[3])
	if err != nil || n < 1 {
		k.doubt(r, w.hook)
		return on(w)
	}
	var out []ruled
	left := w
	for _, e := range elements(rest[5]) {
		if len(e.value) != 3 || !below(e.key, n) {
			continue
		}
		a, err1 := netip.ParseAddr(e.value[0])
		p, err2 := strconv.ParseUint(e.value[2], 10, 16)
		if err1 != nil || err2 != nil {
			continue
		}
		one := w
		one.chance /= float64(n)
		left.chance -= one.chance
		out = append(out, send(one, netip.AddrPortFrom(a, uint16(p))))
	}
	if left.chance > 1e-9 {
		out = append(out, on(left)...)
	}
	return out
}

// match evaluates "ip daddr . meta l4proto . th dport vmap @service-ips" and its
// kin: n is how many words it took, 0 if it is none that is known. With a target it
// is a map's verdict.
func (k *walker) match(words []string, w *way) (n int, matched bool, target []string, comment string) {
	var values []string
	for {
		rest := words[n:]
		switch {
		case has(rest, "icmp"), has(rest, "icmpv6"):
			return len(words), false, nil, "" // packets to Services are none
		case has(rest, "ip") && w.dst.Addr().Is6(), has(rest, "ip6") && w.dst.Addr().Is4():
			return len(words), false, nil, ""
		case has(rest, "ip", "protocol"), has(rest, "ip6", "nexthdr"):
			values = append(values, w.proto.String())
		case has(rest, "meta", "nfproto"):
			values = append(values, map[bool]string{false: "ipv4", true: "ipv6"}[w.dst.Addr().Is6()])
		case has(rest, "iifname") && w.in != "":
			values = append(values, strconv.Quote(w.in))
			n-- // one word
		case has(rest, "ip", "saddr"), has(rest, "ip6", "saddr"):
			values = append(values, w.src.Addr().String())
		case has(rest, "ip", "daddr"), has(rest, "ip6", "daddr"):
			values = append(values, w.dst.Addr().String())
		case has(rest, "meta", "l4proto"):
			values = append(values, w.proto.String())
		case has(rest, "th", "dport"), has(rest, "tcp", "dport"), has(rest, "udp", "dport"), has(rest, "sctp", "dport"):
			if rest[0] != "th" && rest[0] != w.proto.String() {
				return len(words), false, nil, ""
			}
			values = append(values, strconv.Itoa(int(w.dst.Port())))
		default:
			return 0, false, nil, ""
		}
		n += 2
		if n < len(words) && words[n] == "." {
			n++
			continue
		}
		break
	}
	if n >= len(words) {
		return 0, false, nil, ""
	}
	key, not := strings.Join(values, " . "), false
	switch words[n] {
	case "vmap":
		if n+1 >= len(words) {
			return 0, false, nil, ""
		}
		s := k.setOf(words[n+1])
		if s == nil {
			return 0, false, nil, ""
		}
		v, ok := s.values[key]
		return n + 2, ok, v, s.comment[key]
	case "!=":
		not = true
		n++
	case "==":
		n++
	}
	if n >= len(words) {
		return 0, false, nil, ""
	}
	s := k.setOf(words[n])
	if s == nil {
		s = &set{keys: []string{words[n]}}
	}
	return n + 1, s.contains(key) != not, nil, ""
}

// setOf finds "@name", or reads a list in braces.
func (k *walker) setOf(word string) *set {
	if name, ok := strings.CutPrefix(word, "@"); ok {
		if s := k.sets[name]; s != nil && (k.clients || !strings.HasPrefix(name, "affinity-")) {
			return s
		}
		return &set{} // one whose content is not told, as a client's affinity
	}
	if !strings.HasPrefix(word, "{") {
		return nil
	}
	s := &set{values: map[string][]string{}, comment: map[string]string{}}
	for _, e := range elements(word) {
		s.keys = append(s.keys, e.key)
		s.values[e.key], s.comment[e.key] = e.value, e.comment
	}
	return s
}

// contains reports whether a key is in a set, by itself or by a range.
func (s *set) contains(key string) bool {
	if !s.indexed {
		s.indexed = true
		if s.values == nil {
			s.values = map[string][]string{}
		}
		for _, e := range s.keys {
			if _, ok := s.values[e]; !ok {
				s.values[e] = nil
			}
			if strings.ContainsAny(e, "/-*") {
				s.ranges = append(s.ranges, e)
			}
		}
	}
	if _, ok := s.values[key]; ok {
		return true
	}
	return slices.ContainsFunc(s.ranges, func(r string) bool { return spans(r, key) })
}

// spans reports whether a range of addresses or ports, or the beginning of an
// interface's name, holds a key.
func spans(r, key string) bool {
	if begin, ok := strings.CutSuffix(r, `*"`); ok {
		return strings.HasPrefix(key, begin)
	}
	from, to, ok := strings.Cut(r, "-")
	if a, err := netip.ParseAddr(key); err == nil {
		if p, err := netip.ParsePrefix(r); err == nil {
			return p.Contains(a)
		}
		x, e1 := netip.ParseAddr(from)
		y, e2 := netip.ParseAddr(to)
		return ok && e1 == nil && e2 == nil && x.Compare(a) <= 0 && a.Compare(y) <= 0
	}
	port, err := strconv.ParseUint(key, 10, 16)
	x, e1 := strconv.ParseUint(from, 10, 16)
	y, e2 := strconv.ParseUint(to, 10, 16)
	return ok && err == nil && e1 == nil && e2 == nil && x <= port && port <= y
}
