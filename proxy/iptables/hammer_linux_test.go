package iptables

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// try is one connection of a hammering client.
type try struct {
	to         netip.AddrPort
	start, end time.Time
	reply      proxytest.Reply
}

// hammer makes connections from a source to all addresses in turn until stop
// is closed, and tells each that has ended.
func hammer(t *testing.T, w *proxytest.World, s proxytest.Source, stop <-chan struct{}, told func(try), to ...netip.AddrPort) []try {
	var tries []try
	err := w.NS[s].Do(func() error {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return nil
			default:
			}
			c := try{to: to[i%len(to)], start: time.Now()}
			c.reply = proxytest.Dial(conntrack.TCP, c.to, 3*time.Second)
			c.end = time.Now()
			tries = append(tries, c)
			told(c)
			runtime.Gosched()
		}
	})
	if err != nil {
		t.Error(err)
	}
	return tries
}

// span is a time in which an outcome besides "answered" is right.
type span struct {
	to         netip.AddrPort
	outcome    string
	start, end time.Time
}

// TestTransitions changes Services while clients hammer them. Each connection
// must be answered by an endpoint of the time, or be refused cleanly while there
// is none; none may slip through untranslated or wait for an answer.
func TestTransitions(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			cfg := configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})
			cfg.Flavour, cfg.Tools.Netns = flavour, w.Node.Fd()
			b := New(cfg)
			vip, sticky := netip.MustParseAddrPort("10.96.9.1:80"), netip.MustParseAddrPort("10.96.9.2:80")
			nodePort := netip.AddrPortFrom(proxytest.NodeAddr, 30200)
			gone, other := netip.MustParseAddrPort("10.96.9.3:80"), netip.MustParseAddrPort("10.96.9.4:80")
			base := proxytest.Services(`
				t/web    tcp 10.96.9.1:80 nodeport=30200 a:8080 b:8080
				t/sticky tcp 10.96.9.2:80 affinity=3h a:8080 b:8080 c:8080
				t/gone   tcp 10.96.9.3:80 a:8080
				t/other  tcp 10.96.9.4:80 c:8080`)
			mustApply(t, b, base)

			stop := make(chan struct{})
			var wg sync.WaitGroup
			var mu sync.Mutex
			var tries []try
			met := newMeetings()
			for _, s := range []proxytest.Source{proxytest.FromPod, proxytest.FromOutside, proxytest.FromNode} {
				wg.Go(func() {
					got := hammer(t, w, s, stop, met.add, vip, gone, other, nodePort)
					mu.Lock()
					defer mu.Unlock()
					tries = append(tries, got...)
				})
			}
			// Each of these sticks to an endpoint of its own choice for ever.
			steady := map[proxytest.Source][]try{}
			for _, s := range []proxytest.Source{proxytest.FromElsewhere, proxytest.FromB} {
				wg.Go(func() {
					got := hammer(t, w, s, stop, func(try) {}, sticky)
					mu.Lock()
					defer mu.Unlock()
					steady[s] = got
				})
			}

			var spans []span
			apply := func(services string, allowed ...span) {
				time.Sleep(20 * time.Millisecond)
				start := time.Now()
				mustApply(t, b, proxytest.Services(services))
				for _, s := range allowed {
					s.start = start
					spans = append(spans, s)
				}
				if len(allowed) > 0 { // long enough for most clients to meet it
					time.Sleep(150 * time.Millisecond)
				}
				// One at least must: on a busy machine none may have run, and of a
				// refusal by ICMP the kernel sends a client six at once, then one a
				// second, so that it waits for its next SYN.
				for _, s := range allowed {
					met.await(t, s, start)
				}
			}
			done := func() { // the spans that are open end now
				for i := range spans {
					if spans[i].end.IsZero() {
						spans[i].end = time.Now()
					}
				}
			}
			rest := func(stickyEps string) string {
				return "\nt/sticky tcp 10.96.9.2:80 affinity=3h " + stickyEps + "\nt/gone tcp 10.96.9.3:80 a:8080\nt/other tcp 10.96.9.4:80 c:8080"
			}
			web := "t/web tcp 10.96.9.1:80 nodeport=30200 "
			for range 3 {
				apply(web + "a:8080 b:8080 c:8080" + rest("a:8080 b:8080 c:8080")) // added
				apply(web + "b:8080 c:8080" + rest("a:8080 b:8080 c:8080"))        // removed
				apply(web + "c:8080" + rest("a:8080 b:8080 c:8080 a:8443"))        // a fourth for sticky
				apply(web+rest("a:8080 b:8080 c:8080"),                            // the last one gone
					span{to: vip, outcome: "refused"}, span{to: nodePort, outcome: "refused"})
				apply(web + "a:8080" + rest("a:8080 b:8080 c:8080")) // the first one back
				done()
				apply(web + "affinity=60s a:8080 b:8080" + rest("a:8080 b:8080 c:8080")) // affinity on
				apply(web + "affinity=30s a:8080 c:8080" + rest("a:8080 b:8080 c:8080")) // and changed
				apply(web + "a:8080 b:8080" + rest("a:8080 b:8080 c:8080"))              // and off
				apply(web+"a:8080 b:8080\nt/sticky tcp 10.96.9.2:80 affinity=3h a:8080 b:8080 c:8080\nt/other tcp 10.96.9.4:80 c:8080",
					span{to: gone, outcome: "unreachable"}) // one Service deleted
				apply(web + "a:8080 b:8080" + rest("a:8080 b:8080 c:8080")) // and made again
				done()
			}
			close(stop)
			wg.Wait()
			judge(t, w, tries, spans)
			for s, tries := range steady {
				stuck := tries[0].reply.Endpoint
				for i, c := range tries {
					if c.reply.Err != nil || c.reply.Endpoint != stuck {
						t.Errorf("%s: connection %d of %d went to %s (%s), want always %s", s, i, len(tries), c.reply.Endpoint, c.reply.Outcome(), stuck)
						break
					}
				}
			}
			if len(tries) < 500 || len(steady[proxytest.FromB]) < 100 {
				t.Errorf("only %d and %d connections were made", len(tries), len(steady[proxytest.FromB]))
			}
			t.Logf("%d connections, %d and %d sticky", len(tries), len(steady[proxytest.FromB]), len(steady[proxytest.FromElsewhere]))
		})
	}
}

