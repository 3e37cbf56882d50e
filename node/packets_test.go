package node

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
)

func packetsSnapshot() *proxy.Snapshot {
	a := netip.MustParseAddr
	port := func(name, port string, number uint16, ip string) proxy.Service {
		return proxy.Service{
			Name: proxy.PortName{Namespace: "shop", Name: name, Port: port, Proto: conntrack.TCP}, ClusterIP: a(ip), Port: number,
		}
	}
	http, https, six, only6 := port("foo", "http", 80, "10.96.0.10"), port("foo", "https", 443, "10.96.0.10"), port("foo", "http", 80, "fd00:96::a"), port("six", "", 80, "fd00:96::b")
	http.NodePort, six.NodePort = 30080, 30080
	http.ExternalIPs = []netip.Addr{a("198.18.0.10")}
	return &proxy.Snapshot{
		Node:     proxy.Node{Name: "node1", Addrs: []netip.Addr{a("192.0.2.1"), a("fd00:1::1")}},
		Services: []proxy.Service{http, six, https, only6},
		Pods: map[netip.Addr]proxy.Pod{
			a("10.244.1.2"): {Namespace: "shop", Name: "web"}, a("fd00:244::2"): {Namespace: "shop", Name: "web"},
			a("10.244.1.3"): {Namespace: "other", Name: "batch"},
		},
		Skipped: []proxy.Skipped{{Namespace: "shop", Name: "db", Reason: "headless"}},
	}
}

func TestPacketsOf(t *testing.T) {
	t.Parallel()
	web := relay.PodName{Namespace: "shop", Name: "web"}
	for _, tc := range []struct {
		name string
		req  relay.ExplainRequest
		want []string // source address > destination
	}{
		{"somebody outside", relay.ExplainRequest{Namespace: "shop", Service: "foo"}, []string{
			"198.51.100.254>10.96.0.10:80", "198.51.100.254>198.18.0.10:80", "198.51.100.254>192.0.2.1:30080",
			"2001:db8:ffff::fe>[fd00:96::a]:80", "2001:db8:ffff::fe>[fd00:1::1]:30080", "198.51.100.254>10.96.0.10:443",
		}},
		{"a Service of IPv6 alone", relay.ExplainRequest{Namespace: "shop", Service: "six"}, []string{"2001:db8:ffff::fe>[fd00:96::b]:80"}},
		{"a pod of both families", relay.ExplainRequest{Namespace: "shop", Service: "foo", Ports: []string{"http"}, FromPod: web}, []string{
			"10.244.1.2>10.96.0.10:80", "10.244.1.2>198.18.0.10:80", "10.244.1.2>192.0.2.1:30080",
			"fd00:244::2>[fd00:96::a]:80", "fd00:244::2>[fd00:1::1]:30080",
		}},
		{"two ports", relay.ExplainRequest{Namespace: "shop", Service: "foo", Ports: []string{"443", "30080"}, From: netip.MustParseAddr("10.9.9.9")}, []string{
			"10.9.9.9>10.96.0.10:80", "10.9.9.9>198.18.0.10:80", "10.9.9.9>192.0.2.1:30080", "10.9.9.9>10.96.0.10:443",
		}},
		{"any namespace, the node", relay.ExplainRequest{Service: "six", FromNode: true}, []string{"fd00:1::1>[fd00:96::b]:80"}},
	} {
		got, err := packetsOf(packetsSnapshot(), &tc.req)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		var have []string
		for _, p := range got {
			have = append(have, p.Src.Addr().String()+">"+p.Dst.String())
			if p.FromNode != tc.req.FromNode {
				t.Errorf("%s: %v: from the node %v", tc.name, p.Src, p.FromNode)
			}
		}
		if !slices.Equal(have, tc.want) {
			t.Errorf("%s:\ngot  %q\nwant %q", tc.name, have, tc.want)
		}
	}
}

func TestPacketsOfNothing(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		req  relay.ExplainRequest
		is   error
		says string
	}{
		{relay.ExplainRequest{Namespace: "shop", Service: "fooo"}, relay.ErrNotFound, "no Service shop/fooo: did you mean svc/foo?"},
		{relay.ExplainRequest{Namespace: "shp", Service: "foo"}, relay.ErrNotFound, "it exists in namespace shop: add -n shop"},
		{relay.ExplainRequest{Namespace: "shop", Service: "foo", Ports: []string{"grpc"}}, relay.ErrNotFound, "Service shop/foo has no port grpc: it has http, https"},
		{relay.ExplainRequest{Namespace: "shop", Service: "db"}, relay.ErrNoDecisions, "it is headless"},
		{relay.ExplainRequest{Namespace: "shop", Service: "six", From: netip.MustParseAddr("10.9.9.9")}, relay.ErrNotFound, "no address of the family of 10.9.9.9"},
		{relay.ExplainRequest{Namespace: "shop", Service: "foo", FromPod: relay.PodName{Namespace: "shop", Name: "wbe"}}, relay.ErrNotFound, "no pod shop/wbe is known here: did you mean pod/web?"},
		{relay.ExplainRequest{Namespace: "shop", Service: "foo", FromPod: relay.PodName{Namespace: "shop", Name: "batch"}}, relay.ErrNotFound, "it exists in namespace other: add -n other"},
	} {
		_, err := packetsOf(packetsSnapshot(), &tc.req)
		if !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%+v: %v; want %v: %s", tc.req, err, tc.is, tc.says)
		}
	}
}
