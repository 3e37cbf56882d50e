package proxytest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// SeedEnv names a variable by which a test of generated objects is repeated.
const SeedEnv = "KPTRACE_SEED"

// Seed is what generated objects are made of; it is logged.
func Seed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(SeedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d repeats this", SeedEnv, seed)
	return seed
}

// RandomServices writes n Services, at most 40, in the words that Services reads. prefix
// begins their names: these should differ from round to round, for the kernel
// remembers the clients of an endpoint by its name.
func RandomServices(r *rand.Rand, n int, prefix string) string {
	var b strings.Builder
	for i := range n {
		proto, port, target := "tcp", 80, "8080"
		if r.IntN(4) == 0 {
			proto, port, target = "udp", 53, "5353"
		}
		fmt.Fprintf(&b, "shop/%ss%d:p %s 10.96.3.%d:%d", prefix, i, proto, 10+i, port)
		if r.IntN(2) == 0 {
			fmt.Fprintf(&b, " nodeport=%d", 30100+i)
		}
		if r.IntN(3) == 0 {
			fmt.Fprintf(&b, " external=198.51.100.%d", 20+i)
		}
		if r.IntN(3) == 0 {
			fmt.Fprintf(&b, " lb=198.51.100.%d", 60+i)
			if r.IntN(2) == 0 {
				b.WriteString(" range=203.0.113.0/24")
			}
		}
		switch r.IntN(5) {
		case 0:
			b.WriteString(" policy=external")
		case 1:
			b.WriteString(" policy=internal")
		}
		if r.IntN(4) == 0 {
			b.WriteString(" affinity=1h")
		}
		for _, pod := range []string{"a", "b", "c"} {
			switch r.IntN(8) {
			case 0:
			case 1:
				fmt.Fprintf(&b, " %s:%s,notready", pod, target)
			case 2:
				fmt.Fprintf(&b, " %s:%s,terminating", pod, target)
			default:
				fmt.Fprintf(&b, " %s:%s", pod, target)
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Trial is one packet that is sent.
type Trial struct {
	From   Source
	Packet proxy.Packet
}

// Trials are packets from some of the sources to each address of each Service, each
// from the next port. A client goes to a Service with affinity only once, for what is
// predicted is the way without an entry.
func Trials(r *rand.Rand, snap *proxy.Snapshot, port *uint16) []Trial {
	var out []Trial
	for i := range snap.Services {
		svc := &snap.Services[i]
		to := []netip.AddrPort{netip.AddrPortFrom(svc.ClusterIP, svc.Port)}
		for _, a := range append(append([]netip.Addr(nil), svc.ExternalIPs...), svc.LoadBalancerIPs...) {
			to = append(to, netip.AddrPortFrom(a, svc.Port))
		}
		if svc.NodePort != 0 {
			to = append(to, netip.AddrPortFrom(NodeAddr, svc.NodePort))
		}
		sources := Sources()
		r.Shuffle(len(sources), func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
		for _, s := range sources[:4] {
			r.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
			for n, dst := range to {
				if n > 0 && svc.Affinity > 0 {
					break
				}
				*port++
				out = append(out, Trial{s, proxy.Packet{
					Proto: svc.Name.Proto, Src: netip.AddrPortFrom(s.Addr(), *port), Dst: dst, FromNode: s == FromNode,
				}})
			}
		}
	}
	return out
}

// ChiSquared says how far picks are from what odds let expect. With three endpoints,
// two degrees of freedom, it exceeds 23 by chance once in 100,000 times.
func ChiSquared(picks, odds map[netip.AddrPort]float64) (chi float64) {
	sent := 0.0
	for _, n := range picks {
		sent += n
	}
	for ep, p := range odds {
		want := p * sent
		chi += (picks[ep] - want) * (picks[ep] - want) / want
	}
	return chi
}
