package xtables

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Listing is what iptables-save printed as text, each rule in the one way in
// which Rule.String writes it: what is compared with rules that are text as well.
// 160,000 rules take 20 MB so, and 100 MB as a Ruleset.
type Listing struct {
	Family Family
	tables map[string]*listed
}

// listed is one table.
type listed struct {
	order  []string
	chains map[string][]string
}

// ParseListing reads what iptables-save prints. The Listing keeps the text alive.
func ParseListing(f Family, text string) (*Listing, error) {
	l := &Listing{Family: f, tables: map[string]*listed{}}
	p := parser{rs: &Ruleset{Family: f}}
	var t *listed
	var buf []byte
	for n := 1; text != ""; n++ {
		line, rest, _ := strings.Cut(text, "\n")
		text = rest
		var err error
		switch {
		case line == "" || line[0] == '#' || line == "COMMIT":
		case line[0] == '*':
			t = l.ensure(line[1:])
		case t == nil:
			err = errors.New("not in a table")
		case line[0] == ':':
			name, _, _ := strings.Cut(line[1:], " ")
			t.ensure(name)
		case strings.HasPrefix(line, appendTo):
			name, rule, _ := strings.Cut(line[len(appendTo):], " ")
			rule = strings.TrimSpace(rule)
			t.ensure(name)
			if p.toks, err = lex(p.toks[:0], rule); err != nil {
				break
			}
			var rules []*Rule
			if rules, err = p.rule(p.toks); err != nil {
				break
			}
			for _, r := range rules {
				own := rule
				if buf = r.AppendText(buf[:0]); string(buf) != rule {
					own = string(buf)
				}
				t.chains[name] = append(t.chains[name], own)
			}
		default:
			err = errors.New("neither table, chain nor rule")
		}
		if err != nil {
			return nil, &ParseError{Line: n, Text: line, Err: err}
		}
	}
	return l, nil
}

// List lists a Ruleset.
func List(rs *Ruleset) *Listing {
	l := &Listing{Family: rs.Family, tables: map[string]*listed{}}
	for _, t := range rs.Tables {
		into := l.ensure(t.Name)
		for _, c := range t.Chains {
			into.ensure(c.Name)
			for _, r := range c.Rules {
				into.chains[c.Name] = append(into.chains[c.Name], r.String())
			}
		}
	}
	return l
}

func (l *Listing) ensure(table string) *listed {
	t := l.tables[table]
	if t == nil {
		t = &listed{chains: map[string][]string{}}
		l.tables[table] = t
	}
	return t
}

func (t *listed) ensure(chain string) {
	if _, ok := t.chains[chain]; !ok {
		t.chains[chain] = nil
		t.order = append(t.order, chain)
	}
}

// Chain returns the rules of a chain if it is there. They must not be changed.
func (l *Listing) Chain(table, chain string) (rules []string, ok bool) {
	t := l.tables[table]
	if t == nil {
		return nil, false
	}
	rules, ok = t.chains[chain]
	return rules, ok
}

// Chains names the chains of a table in their order.
func (l *Listing) Chains(table string) []string {
	if t := l.tables[table]; t != nil {
		return t.order
	}
	return nil
}

// List reads all tables that exist.
func (r *Runner) List(ctx context.Context) (*Listing, error) {
	text, err := r.cfg.Tools.SaveText(ctx, r.cfg.Flavour, r.cfg.Family, "", false)
	if err != nil {
		return nil, err
	}
	l, err := ParseListing(r.cfg.Family, text)
	if err != nil {
		return nil, fmt.Errorf("xtables: reading %s: %w", Program(r.cfg.Flavour, r.cfg.Family, "save"), err)
	}
	return l, nil
}
