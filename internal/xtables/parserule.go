package xtables

import (
	"errors"
	"fmt"
	"strings"
)

// module is a match or the target that may own the options that follow.
type module struct {
	name string
	ext  *extension
	opts []Opt
}

// ruleParser collects one rule; its lists are reused from rule to rule.
type ruleParser struct {
	rule     Rule
	src, dst []Addr
	matches  []module
	target   module
	// last is the module an unknown option belongs to.
	last *module
}

// rule reads a rule. A list of addresses gives one rule for each.
func (p *parser) rule(toks []token) ([]*Rule, error) {
	rp := &p.rp
	*rp = ruleParser{rule: Rule{Family: p.rs.Family}, matches: rp.matches[:0], target: module{opts: rp.target.opts[:0]}}
	not := false
	for len(toks) > 0 {
		t := toks[0]
		if t.isNot() {
			if not {
				return nil, errors.New("two ! in a row")
			}
			not, toks = true, toks[1:]
			continue
		}
		if !t.isOption() {
			return nil, fmt.Errorf("bad argument %q", t.text)
		}
		n, err := rp.option(toks, not, &p.slab)
		if err != nil {
			return nil, err
		}
		not, toks = false, toks[n:]
	}
	if not {
		return nil, errors.New("! without an option")
	}
	return rp.finish(&p.slab)
}

// option reads the option at toks[0] and returns how many tokens it took.
func (rp *ruleParser) option(toks []token, not bool, s *slab) (int, error) {
	name, value, inline := toks[0].text, "", false
	if strings.HasPrefix(name, "--") {
		name, value, inline = strings.Cut(name, "=")
	}
	args := toks[1:]
	r := &rp.rule
	if kind := basicOption(name); kind != 0 {
		used := 0
		if !inline && kind != 'f' {
			if len(args) == 0 || args[0].isNot() {
				return 0, fmt.Errorf("%s: no argument", name)
			}
			value, used = args[0].text, 1
		}
		if not && strings.IndexByte("mjgc", kind) >= 0 {
			return 0, fmt.Errorf("! before %s", name)
		}
		if kind == 'c' {
			if inline || len(args) < 2 {
				return 0, errors.New("-c: want packets and bytes")
			}
			n, ok := parseCounters("[" + args[0].text + ":" + args[1].text + "]")
			if !ok {
				return 0, errors.New("-c: bad counters")
			}
			r.Counters = n
			return 3, nil
		}
		return 1 + used, rp.basic(kind, value, not)
	}
	if !strings.HasPrefix(name, "--") || !validName(name[2:]) || name == "--" {
		return 0, fmt.Errorf("unknown option %q", name)
	}
	name = name[2:]
	m, known := rp.owner(name)
	if m == nil {
		return 0, fmt.Errorf("unknown option --%s", name)
	}
	o := Opt{Name: name, Not: not}
	spec, _ := m.ext.option(name)
	if known && !inline {
		if len(args) < spec.argc {
			return 0, fmt.Errorf("--%s: too few arguments", name)
		}
		args = args[:spec.argc]
	} else if !known && !inline {
		n := 0
		for n < len(args) && !args[n].isOption() && !args[n].isNot() {
			n++
		}
		args = args[:n]
	} else {
		args = []token{{text: value}}
		if known && spec.argc != 1 {
			return 0, fmt.Errorf("--%s: wrong arguments", name)
		}
	}
	o.Values = s.values(len(args))
	for i, a := range args {
		o.Values[i] = a.text
		o.Quoted = o.Quoted || a.quoted
	}
	m.opts = append(m.opts, o)
	if inline {
		return 1, nil
	}
	return 1 + len(args), nil
}

// basicOption returns the letter of an option that belongs to iptables itself.
func basicOption(name string) byte {
	if len(name) == 2 && strings.IndexByte("sdiopfmjgc", name[1]) >= 0 {
		return name[1]
	}
	switch name {
	case "--source", "--src":
		return 's'
	case "--destination", "--dst":
		return 'd'
	case "--in-interface":
		return 'i'
	case "--out-interface":
		return 'o'
	case "--protocol", "--proto":
		return 'p'
	case "--fragment", "--fragments":
		return 'f'
	case "--match":
		return 'm'
	case "--jump":
		return 'j'
	case "--goto":
		return 'g'
	case "--set-counters":
		return 'c'
	}
	return 0
}

func (rp *ruleParser) basic(kind byte, value string, not bool) error {
	r := &rp.rule
	if kind != 'f' && (!validName(value) || value == "!") {
		return fmt.Errorf("-%c: bad argument %q", kind, value)
	}
	switch kind {
	case 's', 'd':
		a, more := &r.Src, &rp.src
		if kind == 'd' {
			a, more = &r.Dst, &rp.dst
		}
		return parseAddrs(a, more, r.Family, value, not)
	case 'i':
		r.In = Iface{Name: value, Not: not}
	case 'o':
		r.Out = Iface{Name: value, Not: not}
	case 'p':
		r.Proto = Proto{Name: protoName(value), Not: not}
		if r.Proto.Name == "" {
			r.Proto.Not = false
		}
	case 'f':
		if r.Frag = "-f"; not {
			r.Frag = "! -f"
		}
	case 'm':
		rp.addMatch(value)
	case 'j', 'g':
		if rp.target.name != "" {
			return errors.New("two targets")
		}
		if value[0] == '-' {
			return fmt.Errorf("bad target %q", value)
		}
		r.Goto = kind == 'g'
		rp.target = module{name: value, opts: rp.target.opts}
		if !r.Goto {
			rp.target.ext = targetExtensions[value]
		}
		rp.last = &rp.target
	}
	return nil
}

