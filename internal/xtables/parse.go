package xtables

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ParseError names the line that could not be read.
type ParseError struct {
	Line int // from 1
	Text string
	Err  error
}

// Error returns the line's number, the cause, and the text of the line.
func (e *ParseError) Error() string {
	text := e.Text
	if len(text) > 200 {
		text = text[:200] + "…"
	}
	return fmt.Sprintf("xtables: parsing line %d: %v: %q", e.Line, e.Err, text)
}

// Unwrap returns the cause.
func (e *ParseError) Unwrap() error { return e.Err }

// Parse reads what iptables-save prints or what iptables-restore reads: tables
// with or without counters, and the commands -A, -I, -D, -R, -N, -X, -F, -P, -E
// and -Z. A table that occurs twice goes on; a chain that is declared again is
// emptied, as restore does; a chain that was never declared is taken to exist.
// Matches and targets it does not know are kept as they are written. A line it
// cannot read gives a *ParseError.
//
// The Ruleset keeps parts of text alive.
func Parse(f Family, text string) (*Ruleset, error) {
	p := parser{rs: &Ruleset{Family: f}}
	for n := 1; text != ""; n++ {
		line, rest, _ := strings.Cut(text, "\n")
		text = rest
		if err := p.line(line); err != nil {
			return nil, &ParseError{Line: n, Text: line, Err: err}
		}
	}
	for _, t := range p.rs.Tables {
		t.Chains = slices.DeleteFunc(t.Chains, func(c *Chain) bool { return t.index[c.Name] != c })
	}
	return p.rs, nil
}

// ParseRule reads one rule, without "-A CHAIN".
func ParseRule(f Family, text string) (*Rule, error) {
	p := parser{rs: &Ruleset{Family: f}}
	if strings.ContainsAny(text, "\n") {
		return nil, &ParseError{Line: 1, Text: text, Err: errors.New("more than one line")}
	}
	toks, err := lex(nil, text)
	if err == nil {
		var rules []*Rule
		if rules, err = p.rule(toks); err == nil && len(rules) != 1 {
			err = errors.New("more than one rule")
		}
		if err == nil {
			return rules[0], nil
		}
	}
	return nil, &ParseError{Line: 1, Text: text, Err: err}
}

// GuessFamily tells the family of a save text by its first comment, or else by
// the first thing in it that only one family has. A text that shows neither is
// taken for IPv4.
func GuessFamily(text string) Family {
	head, _, _ := strings.Cut(text, "\n")
	switch {
	case strings.Contains(head, "by ip6tables"):
		return IPv6
	case strings.Contains(head, "by iptables"):
		return IPv4
	}
	for line := range strings.SplitSeq(text, "\n") {
		toks, _ := lex(nil, line)
		for i, t := range toks {
			if t.text == "icmp6-port-unreachable" || t.text == "icmp6" {
				return IPv6
			}
			if i == 0 || toks[i-1].text != "-s" && toks[i-1].text != "-d" {
				continue
			}
			if strings.Contains(t.text, ":") {
				return IPv6
			}
			return IPv4
		}
	}
	return IPv4
}

type parser struct {
	rs    *Ruleset
	table *Table
	toks  []token
	slab  slab
	rp    ruleParser
}

func (p *parser) line(line string) error {
	line = strings.TrimSuffix(line, "\r")
	if line == "" || line[0] == '#' {
		return nil
	}
	toks, err := lex(p.toks[:0], line)
	p.toks = toks
	if err != nil || len(toks) == 0 {
		return err
	}
	first := toks[0]
	switch {
	case first.quoted:
		return errors.New("neither table, chain nor command")
	case first.text[0] == '*':
		if p.table != nil {
			return errors.New("new table before COMMIT")
		}
		if name := first.text[1:]; validName(name) && len(toks) == 1 {
			p.table = p.rs.Ensure(name)
			return nil
		}
		return errors.New("bad table name")
	case p.table == nil:
		return errors.New("not in a table")
	case first.text == "COMMIT":
		if len(toks) > 1 {
			return errors.New("words after COMMIT")
		}
		p.table = nil
		return nil
	case first.text[0] == ':':
		return p.chain(toks)
	}
	return p.command(toks)
}

// chain reads ":NAME POLICY [packets:bytes]".
func (p *parser) chain(toks []token) error {
	name := toks[0].text[1:]
	if !validChain(name) {
		return errors.New("bad chain name")
	}
	if len(toks) < 2 || len(toks) > 3 || !validName(toks[1].text) {
		return errors.New("want :CHAIN POLICY [packets:bytes]")
	}
	var n Counters
	if len(toks) == 3 {
		var ok bool
		if n, ok = parseCounters(toks[2].text); !ok {
			return errors.New("bad counters")
		}
	}
	c := p.table.Ensure(name, "")
	c.Policy, c.Counters, c.Rules = toks[1].text, n, nil
	return nil
}

