package explain_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// TestExcluded has each reason for which an endpoint is no candidate.
func TestExcluded(t *testing.T) {
	at := func(last string) netip.AddrPort { return netip.MustParseAddrPort("10.244.0." + last + ":8080") }
	name := proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}
	ready := func(last string, change func(*proxy.Endpoint)) proxy.Endpoint {
		e := proxy.Endpoint{Addr: at(last), Ready: true, Serving: true, Local: true, Node: "n1", Namespace: "shop", Pod: "foo-" + last}
		if change != nil {
			change(&e)
		}
		return e
	}
	zone := func(z string) func(*proxy.Endpoint) { return func(e *proxy.Endpoint) { e.ZoneHints = []string{z} } }
	host := func(n string) func(*proxy.Endpoint) { return func(e *proxy.Endpoint) { e.NodeHints = []string{n} } }
	away := func(e *proxy.Endpoint) { e.Local, e.Node = false, "n2" }

	for _, tt := range []struct {
		name    string
		svc     proxy.Service
		via     proxy.Via
		choices []string
		out     string
		want    []string // "endpoint code: words"
	}{
		{name: "conditions", via: proxy.ViaClusterIP, choices: []string{"1"}, out: "4",
			svc: proxy.Service{Endpoints: []proxy.Endpoint{ready("1", nil), ready("2", func(e *proxy.Endpoint) { e.Ready = false }),
				ready("3", func(e *proxy.Endpoint) { e.Ready, e.Terminating = false, true }), ready("4", nil)}},
			want: []string{"foo-2 not-ready: not ready", "foo-3 terminating: terminating", "foo-4 out: out for a time: many resets"}},
		{name: "zone", via: proxy.ViaClusterIP, choices: []string{"1"},
			svc:  proxy.Service{Endpoints: []proxy.Endpoint{ready("1", zone("za")), ready("2", zone("zb"))}},
			want: []string{"foo-2 other-zone: its topology hints are for zone zb, and this node is in za"}},
		{name: "node", via: proxy.ViaClusterIP, choices: []string{"1"},
			svc:  proxy.Service{Endpoints: []proxy.Endpoint{ready("1", host("n1")), ready("2", host("n2"))}},
			want: []string{"foo-2 other-node: its topology hints are for node n2, and this is n1"}},
		{name: "internal policy", via: proxy.ViaClusterIP, choices: []string{"1"},
			svc:  proxy.Service{InternalLocal: true, Endpoints: []proxy.Endpoint{ready("1", nil), ready("2", away)}},
			want: []string{"foo-2 not-local: on n2, and the policy is Local"}},
		{name: "external policy", via: proxy.ViaNodePort,
			svc:  proxy.Service{ExternalLocal: true, NodePort: 30080, Endpoints: []proxy.Endpoint{ready("1", away)}},
			want: []string{"foo-1 not-local: on n2, and the policy is Local"}},
		{name: "node known from the pod alone", via: proxy.ViaClusterIP,
			svc:  proxy.Service{InternalLocal: true, Endpoints: []proxy.Endpoint{ready("1", func(e *proxy.Endpoint) { e.Local = false })}},
			want: []string{"foo-1 not-local: its EndpointSlice does not say that it is on this node, and the policy is Local"}},
		{name: "port name", via: proxy.ViaClusterIP, svc: proxy.Service{OtherPorts: []string{"web/TCP"}},
			want: []string{" port-mismatch: the EndpointSlices have endpoints for web/TCP only, none for http/TCP"}},
		{name: "rules and API disagree", via: proxy.ViaClusterIP, choices: []string{"9"},
			svc:  proxy.Service{Endpoints: []proxy.Endpoint{ready("1", nil)}},
			want: []string{"foo-1 endpoint-missing: the API has it as a candidate, the rules do not", " endpoint-gone: the rules have it, the API does not (any more)"}},
		{name: "none", via: proxy.ViaClusterIP, choices: []string{"1"}, svc: proxy.Service{Endpoints: []proxy.Endpoint{ready("1", nil)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.svc.Name, tt.svc.ClusterIP, tt.svc.Port = name, netip.MustParseAddr("10.96.0.10"), 80
			snap := &proxy.Snapshot{Node: proxy.Node{Name: "n1", Zone: "za"}, Services: []proxy.Service{tt.svc}}
			var o proxy.Overlay
			if tt.out != "" {
				o.Out = map[netip.AddrPort]proxy.Outage{at(tt.out): {Reason: "many resets"}}
			}
			c := explain.Case{Service: name, Via: tt.via}
			front := liverules.Front{Via: tt.via}
			for _, last := range tt.choices {
				c.Choices = append(c.Choices, explain.Choice{Endpoint: trace.Peer{Addr: at(last)}})
				front.Choices = append(front.Choices, proxy.Choice{Endpoint: at(last)})
			}
			a := explain.Answer{Cases: []explain.Case{c},
				Packet: proxy.Packet{Proto: conntrack.TCP, Src: at("99"), Dst: netip.MustParseAddrPort("10.96.0.10:80")}}
			a.Name(snap, o)
			if got := words(a.Cases[0].Excluded); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if tt.out != "" {
				return // a table knows of no endpoints that are out
			}
			if got := words(explain.Front(snap, &liverules.Service{Name: name}, &front)); !slices.Equal(got, tt.want) {
				t.Errorf("in the table %q, want %q", got, tt.want)
			}
		})
	}
	if got := explain.Front(nil, &liverules.Service{Name: name}, &liverules.Front{}); got != nil {
		t.Errorf("without a snapshot %v", got)
	}
}

func words(all []explain.Excluded) []string {
	var out []string
	for _, x := range all {
		out = append(out, strings.Join([]string{x.Endpoint.Pod, x.Code + ":", x.Why}, " "))
	}
	return out
}