// parseAddrs reads an address into a, and those after commas into more.
func parseAddrs(a *Addr, more *[]Addr, f Family, value string, not bool) error {
	first, rest, list := strings.Cut(value, ",")
	if list && not {
		return errors.New("! before a list of addresses")
	}
	var err error
	if *a, err = parseAddr(f, first); err != nil {
		return err
	}
	a.Not = not
	*more = nil
	for list {
		first, rest, list = strings.Cut(rest, ",")
		one, err := parseAddr(f, first)
		if err != nil {
			return err
		}
		*more = append(*more, one)
	}
	return nil
}

func (rp *ruleParser) addMatch(name string) {
	if len(rp.matches) < cap(rp.matches) { // keep the old one's options slice
		rp.matches = rp.matches[:len(rp.matches)+1]
	} else {
		rp.matches = append(rp.matches, module{})
	}
	m := &rp.matches[len(rp.matches)-1]
	*m = module{name: name, ext: matchExtensions[name], opts: m.opts[:0]}
	rp.last = m
}

// owner finds the module that an option belongs to. An unknown match owns all
// that follows it, as iptables-save prints it. Otherwise it is the latest module
// that knows the option, else the protocol's own match, else the latest module.
// known says that the number of arguments is known.
func (rp *ruleParser) owner(name string) (m *module, known bool) {
	if rp.last != nil && rp.last != &rp.target && rp.current().ext == nil {
		return rp.current(), false
	}
	if _, ok := rp.target.ext.option(name); ok {
		return &rp.target, true
	}
	for i := len(rp.matches) - 1; i >= 0; i-- {
		if _, ok := rp.matches[i].ext.option(name); ok {
			return &rp.matches[i], true
		}
	}
	if implied := protoMatch(rp.rule.Proto.Name); implied != "" && !rp.rule.Proto.Not {
		if _, ok := matchExtensions[implied].option(name); ok {
			last := rp.last
			rp.addMatch(implied)
			m := rp.last
			if last == &rp.target {
				rp.last = last
			}
			return m, true
		}
	}
	if rp.last == nil || rp.last == &rp.target && rp.rule.Goto {
		return nil, false
	}
	return rp.current(), false
}

// current returns the module that rp.last means, which may have moved when the
// list of matches grew.
func (rp *ruleParser) current() *module {
	if rp.last == &rp.target {
		return rp.last
	}
	return &rp.matches[len(rp.matches)-1]
}

// early returns an option that stands before the -m, -j or -p that it belongs
// to, as iptables refuses it.
func (rp *ruleParser) early() (string, bool) {
	implied := matchExtensions[protoMatch(rp.rule.Proto.Name)]
	if rp.rule.Proto.Not {
		implied = nil
	}
	misplaced := func(m *module) (string, bool) {
		for i := range m.opts {
			name := m.opts[i].Name
			if _, own := m.ext.option(name); own {
				continue
			}
			_, other := implied.option(name)
			if _, ok := rp.target.ext.option(name); ok {
				other = true
			}
			for j := range rp.matches {
				_, ok := rp.matches[j].ext.option(name)
				other = other || ok
			}
			if other {
				return name, true
			}
		}
		return "", false
	}
	for i := range rp.matches {
		if rp.matches[i].ext == nil {
			continue // it owns whatever follows it
		}
		if name, bad := misplaced(&rp.matches[i]); bad {
			return name, true
		}
	}
	return misplaced(&rp.target)
}

// finish makes the rule of what was collected.
func (rp *ruleParser) finish(s *slab) ([]*Rule, error) {
	if name, bad := rp.early(); bad {
		return nil, fmt.Errorf("--%s before what it belongs to", name)
	}
	r := s.rule()
	*r = rp.rule
	r.Target = rp.target.name
	r.TargetOpts = s.options(rp.target.opts)
	r.Matches = s.matches(len(rp.matches))
	for i := range rp.matches {
		r.Matches[i] = Match{Name: rp.matches[i].name, Opts: s.options(rp.matches[i].opts)}
	}
	r.canonicalize()
	rules := s.out[:0]
	rules = append(rules, r)
	s.out = rules
	if len(rp.src) == 0 && len(rp.dst) == 0 {
		return rules, nil
	}
	if (len(rp.src)+1)*(len(rp.dst)+1) > 1024 {
		return nil, errors.New("more than 1024 rules in a line")
	}
	rules = nil
	for _, src := range append([]Addr{rp.rule.Src}, rp.src...) {
		for _, dst := range append([]Addr{rp.rule.Dst}, rp.dst...) {
			c := rp.rule
			c.Target, c.TargetOpts, c.Matches = r.Target, r.TargetOpts, r.Matches
			c.Src, c.Dst = src, dst
			rules = append(rules, c.canon())
		}
	}
	return rules, nil
}
