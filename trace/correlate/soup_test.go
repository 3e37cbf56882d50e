package correlate_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestSoup hands over events that make no sense together. Nothing may break,
// and in the end nothing may be left.
func TestSoup(t *testing.T) {
	for seed := range uint64(25) {
		r := rand.New(rand.NewPCG(seed, 3))
		l := newLab(t, func(c *correlate.Config) { c.MaxFlows, c.MaxAffinity = 12, 5 })
		for range 4000 {
			service := []proxy.PortName{foo, sticky, dns, sctp, empty}[r.IntN(5)]
			k := l.conn(service, fmt.Sprintf("10.%d.1.5:%d", 244+r.IntN(2), 1+r.IntN(4)), []netip.AddrPort{ep1, ep2, ep3}[r.IntN(3)])
			k.masq, k.local = r.IntN(3) == 0, r.IntN(4) == 0
			k.isn, k.ctid = uint32(r.IntN(2)), uint32(r.IntN(2))
			with := []func(*trace.Event){state(conntrack.TCPState(r.IntN(10))), packets(uint64(r.IntN(3)), uint64(r.IntN(3)))}
			if r.IntN(2) == 0 {
				with = append(with, answered)
			}
			if r.IntN(2) == 0 {
				with = append(with, early)
			}
			l.canAsk = r.IntN(2) == 0
			switch trace.EventKind(r.IntN(int(trace.KindGone) + 3)) {
			case trace.KindPick:
				k.pick()
			case trace.KindMiss:
				k.miss()
			case trace.KindReject:
				k.refuse(trace.KindReject, "no-endpoints")
			case trace.KindDrop:
				k.refuse(trace.KindDrop, "no-local-endpoints")
			case trace.KindSyn:
				k.syn()
			case trace.KindSynAck:
				k.synack()
			case trace.KindFin:
				k.finOut().finIn()
			case trace.KindRst:
				k.rstIn().rstOut()
			case trace.KindICMP:
				k.icmp(uint8(r.IntN(13)), uint8(r.IntN(14)))
			case trace.KindReply:
				k.answer()
			case trace.KindNew:
				k.new()
			case trace.KindDestroy:
				k.destroy(with...)
			case trace.KindEntry:
				k.entry(with...)
			case trace.KindGone:
				k.gone()
			case trace.KindNone:
				l.c.Handle(&trace.Event{Kind: trace.EventKind(r.IntN(20))})
			default:
				l.c.Lost(trace.Loss{Source: trace.SourceID(r.IntN(2)), From: l.now, To: l.now + 5, Events: 1})
				l.wait(time.Duration(r.Int64N(int64(400 * ms))))
			}
			l.pass(time.Duration(r.Int64N(int64(20 * ms))))
		}
		l.wait(10 * time.Second)
		// Whoever is open now ends when told that the entry is gone.
		l.canAsk = false
		for range 3 {
			var open []*trace.Flow
			l.c.Flows(func(f *trace.Flow) bool { open = append(open, f); return true })
			for _, f := range open {
				e := &trace.Event{Kind: trace.KindFin, Source: trace.NFLog, Time: l.now, Tuple: f.Tuple}
				if f.Tuple.Proto() != conntrack.TCP {
					e.Kind, e.Source, e.Reply = trace.KindGone, trace.Conntrack, f.Tuple.Reverse()
				}
				l.c.Handle(e)
			}
			l.wait(time.Minute)
		}
		l.wait(6 * time.Minute)
		if s := l.c.Stats(); s.Open != 0 || s.Ended != 0 || s.Held != 0 || s.Clients > 5 {
			t.Errorf("seed %d: %+v", seed, s)
		}
		for _, f := range l.flows {
			if !f.Ended {
				t.Errorf("seed %d: %v %s not ended", seed, f.Tuple, f.Outcome)
			}
		}
		if t.Failed() {
			return
		}
	}
}
