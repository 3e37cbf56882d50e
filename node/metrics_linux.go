package node

import (
	"bytes"
	"context"
	"errors"
	"hash/fnv"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/events"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/internal/recent"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
)

const (
	// recentEvery is how often the affinity lists are read at most, and
	// recentMost how many: one file each.
	recentEvery = 15 * time.Second
	recentMost  = 2000
)

// metricsConfig says where the metrics' values come from.
func (n *node) metricsConfig(families []string) prom.Config {
	c := prom.Config{
		Version: n.cfg.Version, Families: families,
		Mode: n.cfg.Backend.Mode(), Wanted: n.cfg.Wanted,
		Sync: func() proxy.SyncStats { return n.syncer.Stats() }, Started: n.started,
		Flows: n.cfg.Metrics, Untraced: !n.cfg.Trace, View: n.view,
		Packets: packetCounter, Conntrack: new(tableStats).read, Recent: (&recentLists{view: n.view}).read,
		EndpointHealth: n.endpointHealth,
	}
	if n.cfg.CheckEvery > 0 {
		c.Findings = n.findings.get
	}
	c.Beside = n.follows() != nil
	if w, ok := n.cfg.Backend.(proxy.Watcher); ok {
		c.Drift = w.DriftStats
	}
	if r, ok := n.cfg.Backend.(proxy.Relay); ok {
		c.Counters = append(c.Counters, func() []prom.Counter { return relayCounters(r.RelayStats()) })
	}
	if r, ok := n.cfg.rerouter(); ok {
		c.Counters = append(c.Counters, func() []prom.Counter { return rerouteCounters(r.RerouteStats()) })
	}
	if n.cfg.Trace {
		c.Tracer = func() prom.Tracer { return n.tracer.metrics() }
		c.Exemplar, c.Counters = n.spans.keep, append(c.Counters, n.exportCounters)
		c.IPVS = func() []trace.VirtualServer { return n.tracer.virtualServers() }
		c.Find = func(id trace.FlowID) (*trace.Flow, bool) { return n.tracer.history.Get(id) }
	}
	return c
}

// countFlows feeds the metrics about connections until ctx ends, if anybody
// can scrape them. A fault there costs the metrics a moment, and nobody else.
func (n *node) countFlows(ctx context.Context, g *errgroup.Group) {
	if n.tracer == nil || n.cfg.HTTP.Metrics == "" {
		return
	}
	reader := n.tracer.ring.NewReader()
	g.Go(func() error {
		defer reader.Close()
		for ctx.Err() == nil {
			err := guard(func() error { return n.metrics.Run(ctx, reader) })()
			if ctx.Err() != nil {
				break
			}
			n.cfg.Logger.Error("connections are not counted; trying again", "in", upkeepAgain, "err", err)
			pause(ctx, upkeepAgain)
		}
		return nil
	})
}

// findings is what the last checks found, by code and severity.
type findings struct {
	mu   sync.Mutex
	list []prom.Finding
	// parts has what was found where the last time, by part.
	parts []map[finding]bool
}

// finding is a finding without its words.
type finding struct {
	code, severity, object string
}

func (f *findings) get() []prom.Finding {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.list
}

// set takes what was found in one of some parts of the rules. What is no part's is
// found in each, and counts once.
func (f *findings) set(part, parts int, all []check.Finding) {
	found := map[finding]bool{}
	for _, x := range all {
		found[finding{x.Code, string(x.Severity), x.Object}] = true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.parts) != parts {
		f.parts = make([]map[finding]bool, parts)
	}
	f.parts[part] = found
	f.forget(found)
	counts, seen := map[prom.Finding]int{}, map[finding]bool{}
	for _, p := range f.parts {
		for x := range p {
			if !seen[x] {
				seen[x] = true
				counts[prom.Finding{Code: x.code, Severity: x.severity}]++
			}
		}
	}
	before := f.list
	f.list = nil
	for key, n := range counts {
		key.Count = n
		f.list = append(f.list, key)
	}
	// What was found once stays as a zero, so that it is seen to be over.
	for _, old := range before {
		key := prom.Finding{Code: old.Code, Severity: old.Severity}
		if counts[key] == 0 {
			f.list = append(f.list, key)
		}
	}
}

// forget takes out what was found in several parts, so is no part's, and not in the
// newest one, so is over.
func (f *findings) forget(newest map[finding]bool) {
	in := map[finding]int{}
	for _, p := range f.parts {
		for x := range p {
			in[x]++
		}
	}
	for x, n := range in {
		if n > 1 && !newest[x] {
			for _, p := range f.parts {
				delete(p, x)
			}
		}
	}
}

// checkOften holds the kernel against what it should have, for the metrics,
// until ctx ends: where there are many rules those of some Services at a time.
func (n *node) checkOften(ctx context.Context) {
	if n.cfg.CheckEvery <= 0 || n.cfg.HTTP.Metrics == "" {
		return
	}
	wait := min(n.cfg.CheckEvery, 30*time.Second) // the first look comes soon
	for part := 0; ; part++ {
		pause(ctx, wait)
		if ctx.Err() != nil {
			return
		}
		wait = n.cfg.CheckEvery
		parts := 1
		var in func(service string) bool
		if most := n.cfg.CheckMaxRules; most > 0 {
			parts = max(1, (n.rules()+most-1)/most)
		}
		if part %= parts; parts > 1 {
			in = func(service string) bool { return partOfService(service, parts) == part }
		}
		err := guard(func() error {
			s, err := n.inspect(ctx, in)
			if err == nil {
				n.findings.set(part, parts, check.Run(s, check.Options{}))
			}
			return err
		})()
		if err != nil && ctx.Err() == nil {
			n.cfg.Logger.Warn("the kernel was not checked", "err", err)
		}
	}
}

