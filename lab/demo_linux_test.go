package lab

import (
	"context"
	"flag"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
	"github.com/kptrace/kptrace/trace"
)

// proxyRole plays `kptrace proxy` on a node.
func proxyRole(args []string) error {
	fl := flag.NewFlagSet("proxy", flag.ExitOnError)
	dir, name, socket := fl.String("manifests", "", ""), fl.String("node", "", ""), fl.String("socket", "", "")
	flavour := fl.String("iptables-flavour", "nft", "")
	_ = fl.Parse(args)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	return node.Run(ctx, node.Config{
		Name: *name, Version: "test", Socket: *socket, Logger: logger,
		Backend: iptables.New(iptables.Config{Flavour: *flavour, Trace: true, NFLogGroup: 100, MasqueradeMark: 0x4000}),
		State:   manifests.New(manifests.Config{Dir: *dir, Node: *name, Logger: logger}).Run,
		Trace:   true, NFLogGroup: 100, MasqueradeMark: 0x4000,
	})
}

// Every connection that the demo's clients make is shown once, with the
// endpoint that answered, the right affinity word and the right outcome, also
// while endpoints fail.
func TestDemoIsShown(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			var c Collector
			l, err := Start(t.Context(), Config{
				SocketDir: t.TempDir(), Report: c.Report, Output: t.Output(),
				ProxyArgs: []string{"--iptables-flavour", flavour},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(l.Close)
			ctx := within(t, 60*time.Second)
			if err := l.WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			following, end := context.WithCancel(ctx)
			ready, followed := make(chan struct{}), make(chan error, 1)
			go func() {
				followed <- l.Follow(following, func() { close(ready) }, func(m trace.Message) error { c.Message(m); return nil })
			}()
			<-ready
			incident(t, l)
			time.Sleep(1500 * time.Millisecond) // unanswered is a word for what is a second old
			end()
			if err := <-followed; err != nil {
				t.Fatal(err)
			}
			checkDemo(t, l, &c)
		})
	}
}

// incident lets traffic flow for some seconds while foo-1 is blackholed and
// healed, and foo-2 refuses.
func incident(t *testing.T, l *Lab) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	if err := l.StartTraffic(ctx); err != nil {
		t.Fatal(err)
	}
	for _, f := range [][2]string{{"", ""}, {FaultBlackhole, "shop/foo-1"}, {FaultHeal, "shop/foo-1"}, {FaultRefuse, "shop/foo-2"}} {
		if f[0] != "" {
			if err := l.Fault(ctx, f[0], f[1], 0); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Second)
	}
	if err := l.StopTraffic(ctx); err != nil {
		t.Fatal(err)
	}
}

func checkDemo(t *testing.T, l *Lab, c *Collector) {
	t.Helper()
	snap, err := manifests.New(manifests.Config{Dir: l.Dir(), Node: "node1"}).Load()
	if err != nil {
		t.Fatal(err)
	}
	s := Judge(c.Evidence(l.Cluster(), snap))
	if !s.OK() || s.Made < 50 {
		t.Errorf("of %d connections: %+v", s.Made, s)
		for _, d := range s.Details {
			t.Log(d)
		}
	}
	for source, n := range s.Lost {
		if n > 0 {
			t.Errorf("%s lost %d events", source, n)
		}
	}
	outcomes := func(service string) map[string]int {
		i := slices.IndexFunc(s.Services, func(v ServiceSummary) bool { return v.Name == service })
		if i < 0 {
			t.Errorf("%s is not in the summary", service)
			return nil
		}
		return s.Services[i].Outcomes
	}
	if o := outcomes("foo"); o[string(trace.Closed)] == 0 || o[string(trace.Refused)]+o[string(trace.Unanswered)] == 0 {
		t.Errorf("foo: %v, want good and bad ones", o)
	}
	if o := outcomes("empty"); o[string(trace.Rejected)] == 0 || len(o) != 1 {
		t.Errorf("empty: %v, want rejected ones only", o)
	}
	if o := outcomes("dns"); o[string(trace.Open)]+o[string(trace.Closed)] == 0 {
		t.Errorf("dns: %v", o)
	}
	for _, v := range s.Services {
		sum := 0.0
		for _, e := range v.Endpoints {
			sum += e.ExpectedShare
		}
		if len(v.Endpoints) > 0 && (sum < 0.999 || sum > 1.001) {
			t.Errorf("%s: expected shares add up to %v: %+v", v.Name, sum, v.Endpoints)
		}
	}
	t.Logf("%d connections compared", s.Made)
}
