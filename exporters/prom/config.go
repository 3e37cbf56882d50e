package prom

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// The values of the label ip_family.
const (
	IPv4 = "IPv4"
	IPv6 = "IPv6"
)

// Config says where the values come from. A func that is nil leaves its
// metrics out.
type Config struct {
	// Version is kptrace's own.
	Version string
	// Families are the address families the proxy programs: IPv4, IPv6 or
	// both.
	Families []string
	// Beside leaves out kube-proxy's own metrics, for another proxy runs here and
	// has them.
	Beside bool
	// Mode is the mode in use, Wanted the one that was asked for.
	Mode, Wanted proxy.Mode
	// Sync says what the Syncer has done.
	Sync func() proxy.SyncStats
	// Packets reads a kernel packet counter by its nfacct name. It reports
	// false where the kernel has none; the metric is then absent, as
	// kube-proxy's is. Nil means it always does.
	Packets func(name string) (uint64, bool)
	// Started is when the process started: changes that happened before are
	// not its to measure.
	Started time.Time

	// Untraced says that nobody sees connections: the metrics about them, and
	// of the Services that they would be to, are left out.
	Untraced bool
	// Flows shapes what is made of connections.
	Flows FlowConfig
	// View is the generation of intent that the kernel holds, nil before the
	// first: from it come the endpoints there are, and their expected shares.
	View func() *proxy.View
	// Find returns the newest revision of a Flow, if it is still kept. It is
	// asked when updates were overrun.
	Find func(trace.FlowID) (*trace.Flow, bool)
	// Exemplar says whether the trace of a Flow is exported: only then is its
	// id an exemplar of the latency histograms. Nil is never.
	Exemplar func(*trace.Flow) bool

	// Conntrack reads the state of the connection tracking table.
	Conntrack func() (conntrack.Stats, error)
	// Tracer says what the tracer has done.
	Tracer func() Tracer
	// Drift says what others did to our rules.
	Drift func() proxy.DriftStats
	// Recent lists how full the affinity lists of xt_recent are.
	Recent func() []RecentList
	// IPVS lists the virtual servers of the kernel.
	IPVS func() []trace.VirtualServer
	// Findings lists what a check of the kernel against the desired state
	// found last.
	Findings func() []Finding
	// EndpointHealth says what checking endpoints found; false where nobody
	// checks.
	EndpointHealth func() (EndpointHealth, bool)
	// Counters adds metrics of other exporters.
	Counters []func() []Counter
}

// HistogramScope says how finely the latency histograms are divided.
type HistogramScope string

// The scopes. Each step multiplies the series.
const (
	HistogramsOff         HistogramScope = "off"
	HistogramsPerService  HistogramScope = "service"
	HistogramsPerEndpoint HistogramScope = "endpoint"
)

// FlowConfig shapes the metrics of connections. Zero values mean the defaults.
type FlowConfig struct {
	// MaxEndpoints bounds the endpoints that have series of their own, 50,000.
	// What is over counts for the endpoint "other" of its Service, and
	// MaxServices, 10,000, for a Service "other" without a namespace.
	MaxEndpoints, MaxServices int
	// StaleAfter is how long the series of an endpoint stay after it left the
	// Service: 5 min, so that the last values are scraped. They stay as long
	// as it has open connections.
	StaleAfter time.Duration
	// Histograms is how finely time to establish and duration are divided; by
	// Service if empty.
	Histograms HistogramScope
	// ClassicOnly leaves native histograms out.
	ClassicOnly bool
	// EstablishBuckets and DurationBuckets are upper bounds in seconds.
	EstablishBuckets, DurationBuckets []float64
	// Clients is how many clients are counted by name; 0 is none. The least
	// active makes room for a new one and counts as "other" from then on.
	Clients int
	// ClientAllow limits these to clients whose "namespace/pod", or address
	// without a pod, matches one of the patterns of path.Match.
	ClientAllow []string
}

// establishBuckets suit a network in which a SYN is sent again after 1, 3 and
// 7 s: what waited for one is apart from what did not.
func establishBuckets() []float64 {
	return []float64{.00025, .0005, .001, .0025, .005, .01, .025, .1, .25, .75, 1.5, 4}
}

func durationBuckets() []float64 {
	return []float64{.001, .005, .025, .1, .5, 1, 5, 15, 60, 300, 1800, 7200}
}

func (c *FlowConfig) setDefaults() {
	c.MaxEndpoints = cmp.Or(c.MaxEndpoints, 50_000)
	c.MaxServices = cmp.Or(c.MaxServices, 10_000)
	c.StaleAfter = cmp.Or(c.StaleAfter, 5*time.Minute)
	c.Histograms = cmp.Or(c.Histograms, HistogramsPerService)
	if c.EstablishBuckets == nil {
		c.EstablishBuckets = establishBuckets()
	}
	if c.DurationBuckets == nil {
		c.DurationBuckets = durationBuckets()
	}
}

// Validate says what is wrong with c, by the names of its fields.
func (c *FlowConfig) Validate() error {
	for name, list := range map[string][]float64{"EstablishBuckets": c.EstablishBuckets, "DurationBuckets": c.DurationBuckets} {
		if !slices.IsSorted(list) || len(slices.Compact(slices.Clone(list))) != len(list) {
			return fmt.Errorf("prom: %s %v: give rising upper bounds in seconds", name, list)
		}
		if len(list) > 0 && list[0] <= 0 {
			return fmt.Errorf("prom: %s %v: give bounds above 0", name, list)
		}
	}
	switch c.Histograms {
	case "", HistogramsOff, HistogramsPerService, HistogramsPerEndpoint:
	default:
		return fmt.Errorf("prom: Histograms %q: use off, service or endpoint", c.Histograms)
	}
	if c.MaxEndpoints < 0 || c.MaxServices < 0 || c.Clients < 0 || c.StaleAfter < 0 {
		return fmt.Errorf("prom: a bound is below 0")
	}
	for _, p := range c.ClientAllow {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("prom: ClientAllow %q: %w", p, err)
		}
	}
	return nil
}
