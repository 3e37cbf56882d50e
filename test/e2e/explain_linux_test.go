//go:build e2e

package e2e

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace/check"
)

// fixturesEnv names a folder to which TestExplainUpstream writes what upstream's
// rules look like, for tests that have no control plane.
const fixturesEnv = "KPTRACE_FIXTURES"

// TestExplainUpstream reads what upstream kube-proxy writes for the whole fixture:
// a check finds nothing wrong, every Service is found with odds that add up to 1,
// and a walk through the live rules ends where our own mode's does. Rules that are
// taken away are noticed.
func TestExplainUpstream(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	snap := snapshot(t, c)
	for _, fl := range flavours(t) {
		t.Run(fl.String(), func(t *testing.T) {
			ns := newNode(t, c)
			startUpstream(t, c, ns, fl, "--cluster-cidr="+clusterCIDR)
			tools := xtables.Tools{Netns: ns.Fd()}
			state := &check.State{Node: nodeName, Snapshot: snap}
			for _, a := range localAddrs {
				state.Addrs = append(state.Addrs, netip.MustParsePrefix(a).Addr())
			}
			state.Addrs = append(state.Addrs, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
			look := func() ([]check.Finding, error) {
				state.Dumps, state.Now = nil, time.Now()
				for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
					rs, err := tools.Save(t.Context(), fl, family, "", false)
					if err != nil {
						return nil, err
					}
					state.Dumps = append(state.Dumps, xtables.Dump{Family: family, Flavour: fl, Rules: rs})
				}
				return check.Run(state, check.Options{}), nil
			}
			eventually(t, "a check that finds nothing", func() error {
				found, err := look()
				for _, d := range state.Dumps {
					if err == nil && len(xtables.LiveKube(d.Rules)) == 0 {
						err = fmt.Errorf("nothing of %v yet", d.Family)
					}
				}
				if err == nil && len(found) > 0 {
					err = fmt.Errorf("%d findings, the first is %+v", len(found), found[0])
				}
				return err
			})
			var rulesets []*xtables.Ruleset
			for _, d := range state.Dumps {
				rulesets = append(rulesets, d.Rules)
				writeFixture(t, tools, fl, d.Family)
			}
			live := liverules.New(liverules.Config{Addrs: state.Addrs, Snapshot: snap}, rulesets...)
			sameWalks(t, snap, live, false)
			taken(t, fl, state)
		})
	}
}

// TestExplainUpstreamNFTables reads what upstream kube-proxy writes in nftables mode
// for the whole fixture: every Service is found with odds that add up to 1, and a walk
// through the live rules ends where our own mode's does.
func TestExplainUpstreamNFTables(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	ns := newNode(t, c)
	startUpstream(t, c, ns, xtables.NFT, "--proxy-mode=nftables", "--cluster-cidr="+clusterCIDR)
	var text string
	last := ""
	eventually(t, "rules that stay as they are", func() error {
		res, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: []string{"list", "ruleset"}, Netns: ns.Fd()})
		text = string(res.Stdout)
		if err == nil && (text != last || strings.Count(text, " dnat to ") < 20) {
			last, err = text, fmt.Errorf("%d endpoints so far", strings.Count(text, "dnat to"))
		}
		return err
	})
	if dir := os.Getenv(fixturesEnv); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "upstream-nftables.rules"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cfg := nftables.Config{Addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}}
	for _, a := range localAddrs {
		cfg.Addrs = append(cfg.Addrs, netip.MustParsePrefix(a).Addr())
	}
	live, err := nftables.Parse(cfg, text)
	if err != nil {
		t.Fatal(err)
	}
	sameWalks(t, snapshot(t, c), live, true)
	if u := live.Unknown(); len(u) > 0 {
		t.Errorf("%d rules could not be evaluated: %v", len(u), u)
	}
}

func writeFixture(t *testing.T, tools xtables.Tools, fl xtables.Flavour, family xtables.Family) {
	t.Helper()
	dir := os.Getenv(fixturesEnv)
	if dir == "" {
		return
	}
	text, err := tools.SaveText(t.Context(), fl, family, "", false)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("upstream-%v-%v.rules", fl, family)), []byte(text), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// walker is what live rules mean.
type walker interface {
	Services() []*liverules.Service
	Walk(pkt proxy.Packet) proxy.Outcome
}

