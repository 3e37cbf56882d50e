package correlate

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// TestEndpointIndex goes through generations in which Services and endpoints come,
// go and share pods; by its differences the index must become what it is when made
// anew.
func TestEndpointIndex(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	var x endpointIndex
	last := map[proxy.PortName][]proxy.Endpoint{}
	moved, shared := 0, 0
	for generation := range 2000 {
		s := &proxy.Snapshot{}
		for i := range 6 {
			name := proxy.PortName{Namespace: "shop", Name: fmt.Sprint(i), Port: "http", Proto: conntrack.TCP}
			if r.IntN(8) == 0 {
				name.Proto = conntrack.UDP
			}
			list := last[name]
			switch r.IntN(6) {
			case 0:
				continue
			case 1, 2:
				list = nil
				for n := range 8 {
					if r.IntN(2) == 0 {
						list = append(list, proxy.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 8080)})
					}
				}
			case 3:
				list = slices.Clone(list)
			}
			last[name] = list
			s.Services = append(s.Services, proxy.Service{Name: name, ClusterIP: netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), Endpoints: list})
		}
		if r.IntN(20) == 0 {
			slices.Reverse(s.Services) // as no Snapshot should be
		}
		if !x.follow(s) || x.follow(s) {
			t.Fatal("it does not tell a new generation from the same")
		}
		var anew endpointIndex
		anew.follow(s)
		if !maps.Equal(x.first, anew.first) || !maps.EqualFunc(x.more, anew.more, slices.Equal) {
			t.Fatalf("generation %d:\n%v %v\nmade anew:\n%v %v", generation, x.first, x.more, anew.first, anew.more)
		}
		for i := range s.Services {
			for _, e := range s.Services[i].Endpoints {
				if first := x.first[target(&s.Services[i], e)]; first.Compare(s.Services[i].Name) > 0 {
					t.Fatalf("generation %d: %v is said to be of %v before %v", generation, e.Addr, first, s.Services[i].Name)
				}
				moved++
			}
		}
		shared += len(x.more)
	}
	if moved == 0 || shared == 0 {
		t.Errorf("%d endpoints, %d of several Services", moved, shared)
	}
}
