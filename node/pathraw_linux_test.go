package node

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// TestRulesBeforeOurs has somebody put a rule before ours in raw while paths are traced:
// with iptables-nft it is shown, of both families, and nothing of ours is. Nothing is
// left then.
func TestRulesBeforeOurs(t *testing.T) {
	for _, six := range []bool{false, true} {
		w := proxytest.NewWorld(t, six)
		setup := proxytest.Setup{Snapshot: proxytest.Services("shop/web:p tcp 10.96.3.10:80 a:8080"), ClusterCIDR: proxytest.ClusterCIDR}
		to, save := netip.MustParseAddrPort("10.96.3.10:80"), "iptables-nft"
		if six {
			setup = proxytest.Setup{Snapshot: proxytest.Snapshot6(setup.Snapshot), MasqueradeAll: true}
			to, save = netip.AddrPortFrom(proxytest.In6(to.Addr()), 80), "ip6tables-nft"
		}
		rig := newPathRig(t, w.Node, xtables.NFT, six)
		b := backendFor(setup, w.Node, xtables.NFT, six)
		if _, err := b.Apply(t.Context(), b.Render(setup.Snapshot, proxy.Overlay{})); err != nil {
			t.Fatal(err)
		}
		rig.follow(t.Context(), setup.Snapshot, 1)
		if err := rig.sel.Late(); err != nil {
			t.Fatal(err)
		}
		for _, args := range []string{"-t raw -I PREROUTING -p tcp --dport 80 -j CT --notrack", "-t raw -A PREROUTING -p tcp --dport 80 -m mark --mark 0"} {
			if _, err := exec.Run(t.Context(), exec.Spec{Path: save, Args: strings.Fields("-w " + args), Netns: w.Node.Fd()}); err != nil {
				t.Fatal(err)
			}
		}
		guard := "table inet guard {\n chain early {\n type filter hook prerouting priority -350;\n tcp dport 80 notrack\n }\n}\n"
		if _, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: []string{"-f", "-"}, Stdin: strings.NewReader(guard), Netns: w.Node.Fd()}); err != nil {
			t.Fatal(err)
		}
		rig.reload(t.Context())
		w.Must(w.NS[proxytest.FromPod].Do(func() error { proxytest.Send(conntrack.TCP, 20000, to, 50*time.Millisecond); return nil }))
		seen, ok := rig.find(20000, "SYN")
		if !ok {
			t.Fatal("not seen")
		}
		var met []string
		for _, s := range seen.Path.Steps() {
			if s.Table != "mangle" && s.Table != "filter" && s.Table != "nat" {
				met = append(met, s.Table+"/"+s.Chain+" "+s.Text)
			}
		}
		if got := strings.Join(met, "; "); !strings.HasPrefix(got, "guard/early tcp dport 80 notrack; raw/PREROUTING -p tcp -m tcp --dport 80 -j CT --notrack; raw/PREROUTING -p tcp") || len(met) != 3 {
			t.Errorf("six %t: in raw it met %q", six, got)
		}
		var why []string
		for i := range seen.Path.Hops {
			if h := &seen.Path.Hops[i]; h.Untracks() {
				why = append(why, h.Purpose)
			}
		}
		if got := strings.Join(why, "; "); got != "not tracked: guard says notrack; not tracked: raw says NOTRACK" {
			t.Errorf("six %t: it means %q", six, got)
		}
		w.Must(w.Node.Do(func() error { return rig.sel.Close(t.Context()) }))
		out, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: []string{"list", "tables"}, Netns: w.Node.Fd()})
		if err != nil || strings.Contains(string(out.Stdout), "kptrace") {
			t.Errorf("left: %s %v", out.Stdout, err)
		}
	}
}
