package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestUntracked makes a flow of the path of a packet that a rule kept from connection
// tracking, and of no other path.
func TestUntracked(t *testing.T) {
	notrack := trace.Hop{Kind: trace.HopRule, Hook: "prerouting", Table: "raw", Chain: "PREROUTING", Rule: 2, Text: "-p tcp -j CT --notrack", Source: trace.NFTrace}
	native := trace.Hop{Kind: trace.HopRule, Hook: "prerouting", Table: "guard", Chain: "early", Rule: 1, Text: `tcp dport 80 notrack comment "x"`, Source: trace.NFTrace}
	said := trace.Hop{Kind: trace.HopRule, Hook: "prerouting", Table: "guard", Chain: "early", Rule: 1, Text: `tcp dport 80 accept comment "no notrack here"`, Source: trace.NFTrace}
	nat := trace.Hop{Kind: trace.HopPolicy, Hook: "prerouting", Table: "nat", Chain: "PREROUTING", Verdict: "accept", Source: trace.NFTrace}
	filter := trace.Hop{Kind: trace.HopPolicy, Hook: "forward", Table: "filter", Chain: "FORWARD", Verdict: "accept", Source: trace.NFTrace}
	client, other := ap("10.244.1.5:40000"), ap("10.96.0.77:80")
	to := func(dst string) conntrack.Tuple { return conntrack.NewTuple(conntrack.TCP, client, ap(dst)) }
	for _, c := range []struct {
		name  string
		tuple conntrack.Tuple
		flags uint8
		hops  []trace.Hop
		cause string
	}{
		{"raw", to(vips[foo]), flagSYN, []trace.Hop{notrack, filter}, "rule 2 of raw/PREROUTING: -p tcp -j CT --notrack"},
		{"nftables", to(vips[foo]), flagSYN, []trace.Hop{native, notrack}, `rule 1 of guard/early: tcp dport 80 notrack comment "x"`},
		{"no such rule", to(vips[foo]), flagSYN, []trace.Hop{said, filter}, ""},
		{"tracked before", to(vips[foo]), flagSYN, []trace.Hop{notrack, nat}, ""},
		{"no Service", to(other.String()), flagSYN, []trace.Hop{notrack}, ""},
		{"an answer", to(vips[foo]), flagSYNACK, []trace.Hop{notrack}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return true } })
			h := &trace.PacketHeader{Tuple: c.tuple, TCPFlags: c.flags, Seq: 1000}
			p := &trace.Path{Packet: h.Name(), Tuple: c.tuple, Hops: c.hops}
			if made := l.c.Untracked(p, h, l.now); made != (c.cause != "") {
				t.Fatalf("a flow of it: %t", made)
			}
			if c.cause == "" {
				if len(l.flows) != 0 {
					t.Errorf("flows %+v", l.flows)
				}
				return
			}
			f := l.only()
			if f.Outcome != trace.Unknown || f.Reason != trace.NotTracked || f.Cause != c.cause || f.Missing == "" || !f.Ended ||
				f.Service.Name != foo || f.Client.Pod != "web-1" || len(f.Paths) != 1 || f.Backend.Addr.IsValid() {
				t.Errorf("flow %+v", f)
			}
			// The SYN sent again is of the same connection.
			l.wait(time.Second)
			if !l.c.Path(p, h) || len(l.only().Paths) != 2 {
				t.Errorf("sent again: flow %+v", l.only())
			}
			l.wait(time.Minute)
			l.only()
		})
	}
}
