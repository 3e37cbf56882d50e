package proxy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/proxy"
)

// ep makes an endpoint of words: "ready", "serving", "terminating", "local",
// "zone=a,b" and "node=a,b" are its conditions and hints.
func ep(addr, words string) proxy.Endpoint {
	e := proxy.Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 80)}
	for _, w := range strings.Fields(words) {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "ready":
			e.Ready, e.Serving = true, true
		case "serving":
			e.Serving = true
		case "terminating":
			e.Terminating = true
		case "local":
			e.Local = true
		case "zone":
			e.ZoneHints = strings.Split(value, ",")
		case "node":
			e.NodeHints = strings.Split(value, ",")
		default:
			panic(w)
		}
	}
	return e
}

func addrs(eps []proxy.Endpoint) string {
	var s []string
	for _, e := range eps {
		s = append(s, e.Addr.Addr().String()[len("10.0.0."):])
	}
	return strings.Join(s, " ")
}

func TestSelect(t *testing.T) {
	const a, b, c = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	here := proxy.Node{Name: "n1", Zone: "za"}
	tests := []struct {
		name      string
		eps       []proxy.Endpoint
		node      proxy.Node
		out       string
		cluster   string
		local     string
		policy    string
		localWord string
		excluded  proxy.Excluded
		localExcl proxy.Excluded
	}{
		{name: "none"},
		{name: "ready only", eps: []proxy.Endpoint{ep(a, "ready"), ep(b, ""), ep(c, "ready local")},
			cluster: "1 3", local: "3", excluded: proxy.Excluded{NotReady: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "not ready but serving", eps: []proxy.Endpoint{ep(a, "serving")},
			excluded: proxy.Excluded{NotReady: 1}, localExcl: proxy.Excluded{NotLocal: 1}},
		{name: "terminating is out while one is ready",
			eps:     []proxy.Endpoint{ep(a, "ready"), ep(b, "serving terminating local")},
			cluster: "1", local: "2", localWord: "terminating",
			excluded: proxy.Excluded{Terminating: 1}, localExcl: proxy.Excluded{NotLocal: 1}},
		{name: "terminating serves where none is ready",
			eps:     []proxy.Endpoint{ep(a, "serving terminating"), ep(b, "terminating"), ep(c, "")},
			cluster: "1", policy: "terminating",
			excluded: proxy.Excluded{Terminating: 1, NotReady: 1}, localExcl: proxy.Excluded{NotLocal: 3}},
		{name: "terminating ignores hints",
			eps:     []proxy.Endpoint{ep(a, "serving terminating zone=za"), ep(b, "serving terminating zone=zb")},
			cluster: "1 2", policy: "terminating", localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "zone hints", eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb"), ep(c, "ready zone=za,zb local")},
			cluster: "1 3", local: "3", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "hints do not touch the local set", eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb local")},
			cluster: "1", local: "2", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 1}},
		{name: "one without hint", eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready")},
			cluster: "1 2", localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "an unready one without hint does not matter", eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, ""), ep(c, "ready zone=zb")},
			cluster: "1", excluded: proxy.Excluded{NotReady: 1, OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 3}},
		{name: "no hint for this zone", eps: []proxy.Endpoint{ep(a, "ready zone=zb"), ep(b, "ready zone=zc")},
			cluster: "1 2", localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "node without zone", node: proxy.Node{Name: "n1"}, eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb")},
			cluster: "1 2", localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "node before zone", eps: []proxy.Endpoint{ep(a, "ready zone=za node=n1"), ep(b, "ready zone=za node=n2")},
			cluster: "1", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "zone where no node hint fits", eps: []proxy.Endpoint{ep(a, "ready zone=za node=n3"), ep(b, "ready zone=zb node=n2")},
			cluster: "1", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "one without node hint falls back to zone", eps: []proxy.Endpoint{ep(a, "ready zone=zb node=n1"), ep(b, "ready zone=za")},
			cluster: "2", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
		{name: "overlay", out: b, eps: []proxy.Endpoint{ep(a, "ready"), ep(b, "ready local")},
			cluster: "1", local: "2", excluded: proxy.Excluded{Overlay: 1}, localExcl: proxy.Excluded{NotLocal: 1}},
		{name: "overlay never takes the last", out: a + " " + b, eps: []proxy.Endpoint{ep(a, "ready"), ep(b, "ready"), ep(c, "")},
			cluster: "1 2", excluded: proxy.Excluded{NotReady: 1}, localExcl: proxy.Excluded{NotLocal: 3}},
		{name: "overlay never takes the last terminating one", out: a, eps: []proxy.Endpoint{ep(a, "serving terminating local")},
			cluster: "1", local: "1", policy: "terminating", localWord: "terminating"},
		{name: "overlay takes the only one of the zone", out: a, eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb"), ep(c, "ready zone=zc")},
			cluster: "2 3", excluded: proxy.Excluded{Overlay: 1}, localExcl: proxy.Excluded{NotLocal: 3}},
		{name: "overlay that leaves nothing leaves hints in force", out: a + " " + b, eps: []proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb")},
			cluster: "1", excluded: proxy.Excluded{OtherZone: 1}, localExcl: proxy.Excluded{NotLocal: 2}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.node.Name == "" {
				tt.node = here
			}
			if tt.policy == "" {
				tt.policy = "Cluster"
			}
			if tt.localWord == "" {
				tt.localWord = "Local"
			}
			var o proxy.Overlay
			for _, s := range strings.Fields(tt.out) {
				if o.Out == nil {
					o.Out = map[netip.AddrPort]proxy.Outage{}
				}
				o.Out[netip.AddrPortFrom(netip.MustParseAddr(s), 80)] = proxy.Outage{}
			}
			svc := proxy.Service{Endpoints: tt.eps}
			got := svc.Select(tt.node, o)
			if s := addrs(got.Cluster); s != tt.cluster {
				t.Errorf("Cluster = %q, want %q", s, tt.cluster)
			}
			if s := addrs(got.Local); s != tt.local {
				t.Errorf("Local = %q, want %q", s, tt.local)
			}
			if got.Policy != tt.policy || got.LocalPolicy != tt.localWord {
				t.Errorf("Policy, LocalPolicy = %q, %q, want %q, %q", got.Policy, got.LocalPolicy, tt.policy, tt.localWord)
			}
			if got.Excluded != tt.excluded || got.LocalExcluded != tt.localExcl {
				t.Errorf("Excluded = %+v, %+v, want %+v, %+v", got.Excluded, got.LocalExcluded, tt.excluded, tt.localExcl)
			}
			if n := len(got.Cluster) + got.Excluded.Total(); n != len(tt.eps) {
				t.Errorf("cluster and excluded are %d endpoints, want %d", n, len(tt.eps))
			}
			if n := len(got.Local) + got.LocalExcluded.Total(); n != len(tt.eps) {
				t.Errorf("local and excluded are %d endpoints, want %d", n, len(tt.eps))
			}
		})
	}
}

