package xtables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// The default sizes of a commit. The time of iptables-nft grows with the square
// of a commit's size; between 64 KiB and 1 MiB it hardly matters (5,000 Services
// of 10 endpoints: 4 to 5 s). Legacy swaps the whole table at each commit: as
// few as possible.
const (
	nftCommitBytes    = 128 << 10
	legacyCommitBytes = 64 << 20
	minCommitBytes    = 4 << 10
)

// RunnerConfig says where and how to apply plans.
type RunnerConfig struct {
	Tools   Tools
	Flavour Flavour
	Family  Family
	// MaxCommitBytes bounds the text of one COMMIT block; zero means a
	// default that suits the flavour. A unit is never split, so a large one
	// makes a large block. In a user namespace iptables-nft takes no more than
	// about 310 rules and 110 chains at once, for it cannot enlarge its socket
	// buffer: a block that the kernel finds too long is halved, and the Runner
	// remembers.
	MaxCommitBytes int
	// MaxRunBytes bounds the text given to one iptables-restore process,
	// which may hold several blocks; zero means 1 MiB. Between two processes
	// the context is looked at.
	MaxRunBytes int
}

// Runner applies plans with iptables-restore. Several goroutines may use it;
// they then wait for each other in the kernel.
type Runner struct {
	cfg RunnerConfig
	max atomic.Int64 // bytes a commit may have, as far as we know
}

// NewRunner returns a Runner; it starts nothing.
func NewRunner(cfg RunnerConfig) *Runner {
	if cfg.MaxCommitBytes <= 0 {
		cfg.MaxCommitBytes = nftCommitBytes
		if cfg.Flavour == Legacy {
			cfg.MaxCommitBytes = legacyCommitBytes
		}
	}
	if cfg.MaxRunBytes <= 0 {
		cfg.MaxRunBytes = 1 << 20
	}
	r := &Runner{cfg: cfg}
	r.max.Store(int64(cfg.MaxCommitBytes))
	return r
}

// Save reads one table, or all that exist if table is "".
func (r *Runner) Save(ctx context.Context, table string) (*Ruleset, error) {
	return r.cfg.Tools.Save(ctx, r.cfg.Flavour, r.cfg.Family, table, false)
}

// Apply puts a plan into the kernel, phase by phase, and in a phase unit by
// unit in their order; consecutive units of one table share commits. A unit
// that is refused is left out, all others are applied: that is reported in
// Report.Failed and is no error. An error means that the rest of the plan was
// not applied: the context ended, the program is missing or may not, the lock
// stayed taken. The report then says how far it came.
//
// The end of ctx is looked at between commits and never tears one.
func (r *Runner) Apply(ctx context.Context, plan Plan) (Report, error) {
	a := applying{r: r, ctx: ctx}
	start := time.Now()
	var err error
	for _, ph := range plan {
		if err = a.phase(ph); err != nil {
			err = fmt.Errorf("xtables: applying phase %q: %w", ph.Name, err)
			break
		}
	}
	a.rep.Duration = time.Since(start)
	return a.rep, err
}

// applying is one Apply under way.
type applying struct {
	r   *Runner
	ctx context.Context
	rep Report

	phaseName string
	units     []Unit // of the phase
	probed    bool   // an empty commit was taken
}

// block is a commit: the units [from, to) of the phase, all of one table.
type block struct{ from, to, bytes int }

func (a *applying) phase(ph Phase) error {
	a.phaseName, a.units = ph.Name, ph.Units
	for i := 0; i < len(ph.Units); {
		next, err := a.apply(a.pack(i))
		if err != nil {
			return err
		}
		i = next
	}
	return nil
}

// pack collects the blocks for one process, from unit i on.
func (a *applying) pack(i int) (run []block) {
	total, limit := 0, int(a.r.max.Load())
	for i < len(a.units) && (total == 0 || total < a.r.cfg.MaxRunBytes) {
		b := block{from: i, to: i}
		for b.to < len(a.units) && a.units[b.to].Table == a.units[i].Table {
			n := a.units[b.to].bytes()
			if b.bytes > 0 && b.bytes+n > limit {
				break
			}
			b.bytes += n
			b.to++
		}
		total += b.bytes
		run = append(run, b)
		i = b.to
	}
	return run
}

// apply gives blocks to one process and returns the unit to go on with. When a
// block is refused, those before it are in the kernel; which one it was is told
// by the number of the line in the message.
func (a *applying) apply(run []block) (next int, err error) {
	t := a.text(run)
	f, err := a.restore(t)
	if err != nil {
		return 0, err
	}
	bad := len(run)
	if f != nil {
		if bad = f.block(t.counts); bad < 0 {
			return 0, fmt.Errorf("iptables-restore did not say what it refuses: %s", f.stderr)
		}
	}
	for i, b := range run[:bad] {
		a.done(b, t.counts[i])
	}
	if f == nil {
		return run[bad-1].to, nil
	}
	return run[bad].to, a.split(run[bad], f, t.counts[bad].line)
}

