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
}

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
		t.buf.WriteString("*" + units[0].Table + "\n")
		t.pass = passChains
	case t.unit < len(units):
		units[t.unit].write(&t.buf, t.pass)
		t.unit++
	case t.pass == passChains:
		t.pass, t.unit = passRules, 0
	default:
		t.buf.WriteString("COMMIT\n")
		t.pass, t.unit, t.blocks = passHeader, 0, t.blocks[1:]
	}
}