// sameWalks sends packets of each kind of client to each address of each Service
// through upstream's live rules and through what our own mode wants.
func sameWalks(t *testing.T, snap *proxy.Snapshot, live walker, modesDiffer bool) {
	t.Helper()
	cfg := iptables.Config{LocalhostNodePorts: true}
	cfg.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")}
	ours := iptables.NewDual(cfg).Render(snap, proxy.Overlay{})
	walks := 0
	for _, s := range live.Services() {
		for i := range s.Fronts {
			f := &s.Fronts[i]
			if f.Missing > 0 {
				t.Errorf("%s at %v: a share of %v goes nowhere", s.Name, f, f.Missing)
			}
			dst := f.Addr
			if !dst.IsValid() {
				if dst = netip.MustParseAddr("192.0.2.1"); s.IP6 {
					dst = netip.MustParseAddr("fd00:1::1")
				}
			}
			clients := []string{"10.244.1.77", "203.0.113.99", "192.0.2.1"}
			if s.IP6 {
				clients = []string{"fd00:244:0:1::77", "2001:db8::99", "fd00:1::1"}
			}
			for _, client := range clients {
				pkt := proxy.Packet{Proto: s.Name.Proto, Src: netip.AddrPortFrom(netip.MustParseAddr(client), 40000),
					Dst: netip.AddrPortFrom(dst, f.Port), FromNode: client == clients[2]}
				a, b := live.Walk(pkt), ours.Walk(pkt)
				walks++
				if len(a.Choices)+len(b.Choices) == 0 && modesDiffer && (a.Verdict == proxy.Reject || a.Verdict == proxy.Drop) {
					continue // nftables mode refuses earlier, and what comes from the node too
				}
				if a.Verdict != b.Verdict || a.Service != b.Service || len(a.Choices) != len(b.Choices) {
					t.Errorf("%s %v -> %v: live %v %v %d choices, ours %v %v %d", pkt.Proto, pkt.Src, pkt.Dst,
						a.Verdict, a.Service, len(a.Choices), b.Verdict, b.Service, len(b.Choices))
					continue
				}
				sum := 0.0
				for _, x := range a.Choices {
					sum += x.Probability
					y, ok := b.Find(x.Endpoint)
					if !ok || math.Abs(x.Probability-y.Probability) > 1e-8 || x.Masquerade != y.Masquerade {
						t.Errorf("%s %v -> %v: live %v %v %q, ours %v %v %q", pkt.Proto, pkt.Src, pkt.Dst,
							x.Endpoint, x.Probability, x.Masquerade, y.Endpoint, y.Probability, y.Masquerade)
					}
				}
				if a.Verdict == proxy.Forward && math.Abs(sum-1) > 1e-8 {
					t.Errorf("%s: odds add up to %v", s.Name, sum)
				}
			}
		}
	}
	if walks < 300 {
		t.Errorf("only %d packets were walked: %d Services", walks, len(live.Services()))
	}
	t.Logf("%d Services, %d packets walked", len(live.Services()), walks)
}

// taken deletes a rule of each kind from the live rules of upstream, one at a time,
// and wants a check to notice.
func taken(t *testing.T, fl xtables.Flavour, state *check.State) {
	t.Helper()
	nat := state.Dumps[0].Rules.Table("nat")
	done := map[liverules.Kind]int{}
	for _, c := range nat.Chains {
		kind := liverules.KindOf(c.Name)
		if kind == liverules.KindNone || done[kind] >= 2 || len(c.Rules) == 0 {
			continue
		}
		for i, r := range c.Rules {
			if liverules.KindOf(r.Target) == liverules.KindNone && r.Target != "DNAT" {
				continue
			}
			// As `iptables -t nat -D CHAIN n` would leave it.
			d := state.Dumps[0]
			changed, err := xtables.Parse(xtables.IPv4, d.Rules.String())
			if err != nil {
				t.Fatal(err)
			}
			chain := changed.Chain("nat", c.Name)
			chain.Rules = append(chain.Rules[:i:i], chain.Rules[i+1:]...)
			x := *state
			x.Dumps = []xtables.Dump{{Family: d.Family, Flavour: fl, Rules: changed}, state.Dumps[1]}
			if found := check.Run(&x, check.Options{}); len(found) == 0 {
				t.Errorf("not noticed: %s without %s", c.Name, r)
			}
			done[kind]++
			break
		}
	}
	if done[liverules.KindCluster] == 0 || done[liverules.KindEndpoint] == 0 {
		t.Errorf("nothing was taken away: %v", done)
	}
}
