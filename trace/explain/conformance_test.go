package explain_test

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace/explain"
)

// render writes the rules of a Setup as a kube-proxy would, and reads them back
// as those of somebody else.
func render(t *testing.T, s proxytest.Setup, tagged bool) (*liverules.Program, proxy.Program) {
	t.Helper()
	cfg := iptables.Config{MasqueradeAll: s.MasqueradeAll, LocalhostNodePorts: true, Trace: tagged}
	if s.Snapshot.Services[0].Is6() {
		cfg.Family = xtables.IPv6
	}
	if s.ClusterCIDR.IsValid() {
		cfg.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	ours := iptables.New(cfg).Render(s.Snapshot, s.Overlay)
	rs, err := xtables.Parse(cfg.Family, ours.Text())
	if err != nil {
		t.Fatal(err)
	}
	addrs := s.Snapshot.Node.Addrs
	return liverules.New(liverules.Config{Addrs: addrs, Snapshot: s.Snapshot, Overlay: s.Overlay}, rs), ours
}

// TestConformance holds what is read from rules against the table that every
// mode has to keep.
func TestConformance(t *testing.T) {
	for i := range 4 {
		tagged, cases := i&1 != 0, proxytest.Cases()
		if i&2 != 0 {
			cases = proxytest.Cases6()
		}
		t.Run(fmt.Sprintf("tagged=%t,ipv6=%t", tagged, i&2 != 0), func(t *testing.T) {
			proxytest.Run(t, cases, func(t *testing.T, s proxytest.Setup) func(proxy.Packet) proxy.Outcome {
				p, _ := render(t, s, tagged)
				return p.Walk
			})
		})
	}
}

// TestAnswers wants an Answer for every row that agrees with the row, with odds
// that add up to 1, the same rules as our own mode names, and a purpose for each.
func TestAnswers(t *testing.T) {
	for _, c := range proxytest.Cases() {
		p, ours := render(t, c.Setup, true)
		for _, row := range c.Rows {
			t.Run(c.Name+"/"+row.Name(), func(t *testing.T) {
				a := explain.Live(p, row.Packet())
				if len(a.Cases) != 1 || len(a.Cases[0].If) > 0 {
					t.Fatalf("%d cases, though the rules and the node's addresses are known", len(a.Cases))
				}
				x := &a.Cases[0]
				if v, same := x.Verdict(); !same || v != row.Want.Verdict {
					t.Errorf("verdict %v (the same on all ways: %t), want %v", v, same, row.Want.Verdict)
				}
				if math.Abs(x.Odds()-1) > 1e-8 {
					t.Errorf("odds add up to %v", x.Odds())
				}
				own := ours.Walk(row.Packet())
				for _, choice := range x.Choices {
					oc, ok := own.Find(choice.Endpoint.Addr)
					if !ok {
						t.Fatalf("%v is no choice of our own walk", choice.Endpoint.Addr)
					}
					mine := choice.Ways[0].Path
					theirs := explain.Outcome(&own, proxy.IPTables, row.Packet())
					for _, o := range theirs.Cases[0].Choices {
						if o.Endpoint.Addr != oc.Endpoint {
							continue
						}
						if at, same := mine.SameRules(&o.Ways[0].Path); !same {
							t.Errorf("paths to %v differ at step %d:\n%+v\n%+v", oc.Endpoint, at, mine.Steps(), o.Ways[0].Path.Steps())
						}
					}
					if got := mine.Endpoint(); got != choice.Endpoint.Addr {
						t.Errorf("the path leads to %v, not to %v", got, choice.Endpoint.Addr)
					}
				}
				for _, choice := range x.Choices {
					for _, h := range choice.Ways[0].Path.Hops {
						if h.Text != "" && h.Purpose == "" {
							t.Errorf("no purpose for %s/%s %s", h.Table, h.Chain, h.Text)
						}
					}
				}
			})
		}
	}
}

// TestServices reads back from rules what they were made of.
func TestServices(t *testing.T) {
	for _, c := range append(proxytest.Cases(), proxytest.Cases6()...) {
		p, _ := render(t, c.Setup, false)
		byName := map[string]*liverules.Service{}
		for _, s := range p.Services() {
			byName[s.Name.String()+s.Name.Proto.String()] = s
		}
		for i := range c.Setup.Snapshot.Services {
			want := &c.Setup.Snapshot.Services[i]
			s := byName[want.Name.String()+want.Name.Proto.String()]
			if s == nil {
				t.Errorf("%s: %s was not found", c.Name, want.Name)
				continue
			}
			if s.Affinity != want.Affinity && len(s.Fronts[0].Choices) > 0 {
				t.Errorf("%s: affinity of %s is %v, want %v", c.Name, want.Name, s.Affinity, want.Affinity)
			}
			for j := range s.Fronts {
				f := &s.Fronts[j]
				if f.Missing > 0 {
					t.Errorf("%s: %v of %s leads nowhere with chance %v", c.Name, f, want.Name, f.Missing)
				}
				if f.Chain != "" && liverules.KindOf(f.Chain) != liverules.KindExternal &&
					liverules.KindOf(f.Chain) != liverules.KindFirewall && f.Chain[9:] != liverules.Hash(want.Name, netip.AddrPort{}) {
					t.Errorf("%s: chain %s is not that of %s", c.Name, f.Chain, want.Name)
				}
			}
		}
	}
}
