package iptables

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/proxy"
)

// foreign is what others have on a node: the kubelet, a CNI, an administrator.
const foreign = `*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
-A PREROUTING -m comment --comment "somebody else's" -j ACCEPT
COMMIT
*filter
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
:MY-SERVICES - [0:0]
-A INPUT -j KUBE-ROUTER-INPUT
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j MY-SERVICES
-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked packets" -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-ROUTER-INPUT -p tcp -m tcp --dport 10250 -j ACCEPT
COMMIT
*nat
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SVCX - [0:0]
:MINE - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m comment --comment "kubernetes service portals" -j MINE
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 8088 -j DNAT --to-destination 10.0.0.9:80
COMMIT
`

func TestCleanup(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		restore(t, cfg, foreign)
		before := save(t, cfg)
		b := New(cfg)
		for range 2 {
			p := b.Render(overall(), proxy.Overlay{})
			if _, err := b.Apply(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			if save(t, cfg) == before {
				t.Fatal("nothing was programmed")
			}
			for range 2 {
				if err := New(cfg).Cleanup(t.Context()); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, save(t, cfg)); d != "" {
					t.Fatalf("rules of others (-before +after):\n%s", d)
				}
			}
			b.Forget()
		}
	})
}

// TestCleanupAlone leaves no rule and no chain where there is no kubelet.
func TestCleanupAlone(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		mustApply(t, b, overall())
		if err := b.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(save(t, cfg)) {
			if strings.HasPrefix(l, "-A") || strings.Contains(l, "KUBE") || strings.Contains(l, "KPTRACE") {
				t.Errorf("left behind: %s", l)
			}
		}
		mustApply(t, b, overall())
	})
}

func TestCleanupKeepsWhatOthersUse(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		mustApply(t, b, overall())
		restore(t, cfg, "*nat\n:MINE - [0:0]\n-A MINE -j KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT\n")
		err := b.Cleanup(t.Context())
		if err == nil || !strings.Contains(err.Error(), "KUBE-SVC-XPGD46QRK7WJZT7O stays") {
			t.Errorf("error = %v, want one about KUBE-SVC-XPGD46QRK7WJZT7O", err)
		}
		live := save(t, cfg)
		if n := strings.Count(live, "-A "); !strings.Contains(live, "-A MINE -j KUBE-SVC-XPGD46QRK7WJZT7O") || n != 7 {
			t.Errorf("%d rules are left, want those that MINE leads to:\n%s", n, live)
		}
	})
}
