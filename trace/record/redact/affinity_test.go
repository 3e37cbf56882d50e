package redact

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace/record"
)

// TestAffinity wants clients and the node's addresses replaced as they are elsewhere.
func TestAffinity(t *testing.T) {
	t.Parallel()
	name := proxy.PortName{Namespace: "secretspace", Name: "secretname", Port: "http", Proto: conntrack.TCP}
	client, endpoint, own := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddrPort("10.244.1.2:8080"), netip.MustParseAddr("192.0.2.1")
	var in, out bytes.Buffer
	w, err := record.NewWriter(&in, record.Header{Node: "node1", Addrs: []netip.Addr{own}})
	if err == nil {
		err = w.Affinity(record.Affinity{Complete: true, Clients: []record.Client{{Addr: client, Service: name, Endpoint: endpoint, Last: 5, Evicted: true}}})
	}
	if err == nil {
		err = w.End(0)
	}
	r := New(All, []byte("key"))
	r.Learn(&proxy.Snapshot{Services: []proxy.Service{{Name: name}}})
	if err == nil {
		err = r.Recording(&out, &in)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, clear := range []string{"secret", client.String(), own.String(), endpoint.Addr().String()} {
		if bytes.Contains(out.Bytes(), []byte(clear)) {
			t.Errorf("%s is still there", clear)
		}
	}
	rec, err := record.NewReader(&out)
	if err != nil {
		t.Fatal(err)
	}
	if h := rec.Header(); len(h.Addrs) != 1 || h.Addrs[0] != r.Addr(own) {
		t.Errorf("%v", h.Addrs)
	}
	it, err := rec.Next()
	want := record.Client{Addr: r.Addr(client), Service: r.PortName(name), Endpoint: r.AddrPort(endpoint), Last: 5, Evicted: true}
	if err != nil || it.Affinity == nil || !it.Affinity.Complete || len(it.Affinity.Clients) != 1 || it.Affinity.Clients[0] != want {
		t.Errorf("%+v, %v; want %+v", it.Affinity, err, want)
	}
}