func TestUses(t *testing.T) {
	tests := []struct {
		svc            proxy.Service
		cluster, local bool
	}{
		{proxy.Service{}, true, false},
		{proxy.Service{InternalLocal: true}, false, true},
		{proxy.Service{InternalLocal: true, NodePort: 30000}, true, true},
		{proxy.Service{ExternalLocal: true}, true, false},
		{proxy.Service{ExternalLocal: true, NodePort: 30000}, true, true},
		{proxy.Service{NodePort: 30000}, true, false},
	}
	for i, tt := range tests {
		if c, l := tt.svc.UsesCluster(), tt.svc.UsesLocal(); c != tt.cluster || l != tt.local {
			t.Errorf("%d: UsesCluster, UsesLocal = %t, %t, want %t, %t", i, c, l, tt.cluster, tt.local)
		}
	}
}

func TestExclusions(t *testing.T) {
	const a, b, c, d = "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"
	here := proxy.Node{Name: "n1", Zone: "za"}
	out := proxy.Overlay{Out: map[netip.AddrPort]proxy.Outage{netip.MustParseAddrPort(c + ":80"): {}}}
	for _, tt := range []struct {
		eps   []proxy.Endpoint
		local bool
		want  []proxy.Exclusion
	}{
		{[]proxy.Endpoint{ep(a, "ready"), ep(b, ""), ep(c, "ready"), ep(d, "serving terminating")}, false,
			[]proxy.Exclusion{proxy.Candidate, proxy.NotReady, proxy.OutOfOverlay, proxy.Terminating}},
		{[]proxy.Endpoint{ep(a, "ready local"), ep(b, "ready"), ep(d, "local")}, true,
			[]proxy.Exclusion{proxy.Candidate, proxy.NotLocal, proxy.NotReady}},
		{[]proxy.Endpoint{ep(a, "ready zone=za"), ep(b, "ready zone=zb")}, false,
			[]proxy.Exclusion{proxy.Candidate, proxy.OtherZone}},
		{[]proxy.Endpoint{ep(a, "ready zone=za node=n1"), ep(b, "ready zone=za node=n2")}, false,
			[]proxy.Exclusion{proxy.Candidate, proxy.OtherNode}},
	} {
		svc := proxy.Service{Endpoints: tt.eps}
		if got := svc.Exclusions(here, out, tt.local); !slices.Equal(got, tt.want) {
			t.Errorf("%+v: %v, want %v", tt.eps, got, tt.want)
		}
	}
}
