package iptables

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// mutations change each field of a Service that has endpoints; a field that is
// not here fails the test below.
var mutations = map[string]func(s *proxy.Service, n int){
	"Name":                func(s *proxy.Service, n int) { s.Name.Port = fmt.Sprint("p", n) },
	"Type":                func(s *proxy.Service, _ int) { s.Type = "LoadBalancer" },
	"ClusterIP":           func(s *proxy.Service, n int) { s.ClusterIP = netip.AddrFrom4([4]byte{10, 97, 0, byte(n % 30)}) },
	"Port":                func(s *proxy.Service, n int) { s.Port = 80 + uint16(n%2) },
	"NodePort":            func(s *proxy.Service, n int) { s.NodePort = 30000 + uint16(n%30) },
	"ExternalIPs":         func(s *proxy.Service, n int) { s.ExternalIPs = []netip.Addr{address(200, n)} },
	"LoadBalancerIPs":     func(s *proxy.Service, n int) { s.LoadBalancerIPs = []netip.Addr{address(201, n)} },
	"SourceRanges":        func(s *proxy.Service, n int) { s.SourceRanges = []netip.Prefix{netip.PrefixFrom(address(202, n), 24)} },
	"Affinity":            func(s *proxy.Service, n int) { s.Affinity = time.Duration(n%3) * time.Hour },
	"InternalLocal":       func(s *proxy.Service, _ int) { s.InternalLocal = !s.InternalLocal },
	"ExternalLocal":       func(s *proxy.Service, _ int) { s.ExternalLocal = !s.ExternalLocal },
	"HealthCheckNodePort": func(s *proxy.Service, n int) { s.HealthCheckNodePort = 31000 + uint16(n%30) },
	"Scheduler":           func(s *proxy.Service, _ int) { s.Scheduler = "rr" },
	"OtherPorts":          func(s *proxy.Service, _ int) { s.OtherPorts = []string{"web/TCP"} },
	"Endpoints": func(s *proxy.Service, n int) {
		eps := slices.Clone(s.Endpoints)
		switch n % 5 {
		case 0:
			eps = nil
		case 1:
			eps[n%len(eps)].Ready = false
		case 2: // no address that can be dialled
			eps[n%len(eps)].Addr = netip.AddrPort{}
		case 3:
			eps[n%len(eps)].Local = true
		default:
			eps[n%len(eps)].Addr = netip.AddrPortFrom(address(203, n), 8080)
		}
		s.Endpoints = eps
	},
}

func address(first byte, n int) netip.Addr {
	return netip.AddrFrom4([4]byte{first, 0, byte(n >> 8), byte(n)})
}

// TestPatch changes a cluster step by step, one field of a Service or a Service at
// a time, and holds what is rendered from the last rendering against what is
// rendered from nothing.
func TestPatch(t *testing.T) {
	for i := range reflect.TypeFor[proxy.Service]().NumField() {
		if f := reflect.TypeFor[proxy.Service]().Field(i).Name; mutations[f] == nil {
			t.Fatalf("field %s of proxy.Service is not tested here; does sameRest have to look at it?", f)
		}
	}
	fields := slices.Sorted(func(yield func(string) bool) {
		for f := range mutations {
			if !yield(f) {
				return
			}
		}
	})
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	cfg := configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})
	kept := New(cfg)
	s := large(20, 3)
	patched, missed := 0, 0
	for n := range 600 {
		next := *s
		next.Services = slices.Clone(s.Services)
		i, what := rnd.IntN(len(next.Services)), "Services"
		var o proxy.Overlay
		switch rnd.IntN(8) {
		case 0:
			next.Services = slices.Delete(next.Services, i, i+1)
		case 1:
			next = *large(20, 3) // all as it was
		case 2:
			what = "Overlay"
			o.Out = map[netip.AddrPort]proxy.Outage{next.Services[i].Endpoints[0].Addr: {}}
		default:
			what = fields[rnd.IntN(len(fields))]
			if svc := &next.Services[i]; len(svc.Endpoints) > 0 {
				mutations[what](svc, n)
			}
		}
		before := kept.last.program
		p := kept.Render(&next, o).(*program)
		if before != nil && reflect.ValueOf(p.claims).Pointer() == reflect.ValueOf(before.claims).Pointer() {
			patched++
		} else {
			missed++
		}
		q := New(cfg).Render(&next, o).(*program)
		if got, want := p.Text(), q.Text(); got != want {
			t.Fatalf("step %d, %s of Service %d changed:\n%s\nwant\n%s", n, what, i, got, want)
		}
		if !slices.Equal(p.problems, q.problems) || !reflect.DeepEqual(p.claims, q.claims) {
			t.Fatalf("step %d, %s of Service %d changed: problems %v, want %v", n, what, i, p.problems, q.problems)
		}
		s = &next
		if len(s.Services) < 10 || len(s.Services[i%len(s.Services)].Endpoints) == 0 || len(p.problems) > 0 {
			s = large(20, 3)
		}
	}
	if patched < 50 || missed < 50 {
		t.Errorf("%d of 600 were patched and %d rendered anew: the test sees only one of them", patched, missed)
	}
}

