package node

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace/selection"
)

// burst is how many connections are made at once; the same burst makes other
// tracers lose most of it (docs/path.md).
const burst = 4000

// TestBurstIsCountedExactly makes 4,000 connections while their paths are traced,
// with a large receive buffer and with one that overruns. What was received and
// what was lost must add up to what the kernel sent, to the message: that is known
// from the counters of the rules that begin a trace, for all connections go the
// same way.
func TestBurstIsCountedExactly(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, buffer := range []int{0, 64 << 10} {
			t.Run(fmt.Sprintf("%s,buffer=%d", fl, buffer), func(t *testing.T) {
				w := proxytest.NewWorld(t, false)
				setup := proxytest.Setup{Snapshot: proxytest.Services("shop/web:p tcp 10.96.3.10:80 c:8080"), ClusterCIDR: proxytest.ClusterCIDR}
				rig := newPathRigOf(t, w.Node, fl, false, buffer)
				rig.sel = rig.unlimited()
				b := backendFor(setup, w.Node, fl, false)
				if _, err := b.Apply(t.Context(), b.Render(setup.Snapshot, proxy.Overlay{})); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), setup.Snapshot, 1)
				to := netip.MustParseAddrPort("10.96.3.10:80")

				// One connection tells how many reports there are of each packet.
				w.Must(w.NS[proxytest.FromPod].Do(func() error { proxytest.Send(conntrack.TCP, 9999, to, time.Second); return nil }))
				if _, ok := rig.find(9999, "SYN"); !ok {
					t.Fatal("no path of the first connection")
				}
				before := rig.settled(0)
				syn, synAck := rig.begun()
				if syn != 1 || synAck != 1 {
					t.Fatalf("the rules counted %d SYN and %d SYN-ACK of one connection", syn, synAck)
				}
				var wg sync.WaitGroup
				for part := range 4 {
					wg.Go(func() {
						_ = w.NS[proxytest.FromPod].Do(func() error {
							for i := range burst / 4 {
								proxytest.Send(conntrack.TCP, uint16(10000+part*burst/4+i), to, 5*time.Second)
							}
							return nil
						})
					})
				}
				wg.Wait()
				syn, synAck = rig.begun()
				// The reports of the first connection stand for all.
				sent := before * syn
				rig.settled(sent)
				if syn != synAck {
					t.Fatalf("%d SYN, %d SYN-ACK: the machine is too busy, some were sent again", syn, synAck)
				}
				got, lost := rig.source.Stats().Events, rig.source.Stats().Lost
				paths, whole := rig.synPaths(int(syn))
				t.Logf("%d SYN and %d SYN-ACK traced; %d reports received + %d lost = %d, the kernel sent %d; %d paths of SYN, %d surely whole",
					syn, synAck, got, lost, got+lost, sent, paths, whole)
				if syn < burst+1 {
					t.Errorf("%d SYN traced of %d connections", syn, burst+1)
				}
				if got+lost != sent {
					t.Errorf("%d received + %d lost is not %d", got, lost, sent)
				}
				if lost == 0 && paths != int(syn) {
					t.Errorf("nothing was lost, yet there are paths of %d of %d connections", paths, syn)
				}
				if buffer != 0 && lost == 0 {
					t.Errorf("a buffer of %d bytes did not overrun: nothing was tested", buffer)
				}
			})
		}
	}
}

// unlimited is a selection that traces as many packets a second as there are.
func (r *pathRig) unlimited() *selection.Selection {
	return selection.New(selection.Config{Tools: r.tools, Flavour: r.flavour, Timeout: time.Minute, Rate: 10_000, Burst: 10_000})
}

// settled waits until nothing more is received, and returns how much was
// sent. Of what was lost the kernel is asked now and then, and on a busy machine that can take seconds:
// it waits longer where received and lost are not yet what was sent.
func (r *pathRig) settled(sent uint64) uint64 {
	var last uint64
	since := time.Now()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		s := r.source.Stats()
		n := s.Events + s.Lost
		if n != last {
			last, since = n, time.Now()
		}
		if quiet := time.Since(since); quiet > 20*time.Second || n >= sent && quiet > 1500*time.Millisecond {
			break
		}
	}
	s := r.source.Stats()
	return s.Events + s.Lost
}

// synPaths returns of how many client ports there are paths of a SYN, and how many
// are surely whole: when there are all, or no more come.
func (r *pathRig) synPaths(all int) (n, whole int) {
	since := time.Now()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		ports := map[uint16]bool{}
		was := n
		whole = 0
		r.mu.Lock()
		for i := range r.joined {
			if p := &r.joined[i].Path; p.Packet == "SYN" {
				ports[p.Tuple.Src().Port()] = true
				if !p.Incomplete {
					whole++
				}
			}
		}
		r.mu.Unlock()
		if n = len(ports); n != was {
			since = time.Now()
		}
		if n >= all || time.Since(since) > 5*time.Second {
			break
		}
	}
	return n, whole
}

// begun returns how many SYN and SYN-ACK the rules began to trace.
func (r *pathRig) begun() (syn, synAck uint64) {
	r.t.Helper()
	have, err := r.tools.Save(r.t.Context(), r.flavour, xtables.IPv4, "raw", true)
	r.must(err)
	for _, c := range have.Table("raw").Chains {
		for _, rule := range c.Rules {
			switch text := rule.String(); {
			case rule.Target != "KPTRACE-PATH":
			case strings.Contains(text, "FIN,SYN,RST,ACK SYN,ACK"):
				synAck += rule.Counters.Packets
			case strings.Contains(text, "FIN,SYN,RST,ACK SYN "):
				syn += rule.Counters.Packets
			}
		}
	}
	return syn, synAck
}
