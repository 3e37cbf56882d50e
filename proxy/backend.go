package proxy

import (
	"context"
	"time"
)

// Backend turns a Snapshot into kernel state in one mode. Render is pure and
// safe for concurrent use; Apply and Cleanup have one caller at a time.
type Backend interface {
	Mode() Mode
	// Render says what should be in the kernel. It never fails: what cannot
	// be rendered is left out and named in the Program's Problems.
	Render(*Snapshot, Overlay) Program
	// Apply brings the kernel to p by a plan of commits in which no
	// connection meets a half-made Service. It remembers what the kernel took
	// and, after an error, finds out anew before it writes again. An error
	// may be partial: everything that could be programmed was.
	Apply(ctx context.Context, p Program) (Report, error)
	// Cleanup removes everything the mode ever writes, and nothing else.
	Cleanup(context.Context) error
}

// Program is the desired state of one mode: what it means and what it does.
// It is immutable and safe for concurrent use.
type Program interface {
	// Index lists the tagged rules.
	Index() Index
	// Walk predicts what becomes of a first packet. It does not touch the
	// kernel.
	Walk(Packet) Outcome
	// Text is the whole program as its tool would take it, for --dry-run.
	Text() string
	Problems() []Problem
}

// Report is what an Apply did.
type Report struct {
	// Full says that the kernel's state was read and compared as a whole.
	Full bool
	// Commits, Rules and Bytes count what was written.
	Commits, Rules, Bytes int
	// Tables counts the Rules by table, where the mode has tables.
	Tables map[string]int
	Took   time.Duration
}