// TestDiffering takes away each run of Services, and adds it again: all of it, and
// nothing else, must be seen to differ.
func TestDiffering(t *testing.T) {
	cfg := configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})
	b := New(cfg)
	s := large(8, 2)
	for i := range s.Services {
		for j := i; j <= len(s.Services); j++ {
			all := b.Render(s, proxy.Overlay{}).(*program)
			part := *s
			part.Services = slices.Delete(slices.Clone(s.Services), i, j)
			p := b.Render(&part, proxy.Overlay{}).(*program)
			for _, c := range [][2]*program{{all, p}, {p, all}} {
				were, are := differing(c[0].units, c[1].units)
				if len(were)+len(are) != j-i {
					t.Fatalf("without [%d, %d): %d and %d differ, want %d", i, j, len(were), len(are), j-i)
				}
				changes := c[1].since(c[0])
				for _, u := range append(were, are...) {
					if !slices.ContainsFunc(changes, func(d Change) bool { return d.Service == u.svc.Name }) {
						t.Fatalf("without [%d, %d): nothing is done about %s", i, j, u.svc.Name)
					}
				}
				if j == i && len(changes) > 0 {
					t.Fatalf("changes where there are none: %v", changes)
				}
			}
		}
	}
}

// TestPatchAllocs: one endpoint among thousands must not cost an allocation for
// each Service.
func TestPatchAllocs(t *testing.T) {
	b := New(configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR}))
	s := large(2000, 5)
	last := b.Render(s, proxy.Overlay{}).(*program)
	n := 0
	got := testing.AllocsPerRun(10, func() {
		n++
		s = oneEndpoint(s, n)
		p := b.Render(s, proxy.Overlay{}).(*program)
		if len(p.since(last)) == 0 {
			t.Error("the change is not seen")
		}
		last = p
	})
	if got > 900 {
		t.Errorf("%.0f allocations for one endpoint of 2,000 Services, want at most 900", got)
	}
}

// oneEndpoint gives one Service in the middle another endpoint.
func oneEndpoint(s *proxy.Snapshot, n int) *proxy.Snapshot {
	next := *s
	next.Services = slices.Clone(s.Services)
	svc := &next.Services[len(next.Services)/2]
	svc.Endpoints = slices.Clone(svc.Endpoints)
	svc.Endpoints[1].Addr = netip.AddrPortFrom(address(203, n), 8080)
	return &next
}

func BenchmarkOneEndpoint(b *testing.B) {
	be := New(configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR}))
	states := []*proxy.Snapshot{large(5000, 10)}
	states = append(states, oneEndpoint(states[0], 1))
	last := be.Render(states[0], proxy.Overlay{}).(*program)
	b.ReportAllocs()
	for n := 1; b.Loop(); n++ {
		p := be.Render(states[n%2], proxy.Overlay{}).(*program)
		p.since(last)
		last = p
	}
}