// partOfService says in which of some parts a Service is checked.
func partOfService(service string, parts int) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(service)) // never fails
	return int(h.Sum32() % uint32(parts))
}

// rules is how many rules the Program in force has, 0 where that is not known.
func (n *node) rules() int {
	v := n.view()
	if v == nil {
		return 0
	}
	c, ok := v.Program.(interface{ RuleCounts() map[proxy.Table]int })
	if !ok {
		return 0
	}
	sum := 0
	for _, rules := range c.RuleCounts() {
		sum += rules
	}
	return sum
}

// tellFailures has owners told of failures that persist, until ctx ends.
func (n *node) tellFailures(ctx context.Context, g *errgroup.Group) {
	if n.tracer == nil || n.cfg.Events == nil || n.cfg.FailureEventsAfter <= 0 {
		return
	}
	const windows = 3
	reader := n.tracer.ring.NewReader()
	g.Go(func() error {
		defer reader.Close()
		for ctx.Err() == nil {
			e := events.New(events.Config{Record: n.cfg.Events, Windows: windows, Window: n.cfg.FailureEventsAfter / windows})
			err := guard(func() error { return e.Run(ctx, reader) })()
			if ctx.Err() != nil {
				break
			}
			n.cfg.Logger.Error("owners are not told of failures; trying again", "in", upkeepAgain, "err", err)
			pause(ctx, upkeepAgain)
		}
		return nil
	})
}

// metrics is what the tracer has done so far.
func (t *tracer) metrics() prom.Tracer {
	m := prom.Tracer{
		Losses: t.losses.all(), Queue: len(t.queue), QueueLimit: cap(t.queue), Limit: maxFlows,
		Correlating: time.Duration(t.correlating.Load()), Restarts: t.restarts.Load(),
		Ring: t.ring.Stats(), History: t.history.Stats(),
	}
	live := t.live.Load()
	if live == nil {
		return m
	}
	for _, src := range live.sources {
		s := prom.Source{SourceStats: src.Stats()}
		if int(s.Source) < len(t.decoding) {
			s.Decoding = time.Duration(t.decoding[s.Source].Load())
		}
		m.Sources = append(m.Sources, s)
	}
	st := live.stats()
	m.Updates, m.Flows, m.Evicted = st.Emitted, st.Flows, st.Evicted
	m.Open, m.Ended = st.Open, st.Ended
	return m
}

// tableStats asks the kernel about the connection tracking table, over a
// socket that is opened when first needed.
type tableStats struct {
	mu    sync.Mutex
	table *conntrack.Conn
}

func (t *tableStats) read() (conntrack.Stats, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.table == nil {
		table, err := conntrack.Open(conntrack.Config{})
		if err != nil {
			return conntrack.Stats{}, err
		}
		t.table = table
	}
	s, err := t.table.Stats()
	if err != nil {
		_ = t.table.Close()
		t.table = nil
	}
	return s, err
}

// recentLists reads the lists in which xt_recent keeps the clients of
// endpoints of Services with session affinity.
type recentLists struct {
	view func() *proxy.View

	mu    sync.Mutex
	of    *proxy.View
	rules []*proxy.Rule
	lists []prom.RecentList
	at    time.Time
}

func (r *recentLists) read() []prom.RecentList {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.view()
	if v == nil || v.Program == nil || v.Mode != proxy.IPTables {
		return nil
	}
	if v == r.of && time.Since(r.at) < recentEvery {
		return r.lists
	}
	if v != r.of {
		r.of, r.rules = v, affinityRules(v)
	}
	limit := recent.Limit()
	r.lists, r.at = nil, time.Now()
	for _, rule := range r.rules {
		text, err := os.ReadFile("/proc/thread-self/net/xt_recent/" + rule.Chain)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return r.lists
		}
		r.lists = append(r.lists, prom.RecentList{
			Service: rule.Service, Endpoint: rule.Endpoint, Entries: bytes.Count(text, []byte("\n")), Limit: limit,
		})
	}
	return r.lists
}

// affinityRules lists the rules that pick an endpoint of a Service with
// affinity: their chains have the names of the lists.
func affinityRules(v *proxy.View) []*proxy.Rule {
	sticky := map[proxy.PortName]bool{}
	for i := range v.Snapshot.Services {
		if s := &v.Snapshot.Services[i]; s.Affinity > 0 {
			sticky[s.Name] = true
		}
	}
	var rules []*proxy.Rule
	if len(sticky) == 0 {
		return rules
	}
	for _, rule := range v.Program.Index() {
		if rule.Tag.Kind == proxy.TagPick && sticky[rule.Service] && rule.Endpoint.IsValid() {
			rules = append(rules, rule)
		}
	}
	slices.SortFunc(rules, func(a, b *proxy.Rule) int {
		if c := a.Service.Compare(b.Service); c != 0 {
			return c
		}
		return a.Endpoint.Compare(b.Endpoint)
	})
	return rules[:min(len(rules), recentMost)]
}
