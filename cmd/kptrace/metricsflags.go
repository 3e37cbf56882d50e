package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kptrace/kptrace/exporters/prom"
)

// minEventsAfter is the least time after which a failure is one that persists.
const minEventsAfter = 3 * time.Second

// metricsFlags shape the metrics and Events about connections.
type metricsFlags struct {
	histograms  string
	classicOnly bool
	establish   []float64
	duration    []float64
	endpoints   int
	services    int
	clients     int
	clientAllow []string
	staleAfter  time.Duration
	checkEvery  time.Duration
	checkRules  int
	eventsAfter time.Duration
}

func (f *metricsFlags) add(cmd *cobra.Command) {
	scopes := []string{string(prom.HistogramsPerService), string(prom.HistogramsPerEndpoint), string(prom.HistogramsOff)}
	fl := cmd.Flags()
	fl.StringVar(&f.histograms, "metrics-histograms", scopes[0], "divide the latency histograms by service or endpoint, or off")
	fl.BoolVar(&f.classicOnly, "metrics-classic-histograms", false, "leave native histograms out of the latency histograms")
	fl.Var(&bounds{&f.establish}, "metrics-establish-buckets", "upper bounds in seconds of the time to establish, as 0.001,0.01,1")
	fl.Var(&bounds{&f.duration}, "metrics-duration-buckets", "upper bounds in seconds of the duration of connections")
	fl.IntVar(&f.endpoints, "metrics-max-endpoints", 50_000, "endpoints that have series of their own; what is over counts as other")
	fl.IntVar(&f.services, "metrics-max-services", 10_000, "Service ports that have series of their own")
	fl.IntVar(&f.clients, "metrics-clients", 0, "count connections by client, for this many of the most active ones")
	fl.StringSliceVar(&f.clientAllow, "metrics-client-allow", nil, "only for clients that match, as shop/*,10.1.2.3")
	fl.DurationVar(&f.staleAfter, "metrics-stale-after", 5*time.Minute, "drop an endpoint's series this long after it left its Service")
	fl.DurationVar(&f.checkEvery, "metrics-check-every", 5*time.Minute, "compare the kernel with what it should have this often, as kptrace check does; 0 is never")
	fl.IntVar(&f.checkRules, "metrics-check-max-rules", 10_000, "where the node has more rules, look at those of some Services each time, in turn, for a rule takes about 1 KB of memory; 0 is all at once")
	_ = cmd.RegisterFlagCompletionFunc("metrics-histograms", cobra.FixedCompletions(scopes, cobra.ShellCompDirectiveNoFileComp))
}

// addEvents adds the flag for whoever can write Events.
func (f *metricsFlags) addEvents(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&f.eventsAfter, "failure-events-after", 0, "record a Kubernetes Event at the Service and the pod once most connections have failed for this long, as 3m; 0 is never")
}

func (f *metricsFlags) config() (prom.FlowConfig, error) {
	c := prom.FlowConfig{
		Histograms: prom.HistogramScope(f.histograms), ClassicOnly: f.classicOnly,
		EstablishBuckets: f.establish, DurationBuckets: f.duration,
		MaxEndpoints: f.endpoints, MaxServices: f.services, StaleAfter: f.staleAfter,
		Clients: f.clients, ClientAllow: f.clientAllow,
	}
	for name, n := range map[string]int{"metrics-max-endpoints": f.endpoints, "metrics-max-services": f.services} {
		if n < 1 {
			return c, fmt.Errorf("--%s=%d: give a number above 0", name, n)
		}
	}
	if f.staleAfter <= 0 {
		return c, fmt.Errorf("--metrics-stale-after=%v: give a time above 0", f.staleAfter)
	}
	if len(f.clientAllow) > 0 && f.clients == 0 {
		return c, fmt.Errorf("--metrics-client-allow needs --metrics-clients: say how many at most")
	}
	if f.eventsAfter != 0 && f.eventsAfter < minEventsAfter {
		return c, fmt.Errorf("--failure-events-after=%v: give at least %v, or 0 for never", f.eventsAfter, minEventsAfter)
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("--metrics-*: %w", err)
	}
	return c, nil
}

// bounds is a flag whose value is a list of numbers; nothing means the default.
type bounds struct{ list *[]float64 }

var _ pflag.Value = (*bounds)(nil)

func (b *bounds) String() string { return "" }
func (b *bounds) Type() string   { return "seconds,..." }
func (b *bounds) Set(text string) error {
	list, err := parseBounds(text)
	*b.list = list
	return err
}

func parseBounds(text string) ([]float64, error) {
	var list []float64
	for _, word := range strings.Split(text, ",") {
		v, err := strconv.ParseFloat(strings.TrimSpace(word), 64)
		if err != nil {
			return nil, fmt.Errorf("%q is no number of seconds", word)
		}
		list = append(list, v)
	}
	return list, nil
}
