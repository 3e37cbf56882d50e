package xtables

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"strings"
)

// SavePart is Save of all tables without what serves other Services than those that in
// names ("shop/foo:http"): their rules in chains of kube-proxy's, known by their
// comments, and the chains of theirs that nothing else leads to. It reads twice, and
// the whole is never in memory.
func (t *Tools) SavePart(ctx context.Context, fl Flavour, fa Family, in func(service string) bool) (*Ruleset, error) {
	p := newSieve(in)
	if err := t.save(ctx, &lineWriter{line: p.learn}, fl, fa); err != nil {
		return nil, err
	}
	p.decide()
	if err := t.save(ctx, &lineWriter{line: p.keep}, fl, fa); err != nil {
		return nil, err
	}
	rs, err := Parse(fa, p.text.String())
	if err != nil {
		return nil, fmt.Errorf("xtables: reading a part of %s: %w", Program(fl, fa, "save"), err)
	}
	return rs, nil
}

// sieve cuts a save text down to some Services. Chains are known by hashes of
// their names.
type sieve struct {
	in   func(service string) bool
	seed maphash.Seed
	// leads says to which chains of Services a chain of one leads, all and some
	// where the rules of all lead and those of rules that are kept.
	leads     map[uint64][]uint64
	all, some map[uint64]bool
	text      strings.Builder
}

func newSieve(in func(string) bool) *sieve {
	return &sieve{in: in, seed: maphash.MakeSeed(), leads: map[uint64][]uint64{}, all: map[uint64]bool{}, some: map[uint64]bool{}}
}

func (p *sieve) hash(chain []byte) uint64 { return maphash.Bytes(p.seed, chain) }

// learn reads a line for the first time.
func (p *sieve) learn(line []byte) {
	chain, rule, ok := appended(line)
	if !ok {
		return
	}
	to := target(rule)
	if !servesOne(string(to)) {
		return
	}
	if servesOne(string(chain)) {
		from := p.hash(chain)
		p.leads[from] = append(p.leads[from], p.hash(to))
		return
	}
	p.all[p.hash(to)] = true
	if p.wanted(chain, rule) {
		p.some[p.hash(to)] = true
	}
}

// decide follows where rules lead.
func (p *sieve) decide() {
	for _, seen := range []map[uint64]bool{p.all, p.some} {
		queue := make([]uint64, 0, len(seen))
		for chain := range seen {
			queue = append(queue, chain)
		}
		for len(queue) > 0 {
			chain := queue[len(queue)-1]
			queue = queue[:len(queue)-1]
			for _, next := range p.leads[chain] {
				if !seen[next] {
					seen[next] = true
					queue = append(queue, next)
				}
			}
		}
	}
	p.leads = nil
}

// keep reads a line for the second time.
func (p *sieve) keep(line []byte) {
	chain, rule, isRule := appended(line)
	if !isRule && len(line) > 0 && line[0] == ':' {
		chain, _, _ = bytes.Cut(line[1:], []byte(" "))
	}
	if servesOne(string(chain)) {
		if h := p.hash(chain); p.all[h] && !p.some[h] {
			return
		}
	} else if isRule && !p.wanted(chain, rule) {
		return
	}
	p.text.Write(line)
	p.text.WriteByte('\n')
}

// wanted reports whether a rule that is in no Service's own chain is kept: all but
// those of another Service in a chain of kube-proxy's.
func (p *sieve) wanted(chain, rule []byte) bool {
	if !isKubeProxy(string(chain)) {
		return true
	}
	name := serviceOf(rule)
	return name == nil || p.in(string(name))
}

// appended splits a line that appends a rule.
func appended(line []byte) (chain, rule []byte, ok bool) {
	if rest, found := bytes.CutPrefix(line, []byte(appendTo)); found {
		chain, rule, _ = bytes.Cut(rest, []byte(" "))
		return chain, rule, true
	}
	return nil, nil, false
}

// target returns where a rule leads, nil for one that says nothing of it.
func target(rule []byte) []byte {
	const jump = "-j "
	i := bytes.LastIndex(rule, []byte(jump))
	if i < 0 {
		return nil
	}
	to, _, _ := bytes.Cut(rule[i+len(jump):], []byte(" "))
	return to
}

// serviceOf returns the Service port that a kube-proxy's comment names, as
// "shop/foo:http", nil where there is none.
func serviceOf(rule []byte) []byte {
	_, rest, found := bytes.Cut(rule, []byte("--comment "))
	if !found {
		return nil
	}
	end := []byte(" ")
	if quoted, ok := bytes.CutPrefix(rest, []byte(`"`)); ok {
		rest, end = quoted, []byte(`"`)
	}
	text, _, _ := bytes.Cut(rest, end)
	for len(text) > 0 {
		var word []byte
		word, text, _ = bytes.Cut(text, []byte(" "))
		if bytes.IndexByte(word, '/') > 0 {
			return word
		}
	}
	return nil
}

// lineWriter hands on what is written to it line by line, without newlines. A last
// line without one is none.
type lineWriter struct {
	line func([]byte)
	rest []byte
}

// Write implements io.Writer.
func (w *lineWriter) Write(b []byte) (int, error) {
	n := len(b)
	for {
		line, after, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			w.rest = append(w.rest, b...)
			return n, nil
		}
		if len(w.rest) > 0 {
			w.rest = append(w.rest, line...)
			line = w.rest
		}
		w.line(line)
		w.rest, b = w.rest[:0], after
	}
}