func parseCounters(s string) (c Counters, ok bool) {
	if len(s) < 2 || s[0] != '[' || s[len(s)-1] != ']' {
		return c, false
	}
	packets, bytes, found := strings.Cut(s[1:len(s)-1], ":")
	var err1, err2 error
	c.Packets, err1 = strconv.ParseUint(packets, 10, 64)
	c.Bytes, err2 = strconv.ParseUint(bytes, 10, 64)
	return c, found && err1 == nil && err2 == nil
}

func validChain(s string) bool { return validName(s) && s[0] != '-' && s[0] != '!' }

// command carries out a line such as "-A CHAIN rule".
func (p *parser) command(toks []token) error {
	var n Counters
	if toks[0].text[0] == '[' {
		var ok bool
		if n, ok = parseCounters(toks[0].text); !ok || len(toks) == 1 {
			return errors.New("bad counters")
		}
		toks = toks[1:]
	}
	cmd := toks[0].text
	if cmd == "-4" || cmd == "-6" { // for one family only
		if (cmd == "-4") != (p.rs.Family == IPv4) {
			return nil
		}
		if toks = toks[1:]; len(toks) == 0 {
			return errors.New("no command")
		}
		cmd = toks[0].text
	}
	if toks[0].quoted {
		return errors.New("no command")
	}
	var name string
	if args := toks[1:]; len(args) > 0 && validChain(args[0].text) {
		name, toks = args[0].text, args[1:]
	} else if len(args) > 0 {
		return errors.New("bad chain name")
	} else if !slices.Contains([]string{"-F", "--flush", "-X", "--delete-chain", "-Z", "--zero"}, cmd) {
		return errors.New("no chain name")
	} else {
		toks = nil
	}
	if done, err := p.chainCommand(cmd, name, toks); done || err != nil {
		return err
	}
	return p.ruleCommand(cmd, p.table.Ensure(name, ""), toks, n)
}

// chainCommand carries out the commands that take no rule.
func (p *parser) chainCommand(cmd, name string, args []token) (done bool, err error) {
	t := p.table
	want := 0
	switch cmd {
	case "-N", "--new-chain", "--new":
		t.Ensure(name, "-").Policy = "-"
	case "-Z", "--zero":
	case "-P", "--policy":
		if want = 1; len(args) == 1 && validName(args[0].text) {
			t.Ensure(name, "").Policy = args[0].text
		}
	case "-E", "--rename-chain":
		if want = 1; len(args) == 1 && validChain(args[0].text) {
			if t.index[args[0].text] != nil {
				return true, errors.New("chain exists already")
			}
			c := t.Ensure(name, "-")
			delete(t.index, c.Name)
			c.Name = args[0].text
			t.index[c.Name] = c
		}
	case "-F", "--flush", "-X", "--delete-chain":
		remove := cmd == "-X" || cmd == "--delete-chain"
		chains := t.Chains
		if name != "" {
			chains = []*Chain{t.index[name]}
		}
		for _, c := range chains {
			if c == nil || t.index[c.Name] != c {
				continue
			}
			if !remove {
				c.Rules = nil
			} else if c.Policy == "-" || c.Policy == "" {
				delete(t.index, c.Name)
			}
		}
	default:
		return false, nil
	}
	if len(args) != want || want == 1 && !validName(args[0].text) {
		return true, fmt.Errorf("%s: wrong arguments", cmd)
	}
	return true, nil
}

// ruleCommand carries out the commands that take a rule or its number.
func (p *parser) ruleCommand(cmd string, c *Chain, args []token, n Counters) error {
	at := 0 // a rule's number from 1
	if len(args) > 0 && !args[0].quoted && args[0].text[0] >= '0' && args[0].text[0] <= '9' {
		if i, err := strconv.Atoi(args[0].text); err == nil && i > 0 {
			at, args = i, args[1:]
		}
	}
	rules, err := p.rule(args)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if n != (Counters{}) {
			r.Counters = n
		}
	}
	switch cmd {
	case "-A", "--append":
		if at != 0 {
			return errors.New("a rule number makes no sense here")
		}
		c.Rules = append(c.Rules, rules...)
	case "-I", "--insert":
		at = max(at, 1)
		if at > len(c.Rules)+1 {
			// More than we know of: a text for --noflush may mean rules that
			// the kernel has.
			at = len(c.Rules) + 1
		}
		for _, r := range rules { // each at the same place, as iptables does
			c.Rules = slices.Insert(c.Rules, at-1, r)
		}
	case "-R", "--replace":
		if at == 0 || len(rules) != 1 {
			return errors.New("no rule number")
		}
		if at <= len(c.Rules) {
			c.Rules[at-1] = rules[0]
		}
	case "-D", "--delete":
		if at == 0 {
			at = slices.IndexFunc(c.Rules, rules[0].Equal) + 1
		}
		if at >= 1 && at <= len(c.Rules) {
			c.Rules = slices.Delete(c.Rules, at-1, at)
		}
	default:
		return fmt.Errorf("unknown command %q", cmd)
	}
	return nil
}
