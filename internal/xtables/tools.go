package xtables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// Flavour is which of the two implementations in the kernel iptables talks to.
// Each has tables of its own, and a packet passes both.
type Flavour uint8

// The flavours.
const (
	NFT Flavour = iota
	Legacy
)

// String returns "nft" or "legacy", as it stands in the programs' names.
func (f Flavour) String() string {
	if f == Legacy {
		return "legacy"
	}
	return "nft"
}

// Other returns the other flavour.
func (f Flavour) Other() Flavour { return 1 - f }

// ParseFlavour reads what Flavour.String returns.
func ParseFlavour(s string) (Flavour, error) {
	switch s {
	case "nft":
		return NFT, nil
	case "legacy":
		return Legacy, nil
	}
	return 0, fmt.Errorf("xtables: flavour %q is neither nft nor legacy", s)
}

// EarlyTable is the name of the table that CopyEarly makes.
const EarlyTable = "kptrace-path"

// Tools runs the programs of iptables. The zero value runs those found in PATH
// and the administrator's folders, in our own network namespace.
type Tools struct {
	// Netns is a descriptor of the network namespace to run in; 0 means ours.
	Netns int
	// Env is added to the programs' environment, for instance
	// XTABLES_LOCKFILE=/path: legacy locks /run/xtables.lock, which an
	// ordinary user cannot write.
	Env []string
	// Wait is how long a program waits for the lock of legacy iptables, in
	// whole seconds; zero means five.
	Wait time.Duration
	// Dir is where the programs are, for tests; "" means PATH.
	Dir string
}

// LockFile is where the programs keep the lock of legacy tables, "" where they do
// by default.
func (t *Tools) LockFile() string {
	for _, e := range t.Env {
		if path, ok := strings.CutPrefix(e, "XTABLES_LOCKFILE="); ok {
			return path
		}
	}
	return os.Getenv("XTABLES_LOCKFILE")
}

// saveTimeout ends a save that hangs. One of 200,000 rules takes about 2 s.
const saveTimeout = 60 * time.Second

// commitGrace is how long a restore may go on when its context has ended: a
// commit must not be torn. The largest one measured took 3.4 s.
const commitGrace = 60 * time.Second

// Program returns the name of a program, such as "ip6tables-nft-restore" for
// the verb "restore", or "iptables-legacy" for "".
func Program(fl Flavour, fa Family, verb string) string {
	name := "iptables-"
	if fa == IPv6 {
		name = "ip6tables-"
	}
	name += fl.String()
	if verb != "" {
		name += "-" + verb
	}
	return name
}

func (t *Tools) path(name string) string {
	if t.Dir != "" {
		return t.Dir + "/" + name
	}
	return name
}

func (t *Tools) spec(name string, args ...string) exec.Spec {
	return exec.Spec{Path: t.path(name), Args: args, Env: t.Env, Netns: t.Netns, OwnGroup: true}
}

func (t *Tools) waitArg() string {
	wait := t.Wait
	if wait <= 0 {
		wait = 5 * time.Second
	}
	return fmt.Sprint(max(1, int(wait.Round(time.Second)/time.Second)))
}

// Version returns what "iptables-nft -V" prints, such as
// "iptables v1.8.9 (nf_tables)". The error wraps fs.ErrNotExist where the
// program is not installed.
func (t *Tools) Version(ctx context.Context, fl Flavour, fa Family) (string, error) {
	out, err := t.run(ctx, Program(fl, fa, ""), "-V")
	return strings.TrimSpace(out), err
}

func (t *Tools) run(ctx context.Context, name string, args ...string) (string, error) {
	res, err := exec.Run(ctx, t.spec(name, args...))
	if err != nil {
		return "", fmt.Errorf("xtables: running %s: %w", name, err)
	}
	return string(res.Stdout), nil
}

// NFTText lists a table of nf_tables with the handles of its rules and without counts and
// the elements of its sets, as nft prints it. family is nft's word, such as "inet".
func (t *Tools) NFTText(ctx context.Context, family, table string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	return t.run(ctx, "nft", "-a", "-s", "-t", "list", "table", family, table)
}

// NFTAll lists all tables of nf_tables without counts, as nft prints them.
func (t *Tools) NFTAll(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	return t.run(ctx, "nft", "-s", "list", "ruleset")
}

// Save reads one table, or all that exist if table is "". With counters, rules
// carry what the kernel counted. Running iptables-legacy-save can load modules:
// asking for a table creates it, asking for all reads only those that are there.
func (t *Tools) Save(ctx context.Context, fl Flavour, fa Family, table string, counters bool) (*Ruleset, error) {
	text, err := t.SaveText(ctx, fl, fa, table, counters)
	if err != nil {
		return nil, err
	}
	rs, err := Parse(fa, text)
	if err != nil {
		return nil, fmt.Errorf("xtables: reading %s: %w", Program(fl, fa, "save"), err)
	}
	return rs, nil
}

// Mentions reports whether any of the texts is in what SaveText would return,
// without holding it: it may be tens of megabytes.
func (t *Tools) Mentions(ctx context.Context, fl Flavour, fa Family, texts ...string) (bool, error) {
	m := mentions{}
	for _, text := range texts {
		m.texts = append(m.texts, []byte(text))
	}
	err := t.save(ctx, &m, fl, fa)
	return m.found, err
}

// mentions looks for texts in what is written to it.
type mentions struct {
	texts [][]byte
	tail  []byte // of what came before, for texts across two writes
	found bool
}

// Write implements io.Writer.
func (m *mentions) Write(b []byte) (int, error) {
	for _, text := range m.texts {
		edge := append(m.tail[:len(m.tail):len(m.tail)], b[:min(len(b), len(text))]...)
		m.found = m.found || bytes.Contains(b, text) || bytes.Contains(edge, text)
	}
	m.tail = append(m.tail, b...)
	longest := 0
	for _, text := range m.texts {
		longest = max(longest, len(text))
	}
	m.tail = append([]byte(nil), m.tail[max(0, len(m.tail)-longest):]...)
	return len(b), nil
}

// SaveText returns what Save would parse.
func (t *Tools) SaveText(ctx context.Context, fl Flavour, fa Family, table string, counters bool) (string, error) {
	var args []string
	if counters {
		args = append(args, "-c")
	}
	if table != "" {
		args = append(args, "-t", table)
	}
	var text strings.Builder
	err := t.save(ctx, &text, fl, fa, args...)
	return text.String(), err
}

func (t *Tools) save(ctx context.Context, to io.Writer, fl Flavour, fa Family, args ...string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, saveTimeout, errors.New("iptables-save takes too long"))
	defer cancel()
	s := t.spec(Program(fl, fa, "save"), args...)
	s.Grace = -1 // it only reads
	s.Stdout = to
	if _, err := exec.Run(ctx, s); err != nil {
		return fmt.Errorf("xtables: saving: %w", err)
	}
	return nil
}