// split applies a block that was refused as a whole in smaller parts, until the
// unit at fault is alone.
func (a *applying) split(b block, f *failure, firstLine int) error {
	if b.to-b.from == 1 {
		if err := a.works(); err != nil {
			return err
		}
		u := &a.units[b.from]
		a.rep.Failed = append(a.rep.Failed, UnitError{
			Table: u.Table, Owner: u.Owner, Phase: a.phaseName, Index: b.from,
			Line: f.unitLine(u, firstLine), Stderr: f.stderr,
		})
		return nil
	}
	mid := (b.from + b.to) / 2
	cuts := []int{b.from, mid, b.to}
	if f.tooLong {
		a.r.max.Store(int64(max(b.bytes/2, minCommitBytes)))
	} else if i := a.unitAt(b, f.line-firstLine); i >= 0 {
		cuts = []int{b.from, i, i + 1, b.to}
	}
	for i := range cuts[1:] {
		part := block{from: cuts[i], to: cuts[i+1]}
		if part.from == part.to {
			continue
		}
		for _, u := range a.units[part.from:part.to] {
			part.bytes += u.bytes()
		}
		if _, err := a.apply([]block{part}); err != nil {
			return err
		}
	}
	return nil
}

// works returns an error if iptables-restore takes nothing at all, which a unit
// that stands alone would be blamed for. What was taken before shows that it
// works; else it is given an empty commit.
func (a *applying) works() error {
	if a.rep.Commits > 0 || a.probed {
		return nil
	}
	f, err := a.restore(strings.NewReader("*mangle\nCOMMIT\n"))
	if err == nil && f != nil {
		err = fmt.Errorf("iptables-restore takes nothing: %s", f.stderr)
	}
	a.probed = err == nil
	return err
}

// unitAt returns the unit that has the given line of a block's text, counted
// from 0 at the "*table" line, or -1.
func (a *applying) unitAt(b block, line int) int {
	n := 1
	for _, p := range [...]pass{passChains, passRules} {
		for i := b.from; i < b.to; i++ {
			var text bytes.Buffer
			lines := a.units[i].write(&text, p).lines
			if line >= n && line < n+lines {
				return i
			}
			n += lines
		}
	}
	return -1
}

func (a *applying) done(b block, n blockCount) {
	a.rep.Commits++
	a.rep.Units += b.to - b.from
	a.rep.Bytes += n.bytes
	if n.rules > 0 {
		a.rep.Rules += n.rules
		if a.rep.Tables == nil {
			a.rep.Tables = map[string]int{}
		}
		a.rep.Tables[a.units[b.from].Table] += n.rules
	}
}

// text returns the text of blocks.
func (a *applying) text(run []block) *text {
	t := &text{}
	for _, bl := range run {
		t.blocks = append(t.blocks, a.units[bl.from:bl.to])
	}
	return t
}

// restore runs the program once. A text it refuses gives a failure; an error
// means that no text would do.
func (a *applying) restore(text io.Reader) (*failure, error) {
	t := &a.r.cfg.Tools
	name := Program(a.r.cfg.Flavour, a.r.cfg.Family, "restore")
	s := t.spec(name, "-w", t.waitArg(), "--noflush")
	s.Stdin = text
	s.Grace = commitGrace
	start := time.Now()
	res, err := exec.Run(a.ctx, s)
	a.rep.Runs++
	if strings.Contains(string(res.Stderr), "waiting") {
		a.rep.LockWait += time.Since(start)
	}
	if err == nil {
		return nil, nil
	}
	stderr := string(res.Stderr)
	var failed *exec.Error
	if !errors.As(err, &failed) || failed.Code <= 0 || a.hopeless(failed.Code, stderr) {
		return nil, err
	}
	return newFailure(stderr), nil
}

// hopeless reports a failure that does not lie in the text: the lock
// (RESOURCE_PROBLEM, 4, of xtables.h), permissions, missing kernel support.
func (a *applying) hopeless(code int, stderr string) bool {
	if strings.Contains(stderr, "Message too long") {
		return false
	}
	for _, sign := range []string{
		"Another app is currently holding the xtables lock",
		"Permission denied", "Operation not permitted", "you must be root",
		"Could not fetch rule set generation id", "can't initialize", "can't open lock file",
		"Failed to initialize nft",
	} {
		if strings.Contains(stderr, sign) {
			return true
		}
	}
	return code == 4 && !strings.Contains(stderr, "RULE_") && !strings.Contains(stderr, "CHAIN_") &&
		!strings.Contains(stderr, "line")
}
