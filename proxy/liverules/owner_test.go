package liverules_test

import (
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

func TestOwner(t *testing.T) {
	for _, c := range []struct{ chain, rule, want string }{
		{"KUBE-SVC-NPX46M4PTMTKRN6Y", "-j ACCEPT", "kube-proxy"},
		{"KUBE-KUBELET-CANARY", "-j ACCEPT", "kubelet"},
		{"KUBE-POD-FW-ABC", "-j DROP", "NetworkPolicy (kube-router)"},
		{"FORWARD", "-j DOCKER-USER", "Docker"},
		{"FORWARD", "-i docker0 ! -o docker0 -j ACCEPT", "Docker"},
		{"FORWARD", "-i br-0a1b2c -j ACCEPT", "Docker"},
		{"cali-tw-cali0foo1", "-j DROP", "NetworkPolicy (Calico)"},
		{"cali-FORWARD", "-j DROP", "Calico"},
		{"FORWARD", `-m comment --comment "cali:S93hcgKJrXEqnTfs" -j ACCEPT`, "Calico"},
		{"INPUT", "-j INPUT_ZONES", "firewalld"},
		{"FWDI_public", "-j REJECT --reject-with icmp-host-prohibited", "firewalld"},
		{"PREROUTING", `-p udp -m comment --comment "NodeLocal DNS Cache: skip conntrack" -j NOTRACK`, "NodeLocal DNSCache"},
		{"CNI-HOSTPORT-DNAT", "-j ACCEPT", "the CNI portmap plugin (hostPort)"},
		{"CILIUM_FORWARD", "-j ACCEPT", "Cilium"},
		{"FORWARD", `-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD`, "kube-proxy"},
		{"mine", "-j DROP", ""},
		{"FORWARD", "-s 10.0.0.0/8 -j DROP", ""},
	} {
		r, err := xtables.ParseRule(xtables.IPv4, c.rule)
		if err != nil {
			t.Fatal(err)
		}
		if got := liverules.Owner("filter", c.chain, r); got != c.want {
			t.Errorf("%s %q is of %q, want %q", c.chain, c.rule, got, c.want)
		}
	}
}

// TestPolicyOwner names who set the policy at which a way ends, by what else he has.
func TestPolicyOwner(t *testing.T) {
	for _, c := range []struct{ chains, want string }{
		{":DOCKER - [0:0]\n", "Docker"},
		{":DOCKER-USER - [0:0]\n", "Docker"},
		{":ufw-before-forward - [0:0]\n", "ufw"},
		{":mine - [0:0]\n", ""},
	} {
		rs, err := xtables.Parse(xtables.IPv4, "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n"+c.chains+"COMMIT\n")
		if err != nil {
			t.Fatal(err)
		}
		ways := liverules.New(liverules.Config{}, rs).Ways(proxy.Packet{
			Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.1.0.1:4000"), Dst: netip.MustParseAddrPort("10.1.0.2:80"),
		})
		n := 0
		for _, w := range ways {
			if w.Reason == "policy-drop" {
				if n++; w.Owner != c.want {
					t.Errorf("%s: the policy is of %q, want %q", c.chains, w.Owner, c.want)
				}
			}
		}
		if n == 0 {
			t.Errorf("%s: no way ends at the policy: %+v", c.chains, ways)
		}
	}
}

// TestHash holds names against those of upstream's own tests.
func TestHash(t *testing.T) {
	svc := proxy.PortName{Namespace: "ns4", Name: "svc4", Port: "p80", Proto: conntrack.TCP}
	if got := liverules.Hash(svc, netip.AddrPort{}); got != "4SW47YFZTEDKD3PK" {
		t.Errorf("Service: %s", got)
	}
	if got := liverules.Hash(svc, netip.MustParseAddrPort("10.180.0.5:80")); got != "C6EBXVWJJZMIWKLZ" {
		t.Errorf("endpoint: %s", got)
	}
}

// FuzzServices reads whatever parses as rules.
func FuzzServices(f *testing.F) {
	f.Add(`*nat
:KUBE-SERVICES - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "a/b:c cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
-A KUBE-SVC-A -j KUBE-SVC-A
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80
COMMIT
`)
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := xtables.Parse(xtables.IPv4, text)
		if err != nil {
			return
		}
		p := liverules.New(liverules.Config{}, rs)
		for _, s := range p.Services() {
			for i := range s.Fronts {
				sum := s.Fronts[i].Missing
				for _, c := range s.Fronts[i].Choices {
					sum += c.Probability
				}
				if sum > 1.001 {
					t.Errorf("odds of %v add up to %v", s.Fronts[i].String(), sum)
				}
			}
		}
		p.Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.0.0.9:1"), Dst: netip.MustParseAddrPort("10.96.0.10:80")})
	})
}
