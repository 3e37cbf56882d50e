package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// pathOf is the path of a packet, with one hop.
func pathOf(t conntrack.Tuple, flags uint8, seq, ack uint32) (*trace.Path, *trace.PacketHeader) {
	h := &trace.PacketHeader{Tuple: t, TCPFlags: flags, Seq: seq, Ack: ack}
	p := &trace.Path{Packet: h.Name(), Tuple: t, Hops: []trace.Hop{{
		Kind: trace.HopRule, Hook: "postrouting", Table: "nat", Chain: "KUBE-POSTROUTING", Verdict: "masquerade", Source: trace.NFTrace,
	}}}
	return p, h
}

const (
	flagSYN    = 2
	flagSYNACK = 18
)

func TestPathFindsItsFlow(t *testing.T) {
	for name, ended := range map[string]bool{"open": false, "ended and forgotten": true} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return true } })
			k := l.conn(foo, "10.9.0.2:40000", ep2)
			k.masq = true
			k.pick().new().synack()
			if ended {
				k.finIn().finOut()
				l.wait(time.Second)
				k.send(k.ct(trace.KindDestroy))
				l.wait(time.Second)
				if f := l.only(); !f.Ended {
					t.Fatalf("it has not ended: %+v", f)
				}
			}
			p, h := pathOf(k.orig(), flagSYN, k.isn, 0)
			if !l.c.Path(p, h) {
				t.Fatal("no flow for the SYN")
			}
			q, h := pathOf(k.reply(), flagSYNACK, 77, k.isn+1)
			if !l.c.Path(q, h) {
				t.Fatal("no flow for the SYN-ACK")
			}
			f := l.only()
			if len(f.Paths) != 2 || f.Paths[0].Number != 1 || f.Paths[1].Number != 2 || f.Paths[0].Reply || !f.Paths[1].Reply ||
				!f.Evidence.Has(trace.NFTrace) || f.Ended != ended {
				t.Errorf("flow %+v", f)
			}
			// What conntrack made of the source is known to the flow alone.
			if c := f.Paths[0].Hops[0].Changes; len(c) != 1 || c[0].After != "10.1.0.1:40000" {
				t.Errorf("masqueraded: %+v", c)
			}
			if len(p.Hops[0].Changes) != 0 {
				t.Error("the path handed over was changed")
			}
			for _, other := range []struct {
				tuple    conntrack.Tuple
				flags    uint8
				seq, ack uint32
			}{
				{k.orig(), flagSYN, k.isn + 1, 0}, // another connection on the tuple
				{k.reply(), flagSYNACK, 77, k.isn},
				{l.conn(foo, "10.9.0.3:40000", ep2).orig(), flagSYN, k.isn, 0},
			} {
				if p, h := pathOf(other.tuple, other.flags, other.seq, other.ack); l.c.Path(p, h) {
					t.Errorf("%+v found a flow", other)
				}
			}
		})
	}
}

func TestPathOfARefusal(t *testing.T) {
	l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return true } })
	k := l.conn(empty, "10.9.0.2:40000", ep2).refuse(trace.KindReject, "no-endpoints")
	p, h := pathOf(k.orig(), flagSYN, k.isn, 0)
	if !l.c.Path(p, h) || len(l.only().Paths) != 1 || l.only().Outcome != trace.Rejected {
		t.Errorf("flow %+v", l.only())
	}
}

// TestPathsAreNotWaitedForForever forgets ended flows after a while, and does not
// keep them at all where nobody traces.
func TestPathsAreNotWaitedForForever(t *testing.T) {
	tracing := true
	l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return tracing } })
	gone := func(src string, wait time.Duration) bool {
		k := l.conn(foo, src, ep2).pick().new().synack().finIn().finOut()
		l.wait(time.Second)
		k.send(k.ct(trace.KindDestroy))
		l.wait(wait)
		p, h := pathOf(k.orig(), flagSYN, k.isn, 0)
		return !l.c.Path(p, h)
	}
	if gone("10.9.0.2:40000", time.Second) {
		t.Error("forgotten at once")
	}
	if !gone("10.9.0.2:40001", 20*time.Second) {
		t.Error("kept for 20 seconds")
	}
	tracing = false
	if !gone("10.9.0.2:40002", time.Second) {
		t.Error("kept though nobody traces")
	}
}

// TestPathTellsTheEnd takes the reason of a failure from the path of the packet that
// was last sent, whether that is known before or after the failure.
func TestPathTellsTheEnd(t *testing.T) {
	rule := trace.Hop{Kind: trace.HopRule, Hook: "forward", Table: "filter", Chain: "FORWARD", Rule: 2, Text: "-p tcp -j DROP", Verdict: "drop"}
	policy := trace.Hop{Kind: trace.HopPolicy, Hook: "forward", Table: "filter", Chain: "FORWARD", Verdict: "drop"}
	kernel := func(why string) trace.Hop {
		return trace.Hop{Kind: trace.HopDrop, Text: why, Purpose: "the kernel gave it up in f, at eth0", Verdict: "drop", Source: trace.Drops}
	}
	ours := rule
	ours.Chain = "KUBE-FORWARD"
	passed := trace.Hop{Kind: trace.HopPolicy, Hook: "postrouting", Table: "nat", Chain: "POSTROUTING", Verdict: "accept"}
	for name, c := range map[string]struct {
		hops  []trace.Hop
		why   trace.Reason
		cause string
	}{
		"a rule":                 {[]trace.Hop{rule}, trace.DroppedByRule, "rule 2 of filter/FORWARD: -p tcp -j DROP"},
		"a rule, and the word":   {[]trace.Hop{rule, kernel("NETFILTER_DROP")}, trace.DroppedByRule, "rule 2 of filter/FORWARD: -p tcp -j DROP"},
		"a policy":               {[]trace.Hop{policy}, trace.PolicyDrop, "the policy of filter/FORWARD"},
		"the reverse path":       {[]trace.Hop{passed, kernel("IP_RPFILTER")}, trace.RPFilter, "the kernel gave it up in f, at eth0"},
		"no route":               {[]trace.Hop{passed, kernel("IP_INNOROUTES")}, trace.NoRoute, ""},
		"another word":           {[]trace.Hop{passed, kernel("NO_SOCKET")}, trace.DroppedOnNode, ""},
		"a rule of a kube-proxy": {[]trace.Hop{ours}, trace.DroppedOnNode, ""},
		"it left":                {[]trace.Hop{passed}, trace.DroppedOnNode, ""},
	} {
		for _, late := range []bool{false, true} {
			l := newLab(t, func(c *correlate.Config) { c.Paths = func() bool { return true } })
			k := l.conn(foo, "10.9.0.2:40000", ep2).pick()
			p, h := pathOf(k.orig(), flagSYN, k.isn, 0)
			p.Hops = c.hops
			if late {
				l.wait(10 * time.Second)
			}
			if !l.c.Path(p, h) {
				t.Fatalf("%s: no flow", name)
			}
			l.wait(10 * time.Second)
			if f := l.only(); f.Reason != c.why || c.cause != "" && f.Cause != c.cause {
				t.Errorf("%s, late %t: %s, %q; want %s, %q", name, late, f.Reason, f.Cause, c.why, c.cause)
			}
		}
	}
}
