package lab

import (
	"sync"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Collector gathers what Judge needs while a lab runs. The zero value is
// ready; its methods may be called from any goroutine.
type Collector struct {
	mu      sync.Mutex
	reports []Report
	flows   map[flowKey]*trace.Flow
	lost    map[string]uint64
}

type flowKey struct {
	node string
	id   trace.FlowID
}

// Report takes a client's report.
func (c *Collector) Report(r Report) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, r)
}

// Message takes what a node says to a follower of everything.
func (c *Collector) Message(m trace.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case m.Flow != nil:
		if c.flows == nil {
			c.flows = map[flowKey]*trace.Flow{}
		}
		k := flowKey{m.Flow.Node, m.Flow.ID}
		if old := c.flows[k]; old == nil || old.Revision <= m.Flow.Revision {
			c.flows[k] = m.Flow
		}
	case m.End != nil:
		if c.lost == nil {
			c.lost = map[string]uint64{}
		}
		for _, l := range m.End.Losses {
			c.lost[l.Source.String()] += l.Events
		}
	}
}

// Evidence returns what was gathered. Sources that lost nothing count too.
func (c *Collector) Evidence(cluster *Cluster, snap *proxy.Snapshot) Evidence {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := Evidence{
		Cluster: cluster, Snapshot: snap, Reports: append([]Report(nil), c.reports...),
		Lost: map[string]uint64{trace.NFLog.String(): 0, trace.Conntrack.String(): 0},
	}
	for source, n := range c.lost {
		e.Lost[source] += n
	}
	for _, f := range c.flows {
		e.Flows = append(e.Flows, f)
		for _, source := range f.Evidence.Names() {
			e.Lost[source] += 0
		}
	}
	return e
}
