package xtables

import (
	"bytes"
	"io"
)

// text reads as what iptables-restore takes: each block, units of one table, is
// one commit. It is made as it is read, so that it is never in memory as a
// whole.
type text struct {
	blocks [][]Unit
	pass   pass
	unit   int // the next one of the part
	buf    bytes.Buffer
	// lines are those made so far, counts what is known of each block begun.
	lines  int
	counts []blockCount
}

// blockCount is the number of a block's first line, from 1, and what its units
// have: rules that they add, and bytes.
type blockCount struct{ line, rules, bytes int }

// pass is a part of a block. Declarations come first: with --noflush a line that
// declares a chain also empties it, so this does not change what the block
// means, and units may then name each other's chains.
type pass uint8

const (
	passHeader pass = iota
	passChains
	passRules
)

var _ io.Reader = (*text)(nil)

// Read implements io.Reader.
func (t *text) Read(p []byte) (int, error) {
	for t.buf.Len() < len(p) && len(t.blocks) > 0 {
		t.step()
	}
	return t.buf.Read(p)
}

// step makes a bit more.
func (t *text) step() {
	units := t.blocks[0]
	switch {
	case t.pass == passHeader:
		t.counts = append(t.counts, blockCount{line: t.lines + 1})
		t.buf.WriteString("*" + units[0].Table + "\n")
		t.pass, t.lines = passChains, t.lines+1
	case t.unit < len(units):
		c, before := &t.counts[len(t.counts)-1], t.buf.Len()
		n := units[t.unit].write(&t.buf, t.pass)
		t.lines, c.rules, c.bytes = t.lines+n.lines, c.rules+n.rules, c.bytes+t.buf.Len()-before
		t.unit++
	case t.pass == passChains:
		t.pass, t.unit = passRules, 0
	default:
		t.buf.WriteString("COMMIT\n")
		t.pass, t.unit, t.blocks, t.lines = passHeader, 0, t.blocks[1:], t.lines+1
	}
}
