package lab

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// CompareScenario is the scenario of comparisons.
const CompareScenario = "compare"

// FaultNone is a Case without a fault.
const FaultNone = "none"

// Case is one row of a comparison: what is measured.
type Case struct {
	Mode  proxy.Mode
	Fault string // of one pod in three: FaultNone, FaultRefuse or FaultBlackhole
	// Reroute is how long a connection may go unanswered before it is sent
	// elsewhere; zero never does that.
	Reroute time.Duration
}

// RerouteAfter is what Cases with rerouting use: the SYN that a client sends
// again after a second then finds its way.
const RerouteAfter = 500 * time.Millisecond

// Cases lists what of the modes is compared.
func Cases(modes []proxy.Mode) []Case {
	var out []Case
	for _, m := range modes {
		for _, fault := range []string{FaultNone, FaultRefuse, FaultBlackhole} {
			out = append(out, Case{Mode: m, Fault: fault})
		}
		if m == proxy.IPTables {
			out = append(out, Case{Mode: m, Fault: FaultBlackhole, Reroute: RerouteAfter})
		}
	}
	return out
}

// Load is a client that connects to Target, sends a request, waits for the answer
// and the end.
type Load struct {
	Target netip.AddrPort
	// Conns ends it after so many connections, Duration after that time.
	Conns    int
	Duration time.Duration
	// Concurrency is how many may be open at once, Rate how many begin in a
	// second, zero as many as can be; Patience is how long each may take.
	Concurrency int
	Rate        float64
	Patience    time.Duration
}

// LoadResult is what a Load came to: connections that were answered and that
// were not.
type LoadResult struct {
	Done, Failed int
	PerSecond    float64
}

// CompareConfig says how to measure a Case.
type CompareConfig struct {
	// Lab is the lab without a scenario; ProxyArgs must not name a mode.
	Lab Config
	// Load makes connections from the calling thread's network namespace.
	Load func(context.Context, Load) (LoadResult, error)
	// Connections are made at Rate a second. Fast is how long connections are
	// made as fast as can be, Bulk how many bytes are moved.
	Connections int
	Rate        float64
	Fast        time.Duration
	Bulk        int64
	// SystemCalls counts them, which must be possible.
	SystemCalls bool
	// Patience is how long a client waits for an answer.
	Patience time.Duration
	// Ready is how long the node may take to be ready.
	Ready time.Duration
}

// Comparison is what a comparison comes to. Its JSON names are API.
type Comparison struct {
	Kernel string     `json:"kernel"`
	CPUs   int        `json:"cpus"`
	Modes  []ModeCase `json:"modes"`
	// NoSystemCalls says why system calls were not counted, if they were not.
	NoSystemCalls string `json:"noSystemCalls,omitempty"`
}

// ModeCase is what one Case came to.
type ModeCase struct {
	Mode    proxy.Mode `json:"mode"`
	Fault   string     `json:"fault"`
	Reroute bool       `json:"reroute"`
	// Connections were made at an even rate; Failed got no answer, as their
	// client saw it, Retried tried more than one pod, as the node saw it.
	Connections int `json:"connections"`
	Failed      int `json:"failed"`
	Retried     int `json:"retried"`
	// EstablishedMs is the time to establish as the node saw it: in userspace
	// mode until a pod answered.
	EstablishedMs *Percentiles `json:"establishedMs"`
	// ConnectionsPerSecond is how many 32 clients at once got answered when
	// they connected as fast as they could.
	ConnectionsPerSecond float64     `json:"connectionsPerSecond"`
	Shares               []ModeShare `json:"shares"`
	// SyncMs is the first sync of the rules.
	SyncMs float64 `json:"syncMs"`
	// CPUSeconds and ContextSwitchesPerConnection are of all processes of the
	// lab while it connected as fast as it could, clients and pods included.
	CPUSeconds                   float64 `json:"cpuSeconds"`
	ContextSwitchesPerConnection float64 `json:"contextSwitchesPerConnection"`
	// SystemCallsPerConnection is of the same processes in another, shorter
	// such run, for counting slows them; nil where they cannot be counted.
	SystemCallsPerConnection *float64 `json:"systemCallsPerConnection,omitempty"`
	// Of one bulk transfer, for FaultNone; zero else.
	MBPerSecond          float64  `json:"mbPerSecond,omitempty"`
	ContextSwitchesPerMB float64  `json:"contextSwitchesPerMB,omitempty"`
	SystemCallsPerMB     *float64 `json:"systemCallsPerMB,omitempty"`

	// fast is how many connections the CPU was used for.
	fast int
}

