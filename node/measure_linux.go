package node

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/health"
)

// measure makes the Syncer and those who look at it.
func (n *node) measure() {
	families, labels := []health.Family{health.IPv4}, []string{prom.IPv4}
	if b, ok := n.cfg.Backend.(interface{ IPv6() bool }); ok && b.IPv6() {
		families, labels = append(families, health.IPv6), append(labels, prom.IPv6)
	}
	n.metrics = prom.New(n.metricsConfig(labels))
	n.health = &health.Source{
		Stats: func() proxy.SyncStats { return n.syncer.Stats() }, Eligible: n.eligible,
		Timeout: 2 * n.cfg.SyncPeriod, Families: families,
	}
	n.ports = health.NewServers(health.ServersConfig{
		Healthy: n.health.Healthy, Addrs: n.healthAddrs(), Logger: n.cfg.Logger, Failed: n.teller.healthPort,
	})
	reconciled := n.cfg.Reconciled
	n.cfg.Reconciled = func(r conntrack.Reconciled) {
		n.metrics.Conntrack(prom.IPv4, r.Took, r.Deleted)
		if reconciled != nil {
			reconciled(r)
		}
	}
	views := 2 // for those who ask; the tracer, where there is one, looks further back
	if n.cfg.Trace {
		views = 0
	}
	n.syncer = proxy.NewSyncer(proxy.SyncerConfig{
		Backend: n.cfg.Backend, MinInterval: n.cfg.MinSyncPeriod, KeepViews: views, Logger: n.cfg.Logger, Observe: n.observe,
	})
}

// packetCounter reads an nfacct counter.
func packetCounter(name string) (uint64, bool) {
	packets, err := nfnl.Counter(name)
	return packets, err == nil
}

// healthAddrs are the addresses of Config.HealthPorts. Like kube-proxy, it looks
// once and takes all addresses where it finds none.
func (n *node) healthAddrs() []string {
	if len(n.cfg.HealthPorts) == 0 {
		return nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		n.cfg.Logger.Error("health ports are served at all addresses", "err", err)
		return nil
	}
	var addrs []string
	for _, a := range all {
		prefix, err := netip.ParsePrefix(a.String())
		if err == nil && slices.ContainsFunc(n.cfg.HealthPorts, func(p netip.Prefix) bool { return p.Contains(prefix.Addr()) }) {
			addrs = append(addrs, prefix.Addr().String())
		}
	}
	if len(addrs) == 0 {
		n.cfg.Logger.Error("health ports are served at all addresses: this node has none in the ranges for node ports", "ranges", n.cfg.HealthPorts)
	}
	return addrs
}

// observe follows each sync. Health ports open only once the kernel has the
// rules that lead to what they promise.
func (n *node) observe(v *proxy.View, r proxy.Report) {
	n.metrics.Observe(v, r)
	n.restored(r, v.Err != nil && !r.Partial)
	n.teller.problems(fromProgram, v.Program.Problems())
	if v.Err == nil || len(r.Refusals) > 0 {
		n.teller.problems(fromKernel, r.Refusals)
	}
	if (v.Err == nil || r.Partial) && n.follows() == nil {
		n.ports.Set(v.Snapshot)
	}
}

// eligible reports whether load balancers should send traffic to this node.
func (n *node) eligible() bool {
	v := n.syncer.View()
	return v == nil || v.Snapshot.Node.Leaving == ""
}

// serve adds the HTTP servers to g.
func (n *node) serve(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return n.ports.Run(ctx) })
	n.countFlows(ctx, g)
	n.tellFailures(ctx, g)
	g.Go(func() error {
		n.checkOften(ctx)
		return nil
	})
	c := n.cfg.HTTP
	if c.Healthz != "" {
		g.Go(func() error {
			return n.serveHTTP(ctx, whatHealthz, c.Healthz, n.health.Mux(n.metrics.Healthz, n.metrics.Livez))
		})
	}
	if c.Metrics != "" {
		s := metricsServer{
			HTTPConfig: c, mode: string(n.cfg.Backend.Mode()), version: n.cfg.Version, started: n.started,
			metrics: n.metrics.Handler(), slis: n.metrics.SLIs(), checked: n.metrics.Checked,
		}
		g.Go(func() error {
			return n.serveHTTP(ctx, whatMetrics, c.Metrics, s.mux())
		})
	}
}

// serveHTTP answers at addr until ctx ends.
func (n *node) serveHTTP(ctx context.Context, what, addr string, h http.Handler) error {
	s := server{
		what: what, addr: addr, handler: h, logger: n.cfg.Logger, hardFail: n.cfg.HTTP.HardFail, again: bindAgain,
		failed: func(err error) { n.teller.notServing(what, err) },
	}
	return s.run(ctx)
}

// bindAgain is the wait before an address that could not be bound is tried
// again, as in kube-proxy.
const bindAgain = 5 * time.Second
