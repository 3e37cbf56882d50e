package correlate_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestPathThroughRelay joins the client's packet, the userspace proxy and its own
// packet to one path, whenever each of them comes.
func TestPathThroughRelay(t *testing.T) {
	listener, upstream := ap("10.1.0.1:30000"), ap("10.1.0.1:51000")
	for name, ended := range map[string]bool{"open": false, "ended and forgotten": true} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return true } })
			l.views[0].Mode = proxy.Userspace
			k := l.conn(foo, "10.9.0.2:40000", ep1)
			tell := func(kind trace.EventKind, r trace.Relayed) {
				r.ID, r.Affinity = 5, trace.AffinityNone
				e := k.event(kind, k.orig())
				e.Source, e.TCPSeq, e.Relayed = trace.Userspace, 5, &r
				e.Reply = conntrack.NewTuple(conntrack.TCP, listener, k.src)
				e.Rule = &proxy.Rule{Service: foo, Endpoint: k.ep}
				k.send(e)
				l.pass(time.Millisecond)
			}
			leg := conntrack.NewTuple(conntrack.TCP, upstream, ep2)
			give := func(tuple conntrack.Tuple, flags uint8, seq, ack uint32) bool {
				p, h := pathOf(tuple, flags, seq, ack)
				return l.c.Path(p, h)
			}
			tell(trace.KindPick, trace.Relayed{})
			tell(trace.KindTryFailed, trace.Relayed{Failure: proxy.FailedRefused})
			if !ended && !give(k.orig(), flagSYN, 77, 0) {
				t.Fatal("no flow for the client's SYN")
			}
			k.ep = ep2
			tell(trace.KindPick, trace.Relayed{})
			tell(trace.KindConnected, trace.Relayed{Upstream: upstream})
			if ended {
				if give(leg, flagSYN, 88, 0) {
					t.Error("the proxy's packet was taken before the client's")
				}
				tell(trace.KindRelayEnd, trace.Relayed{End: proxy.EndedByClient})
				l.wait(5 * time.Second)
				if f := l.only(); !f.Ended {
					t.Fatalf("it has not ended: %+v", f)
				}
				if !give(k.orig(), flagSYN, 77, 0) {
					t.Fatal("no flow for the client's SYN")
				}
			}
			if !give(leg, flagSYN, 88, 0) || !give(leg.Reverse(), flagSYNACK, 99, 89) {
				t.Fatal("no flow for the proxy's own packets")
			}
			if !give(leg, flagSYN, 88, 0) {
				t.Error("no flow for the proxy's SYN sent again")
			}
			f := l.only()
			if len(f.Paths) != 2 || f.Paths[0].Reply || !f.Paths[1].Reply || f.Ended != ended {
				t.Fatalf("paths %+v", f.Paths)
			}
			var got []string
			for _, h := range f.Paths[0].Hops {
				got = append(got, string(h.Kind)+" "+h.Purpose)
			}
			want := "rule |userspace accepted at 10.1.0.1:30000|userspace pick one of 2: foo-a " + ep1.String() +
				"|userspace dial " + ep1.String() + ": refused after 1ms|userspace pick another: foo-b " + ep2.String() +
				"|userspace dial " + ep2.String() + ": established after 1ms|rule "
			if s := strings.Join(got, "|"); s != want {
				t.Errorf("hops\n%s\nwant\n%s", s, want)
			}
			if give(conntrack.NewTuple(conntrack.TCP, upstream, ep1), flagSYN, 88, 0) {
				t.Error("the packet of a try that failed found a flow")
			}
		})
	}
}