// ModeShare is the part of the connections that a pod got.
type ModeShare struct {
	Pod           string  `json:"pod"`
	Share         float64 `json:"share"`
	ExpectedShare float64 `json:"expectedShare"`
}

// WriteText writes the comparison as a table.
func (c *Comparison) WriteText(w io.Writer) error {
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "MODE\tONE POD IN THREE\tCONNECTIONS\tFAILED\tRETRIED\tESTABLISHED p50 / p99\tCONN/S\tSHARES (EXPECTED)\tSYNC\tCPU/1000 CONN\tCTX SW/CONN\tSYSCALLS/CONN\tMB/S\tCTX SW/MB\tSYSCALLS/MB")
	for i := range c.Modes {
		m := &c.Modes[i]
		mode, fault := string(m.Mode), map[string]string{FaultNone: "is well", FaultRefuse: "refuses", FaultBlackhole: "is silent"}[m.Fault]
		if m.Reroute {
			mode += " + reroute"
		}
		took := "–"
		if p := m.EstablishedMs; p != nil {
			took = fmt.Sprintf("%.2f / %.2f ms", p.P50, p.P99)
		}
		var shares []string
		for _, s := range m.Shares {
			shares = append(shares, fmt.Sprintf("%.0f (%.0f)", 100*s.Share, 100*s.ExpectedShare))
		}
		cpu, bulk, perMB := "–", "–", "–"
		if m.fast > 0 {
			cpu = fmt.Sprintf("%.0f ms", 1e6*m.CPUSeconds/float64(m.fast))
		}
		if m.MBPerSecond > 0 {
			bulk, perMB = fmt.Sprintf("%.0f", m.MBPerSecond), fmt.Sprintf("%.1f", m.ContextSwitchesPerMB)
		}
		fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%d\t%s\t%.0f\t%s %%\t%.0f ms\t%s\t%.1f\t%s\t%s\t%s\t%s\n", mode, cmp.Or(fault, m.Fault), m.Connections, m.Failed, m.Retried,
			took, m.ConnectionsPerSecond, strings.Join(shares, " "), m.SyncMs, cpu, m.ContextSwitchesPerConnection, counted(m.SystemCallsPerConnection), bulk, perMB, counted(m.SystemCallsPerMB))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "\nkernel %s, %d CPUs\n%s", c.Kernel, c.CPUs, c.remarks())
	return err
}

// remarks says what does not mean what it seems to.
func (c *Comparison) remarks() string {
	var b strings.Builder
	if c.NoSystemCalls != "" {
		fmt.Fprintf(&b, "system calls were not counted: %s\n", c.NoSystemCalls)
	}
	for i := range c.Modes {
		m := &c.Modes[i]
		if m.Fault != FaultNone {
			continue
		}
		if m.Retried > 0 {
			fmt.Fprintf(&b, "%s retried %d connections with all pods well: this kernel is too busy or too slow for the first dial limit of 250 ms\n", m.Mode, m.Retried)
		}
		if m.Failed > 0 {
			fmt.Fprintf(&b, "%s failed %d connections with all pods well: they took longer than the client's patience, so its figures are of an overload\n", m.Mode, m.Failed)
		}
	}
	return b.String()
}

// counted prints what may not have been counted.
func counted(n *float64) string {
	if n == nil {
		return "–"
	}
	return fmt.Sprintf("%.1f", *n)
}

// syncLog finds how long syncs took in what a node's proxy logs.
type syncLog struct {
	took []time.Duration
	rest []byte
}

var syncTook = regexp.MustCompile(`msg="sync: done" took=(\S+)`)

// Write reads whole lines.
func (s *syncLog) Write(b []byte) (int, error) {
	s.rest = append(s.rest, b...)
	for {
		i := strings.IndexByte(string(s.rest), '\n')
		if i < 0 {
			return len(b), nil
		}
		if m := syncTook.FindSubmatch(s.rest[:i]); m != nil {
			if d, err := time.ParseDuration(string(m[1])); err == nil {
				s.took = append(s.took, d)
			}
		}
		s.rest = s.rest[i+1:]
	}
}

func (s *syncLog) first() time.Duration {
	if len(s.took) == 0 {
		return 0
	}
	return s.took[0]
}
