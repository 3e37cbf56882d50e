//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
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
// through the live rules ends where our own mode's does. Rules changed by hand are noticed
// by a check.
func TestExplainUpstreamNFTables(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	ns := newNode(t, c)
	upstream := startUpstream(t, c, ns, xtables.NFT, "--proxy-mode=nftables", "--cluster-cidr="+clusterCIDR)
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
		writeState(t, c, filepath.Join(dir, "nftables-state"))
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
	end(t, upstream)
	noticed(t, c, ns, text)
}

// noticed changes the live rules by hand, and wants kptrace check, which reads them and
// asks the API server, to say each time what is wrong, and nothing before.
func noticed(t *testing.T, c *cluster, ns *netns.NS, text string) {
	t.Helper()
	const table = "ip kube-proxy"
	nft := func(script string) {
		t.Helper()
		if _, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: []string{"-f", "-"}, Netns: ns.Fd(), Stdin: strings.NewReader(script)}); err != nil {
			t.Fatalf("%v: %s", err, script)
		}
	}
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		t.Fatal(err)
	}
	said := ""
	findings := func() (code int, found []string) {
		t.Helper()
		res, err := exec.Run(t.Context(), exec.Spec{Path: binary, Netns: ns.Fd(), Args: []string{
			"check", "-o", "json", "--kubeconfig=" + c.Kubeconfig(controlplane.KubeProxy), "--node=" + nodeName, "--ignore=bridge-nf-call", "--ignore=rp-filter", "--ignore=ip-forward",
		}})
		var doc struct{ Findings []check.Finding }
		if e := json.Unmarshal(res.Stdout, &doc); e != nil {
			t.Fatalf("%v: %v: %s", err, e, res.Stderr)
		}
		said = string(res.Stdout)
		for _, f := range doc.Findings {
			found = append(found, f.Code+" "+f.Object)
		}
		return res.ExitCode, found
	}
	if code, found := findings(); code != 0 || len(found) > 0 {
		t.Fatalf("exit %d of a healthy node: %v\n%s", code, found, said)
	}
	one := service(t, c, "one").Spec.ClusterIP
	// rule finds one by the end of its chain's name and what is in it.
	rule := func(kind, chain, with string) nftables.Listed {
		t.Helper()
		res, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: []string{"-a", "-s", "list", "table", "ip", "kube-proxy"}, Netns: ns.Fd()})
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range nftables.List(string(res.Stdout)) {
			if strings.HasPrefix(l.Chain, kind) && strings.HasSuffix(l.Chain, chain) && strings.Contains(l.Text, with) {
				return l
			}
		}
		t.Fatalf("no rule with %q in a chain %q", with, chain)
		return nftables.Listed{}
	}
	replace := func(l nftables.Listed, old, instead string) string {
		return fmt.Sprintf("replace rule %s %s handle %d %s", table, l.Chain, l.Handle, strings.Replace(l.Text, old, instead, 1))
	}
	do := func(script string) func() string { return func() string { return script } }
	const third = "shop/affinity/tcp/http__10.244.2.12/8080"
	to, gone := rule("service-", "-shop/one/tcp/http", "dnat").Chain, rule("endpoint-", third, "dnat").Chain
	for _, m := range []struct {
		name   string
		script func() string
		want   string
		broken bool
	}{
		{"an element of the Services is gone", do("delete element " + table + " service-ips { " + one + " . tcp . 80 }"), "service-missing shop/one:http", true},
		{"the modulus of a map", func() string {
			return replace(rule("service-", "-shop/clusterip/tcp/http", "mod 3 map"), "mod 3", "mod 4")
		}, "odds-missing shop/clusterip:http", true},
		{"the modulus of a vmap", func() string {
			return replace(rule("service-", "-shop/affinity/tcp/http", "mod 3 vmap"), "mod 3", "mod 4")
		}, "odds-missing shop/affinity:http", true},
		{"an endpoint's chain is gone", func() string {
			asks := rule("service-", "-shop/affinity/tcp/http", "saddr @affinity-"+strings.TrimPrefix(gone, "endpoint-"))
			pick := replace(rule("service-", "-shop/affinity/tcp/http", "mod 3 vmap"), "mod 3", "mod 2")
			return fmt.Sprintf("delete rule %s %s handle %d\n%s\ndelete chain %s %s", table, asks.Chain, asks.Handle, strings.Replace(pick, ", 2 : goto "+gone, "", 1), table, gone)
		}, "endpoint-missing shop/affinity:http", false},
		{"an endpoint's chain is empty", do("flush chain " + table + " " + gone), "odds-missing shop/affinity:http", true},
		{"an element too many", do("add element " + table + " service-ips { 10.96.9.9 . tcp . 80 : goto " + to + " }"), "service-extra shop/one:http", true},
		{"a cluster IP too many", do("add element " + table + " cluster-ips { 10.96.9.9 }"), "element-extra kube-proxy/cluster-ips", false},
		{"somebody drops it", do("add table ip guard\nadd chain ip guard forward { type filter hook forward priority 0; }\nadd rule ip guard forward tcp dport 8080 drop"), "forward-dropped shop/one:http", true},
		{"somebody keeps it from connection tracking", do("add table inet guard\nadd chain inet guard pre { type filter hook prerouting priority raw; }\nadd rule inet guard pre ip daddr " + one + " notrack"), "not-tracked shop/one:http", true},
	} {
		nft(m.script())
		code, found := findings()
		if !slices.Contains(found, m.want) || (code == 3) != m.broken {
			t.Errorf("%s: exit %d, no %q in %v", m.name, code, m.want, found)
		}
		t.Logf("%s: %v", m.name, found)
		nft("add table ip guard\ndelete table ip guard\nadd table inet guard\ndelete table inet guard\ndelete table ip kube-proxy\ndelete table ip6 kube-proxy\n" + text)
	}
	if code, found := findings(); code != 0 || len(found) > 0 {
		t.Errorf("exit %d when all is undone: %v\n%s", code, found, said)
	}
}

// writeState writes what the API server has into a folder, for tests that have none.
func writeState(t *testing.T, c *cluster, dir string) {
	t.Helper()
	var b bytes.Buffer
	add := func(kind, version string, o any, meta *metav1.ObjectMeta, types *metav1.TypeMeta) {
		*meta = metav1.ObjectMeta{Namespace: meta.Namespace, Name: meta.Name, Labels: meta.Labels, Annotations: meta.Annotations}
		*types = metav1.TypeMeta{Kind: kind, APIVersion: version}
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "---\n%s\n", text)
	}
	nodes, err1 := c.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	services, err2 := c.client.CoreV1().Services(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	endpoints, err3 := c.client.DiscoveryV1().EndpointSlices(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	for i := range nodes.Items {
		x := &nodes.Items[i]
		add("Node", "v1", x, &x.ObjectMeta, &x.TypeMeta)
	}
	for i := range services.Items {
		x := &services.Items[i]
		add("Service", "v1", x, &x.ObjectMeta, &x.TypeMeta)
	}
	for i := range endpoints.Items {
		x := &endpoints.Items[i]
		add("EndpointSlice", "discovery.k8s.io/v1", x, &x.ObjectMeta, &x.TypeMeta)
	}
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "objects.yaml"), b.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
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