// meetings is when clients met an outcome last.
type meetings struct {
	mu   sync.Mutex // guards last
	last map[span]time.Time
}

func newMeetings() *meetings { return &meetings{last: map[span]time.Time{}} }

func (m *meetings) add(c try) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last[span{to: c.to, outcome: c.reply.Outcome()}] = c.end
}

// await waits until a client has met an outcome after a time.
func (m *meetings) await(t *testing.T, s span, start time.Time) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		m.mu.Lock()
		last := m.last[span{to: s.to, outcome: s.outcome}]
		m.mu.Unlock()
		if last.After(start) {
			return
		}
		if time.Now().After(end) {
			t.Errorf("no connection to %s was %s within 20 s", s.to, s.outcome)
			return
		}
	}
}

// judge holds every connection against the spans it overlaps.
func judge(t *testing.T, w *proxytest.World, tries []try, spans []span) {
	counts, bad := map[string]int{}, 0
	for _, c := range tries {
		outcome := c.reply.Outcome()
		counts[fmt.Sprintf("%s %s", c.to, outcome)]++
		right := outcome == "answered" || slices.ContainsFunc(spans, func(s span) bool {
			return s.to == c.to && s.outcome == outcome && c.start.Before(s.end) && c.end.After(s.start)
		})
		if !right {
			if bad++; bad <= 10 {
				t.Errorf("connection to %s at %s: %s (%v)", c.to, c.start.Format("05.000000"), outcome, c.reply.Err)
			}
		}
	}
	if bad > 0 {
		t.Errorf("%d of %d connections met a half-made Service", bad, len(tries))
	}
	for _, s := range spans {
		if counts[s.to.String()+" "+s.outcome] == 0 {
			t.Errorf("no connection to %s was %s: the test saw nothing", s.to, s.outcome)
		}
	}
	t.Log(counts)
}
