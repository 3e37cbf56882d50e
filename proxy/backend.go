package proxy

import (
	"context"
	"net/netip"
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

// Forgetter is a Backend that knows what the kernel holds. After Forget its next
// Apply finds out anew, compares everything and writes what differs.
type Forgetter interface {
	Forget()
}

// Watcher is a Backend that can tell when others write to what it programs.
type Watcher interface {
	// Watch calls changed when somebody did, until ctx ends, which is no
	// error. It then expects Forget and Apply, as Syncer.Resync brings about.
	// It calls the more rarely the more often it has to, so that a repair that
	// somebody undoes again and again costs little.
	Watch(ctx context.Context, changed func(Drift)) error
	// DriftStats may be called at any time.
	DriftStats() DriftStats
}

// Follower is a Backend that follows what another proxy programs, and programs
// no Service itself.
type Follower interface {
	// Follow calls changed when what Render goes by has changed, until ctx ends,
	// which is no error. It then expects Forget and Apply, as Syncer.Resync
	// brings about.
	Follow(ctx context.Context, changed func()) error
	// Found says in a few words beside what it works.
	Found() string
	// Blind lists what it cannot see, a sentence each.
	Blind() []string
}

// Drift is a suspicion that the kernel does not hold what Apply wrote.
type Drift struct {
	// Certain says that rules of ours were changed; else somebody wrote in a
	// way that has to be looked at.
	Certain bool
	// Written says, where it is not certain, that somebody did write to what we
	// write to, and not only may have.
	Written bool
	// What says for people what was seen.
	What string
}

// DriftStats says what a Watcher has seen.
type DriftStats struct {
	// Certain counts how often rules of ours had been changed by others,
	// Doubts how often that could not be ruled out, Held the looks at which a
	// repair was put off because the last one was too short ago.
	Certain, Doubts, Held uint64
	// Last is when and LastWhat what was seen last.
	Last     time.Time
	LastWhat string
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

// AffinityList is a list in which the kernel keeps clients of an endpoint, of a
// Service with session affinity.
type AffinityList struct {
	Name     string
	Service  PortName
	Endpoint netip.AddrPort
	Timeout  time.Duration
}

// Report is what an Apply did.
type Report struct {
	// Full says that the kernel's state was read and compared as a whole.
	Full bool
	// Commits, Rules and Bytes count what was written.
	Commits, Rules, Bytes int
	// Tables counts the Rules by table, where the mode has tables.
	Tables map[Table]int
	// Refused counts the Service ports that the kernel does not take. Partial
	// says that the error, if there is one, speaks of them alone, and that
	// they are no more than half of all.
	Refused int
	Partial bool
	// Restored counts rules that report and that others had removed, in the time
	// from Intact, when they were last known to be there, until now.
	Restored int
	Intact   time.Time
	// Refusals names the Services that the kernel does not take, and says why.
	Refusals []Problem
	Took     time.Duration
}

// Table names a table of rules.
type Table struct {
	IP6  bool
	Name string
}
