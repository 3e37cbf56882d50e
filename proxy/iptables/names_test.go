package iptables

import (
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

func TestNames(t *testing.T) {
	tests := []struct {
		ns, name, port, proto, service, endpoint, hash string
	}{
		{"ns1", "svc1", "p80", "tcp", "XPGD46QRK7WJZT7O", "10.180.0.1:80", "SXIVWICOYRO3J4NJ"},
		{"ns2", "svc2", "p80", "tcp", "GNZBNJ2PO5MGZ6GT", "10.180.0.2:80", "RS4RBKLTHTF2IUXJ"},
		{"ns3", "svc3", "p80", "tcp", "X27LE4BHSL4DOUIK", "10.180.0.3:80", "OYPFS5VJICHGATKP"},
		{"ns4", "svc4", "p80", "tcp", "4SW47YFZTEDKD3PK", "10.180.0.4:80", "UKSFD7AGPMPPLUHC"},
		{"ns4", "svc4", "p80", "tcp", "4SW47YFZTEDKD3PK", "10.180.0.5:80", "C6EBXVWJJZMIWKLZ"},
		{"ns5", "svc5", "p80", "tcp", "NUKIZ6OKUXPJNT4C", "10.180.0.3:80", "I77PXRDZVX7PMWMN"},
		{"default", "kubernetes", "https", "tcp", "NPX46M4PTMTKRN6Y", "172.18.0.2:6443", "V2PECCYPB6X2GSCW"},
		{"kube-system", "kube-dns", "dns", "udp", "TCOU7JCQXEZGVUNU", "10.244.0.2:53", "YIL6JZP7A3QYXJU2"},
		{"kube-system", "kube-dns", "dns-tcp", "tcp", "ERIFXISQEP7F7OF4", "10.244.0.2:53", "IT2ZTR26TO4XFPTO"},
		{"kube-system", "kube-dns", "metrics", "tcp", "JD5MR3NA4I4DYORP", "10.244.0.2:9153", "N4G2XR5TDX7PQE7P"},
		{"ns1", "svc1", "", "tcp", "AQI2S6QIMU7PVVRP", "10.180.0.1:80", "RD5U5EMOXIC4RU5H"},
		{"ns1", "svc1", "p80", "tcp", "XPGD46QRK7WJZT7O", "[fd00:10:180::1]:80", "OGYCNMB4EMRUSJ6N"},
		{"ns1", "svc1", "p80", "sctp", "GFCIFIA5VTFSTMSM", "10.180.0.1:80", "RFW33Y6OHVBQ4W3M"},
	}
	for _, tt := range tests {
		proto, err := conntrack.ParseProto(tt.proto)
		if err != nil {
			t.Fatal(err)
		}
		n := proxy.PortName{Namespace: tt.ns, Name: tt.name, Port: tt.port, Proto: proto}
		if got := serviceHash(n); got != tt.service {
			t.Errorf("serviceHash(%s %s) = %s, want %s", n, proto, got, tt.service)
		}
		if got := endpointHash(n, netip.MustParseAddrPort(tt.endpoint)); got != tt.hash {
			t.Errorf("endpointHash(%s %s, %s) = %s, want %s", n, proto, tt.endpoint, got, tt.hash)
		}
	}
}
