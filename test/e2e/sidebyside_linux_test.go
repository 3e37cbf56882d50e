//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube"
)

// variant is one way to set up a kube-proxy, in flags that upstream and ours
// both know.
type variant struct {
	name  string
	flags []string
}

func variants() []variant {
	return []variant{
		{"default", nil},
		{"cluster-cidr", []string{"--cluster-cidr=" + clusterCIDR}},
		{"cluster-cidr-v4", []string{"--cluster-cidr=10.244.0.0/16"}},
		{"masquerade-all", []string{"--masquerade-all", "--iptables-masquerade-bit=5", "--cluster-cidr=" + clusterCIDR}},
		{"no-localhost-nodeports", []string{"--iptables-localhost-nodeports=false"}},
		{"node-cidr", []string{"--detect-local-mode=NodeCIDR"}},
		{"bridge", []string{"--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"}},
		{"interface-prefix", []string{"--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"}},
		{"nodeport-addresses", []string{"--nodeport-addresses=192.0.2.0/24,198.51.100.0/24,fd00:1::/64"}},
		{"nodeport-loopback", []string{"--nodeport-addresses=127.0.0.0/8,192.0.2.0/24"}},
		{"nodeport-none", []string{"--nodeport-addresses=10.99.0.0/16,fd00:99::/64"}},
		{"nodeport-primary", []string{"--nodeport-addresses=primary"}},
		{"tcp-be-liberal", []string{"--conntrack-tcp-be-liberal"}},
	}
}

// TestSideBySide programs the same objects with upstream kube-proxy and with
// kptrace proxy, each in a namespace of its own and both with the same flags,
// and compares what the kernel then has.
func TestSideBySide(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	for _, fl := range flavours(t) {
		for _, v := range variants() {
			t.Run(fl.String()+"/"+v.name, func(t *testing.T) {
				p := newDropIn(t, c, fl, v.flags...)
				p.await(t, "shop/clusterip:http")
				p.same(t)
			})
		}
	}
}

// flavours are those in which upstream kube-proxy can program the whole fixture.
// It does so in one commit, and in a user namespace iptables-nft takes about
// 300 rules at once; TestSideBySidePieces is for that case.
func flavours(t *testing.T) []xtables.Flavour {
	t.Helper()
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(string(ids)); len(f) == 3 && f[2] == "4294967295" {
		return []xtables.Flavour{xtables.NFT, xtables.Legacy}
	}
	return []xtables.Flavour{xtables.Legacy}
}

// TestSideBySidePieces programs a few Services of the fixture at a time, each
// lot in place of the one before.
func TestSideBySidePieces(t *testing.T) {
	t.Parallel()
	const size = 8
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112"})
	(&objects{}).create(t, c.client)
	p := newPair(t, c, xtables.NFT)
	all := fixture()
	piece := &objects{}
	for services := range slices.Chunk(all.services, size) {
		for _, s := range piece.services {
			if err := c.client.CoreV1().Services(namespace).Delete(t.Context(), s.Name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.client.DiscoveryV1().EndpointSlices(namespace).DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
			t.Fatal(err)
		}
		piece = &objects{services: services}
		for _, s := range all.slices {
			if slices.ContainsFunc(services, func(o *corev1.Service) bool { return o.Name == s.Labels[discoveryv1.LabelServiceName] }) {
				piece.slices = append(piece.slices, s)
			}
		}
		piece.write(t, c.client)
		p.compare(t, c)
	}
}

// TestSideBySideChanges changes the objects under two running proxies of each
// flavour and compares after every step.
func TestSideBySideChanges(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112"})
	fixture().create(t, c.client)
	pairs := map[xtables.Flavour]*pair{}
	for _, fl := range flavours(t) {
		p := newPair(t, c, fl)
		pairs[fl] = p
		p.compare(t, c)
		text, err := (&xtables.Tools{Netns: p.mine.Fd()}).SaveText(t.Context(), fl, xtables.IPv4, "", false)
		if err != nil {
			t.Fatal(err)
		}
		checkMutations(t, text)
	}
	for _, s := range steps() {
		ok := t.Run(s.name, func(t *testing.T) {
			if err := s.do(t.Context(), c.client); err != nil {
				t.Fatal(err)
			}
			for _, p := range pairs {
				p.compare(t, c)
			}
		})
		if !ok {
			break // the others would tell the same again
		}
	}
	for _, p := range pairs {
		before, err := save(t.Context(), p.flavour, xtables.IPv4, p.mine)
		if err != nil {
			t.Fatal(err)
		}
		p.ours.forget()
		p.compare(t, c)
		after, err := save(t.Context(), p.flavour, xtables.IPv4, p.mine)
		if err != nil {
			t.Fatal(err)
		}
		if c := compare(before, strip(after)); len(c.differences) > 0 {
			t.Errorf("%s: reading the tables anew changes them:\n%s", p.flavour, c)
		}
	}
}

// pair is upstream kube-proxy and ours, each in its namespace.
type pair struct {
	flavour      xtables.Flavour
	theirs, mine *netns.NS
	upstream     *exec.Process
	restart      func() *exec.Process // starts upstream
	kptrace      *exec.Process        // nil where ours is not a process of its own
	ours         ours
}

// newPair has our backend in this process, so that it can be told what to do.
func newPair(t *testing.T, c *cluster, fl xtables.Flavour) *pair {
	t.Helper()
	p := &pair{flavour: fl, theirs: newNode(t, c), mine: newNode(t, c)}
	p.restart = func() *exec.Process { return startUpstream(t, c, p.theirs, fl, "--cluster-cidr="+clusterCIDR) }
	p.upstream = p.restart()
	if err := p.mine.Do(iptables.EnsureCounters); err != nil {
		t.Fatal(err)
	}
	cfg := iptables.Config{LocalhostNodePorts: true}
	for s := range strings.SplitSeq(clusterCIDR, ",") {
		cfg.ClusterCIDRs = append(cfg.ClusterCIDRs, netip.MustParsePrefix(s))
	}
	p.ours = newOurs(p.mine, fl, cfg)
	return p
}

// newDropIn has kptrace as a process with the same flags as upstream.
func newDropIn(t *testing.T, c *cluster, fl xtables.Flavour, flags ...string) *pair {
	t.Helper()
	p := &pair{flavour: fl, theirs: newNode(t, c), mine: newNode(t, c)}
	p.restart = func() *exec.Process { return startUpstream(t, c, p.theirs, fl, flags...) }
	p.upstream = p.restart()
	p.kptrace = startKptrace(t, c, p.mine, fl, flags...)
	return p
}

// compare waits until both have the same rules for what the API server has now,
// and says how many.
func (p *pair) compare(t *testing.T, c *cluster) {
	t.Helper()
	p.ours.sync(t, c)
	p.same(t)
}

// same waits until both have the same rules. Upstream kube-proxy misses a
// change of the Node's zone now and then (it forgets that it must write all
// again); started anew it has what it should have.
func (p *pair) same(t *testing.T) {
	t.Helper()
	if err := p.agree(t, 15*time.Second); err != nil {
		t.Logf("starting upstream kube-proxy anew, as it differs: %v", err)
		end(t, p.upstream)
		p.upstream = p.restart()
		if err := p.agree(t, 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
}

func (p *pair) agree(t *testing.T, within time.Duration) error {
	t.Helper()
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		var last comparison
		err := retry(t.Context(), within, func() (err error) {
			last, err = p.look(t.Context(), family)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s %s: %w", p.flavour, family, err)
		}
		t.Logf("%s %s: %s", p.flavour, family, last)
	}
	return nil
}

// look compares once.
func (p *pair) look(ctx context.Context, family xtables.Family) (comparison, error) {
	for _, proxy := range []*exec.Process{p.upstream, p.kptrace} {
		if proxy == nil {
			continue
		}
		select {
		case <-proxy.Done():
			return comparison{}, fmt.Errorf("a proxy ended: %w", proxy.Wait())
		default:
		}
	}
	a, err := save(ctx, p.flavour, family, p.mine)
	if err != nil {
		return comparison{}, err
	}
	b, err := save(ctx, p.flavour, family, p.theirs)
	if err != nil {
		return comparison{}, err
	}
	c := compare(a, b)
	switch {
	case len(c.differences) > 0:
		return c, fmt.Errorf("%d differences:\n%s", len(c.differences), c)
	case c.chains == 0:
		return c, errors.New("nothing is programmed yet")
	}
	return c, nil
}

// ours is our proxy of both families in one namespace.
type ours struct{ backends []*iptables.Backend }

func newOurs(ns *netns.NS, fl xtables.Flavour, cfg iptables.Config) ours {
	var o ours
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		cfg.Family, cfg.Flavour, cfg.Trace, cfg.Counters = family, fl.String(), true, true
		cfg.Tools = xtables.Tools{Netns: ns.Fd()}
		o.backends = append(o.backends, iptables.New(cfg))
	}
	return o
}

// sync programs what the API server has now.
func (o ours) sync(t *testing.T, c *cluster) {
	t.Helper()
	snap := snapshot(t, c)
	for _, b := range o.backends {
		prog := b.Render(snap, proxy.Overlay{})
		for _, p := range prog.Problems() {
			t.Errorf("problem: %v", p)
		}
		if _, err := b.Apply(t.Context(), prog); err != nil {
			t.Error(err)
		}
	}
}

// forget has the next sync read what the kernel has.
func (o ours) forget() {
	for _, b := range o.backends {
		b.Forget()
	}
}

func snapshot(t *testing.T, c *cluster) *proxy.Snapshot {
	t.Helper()
	var o kube.Objects
	services, err := c.client.CoreV1().Services(corev1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	endpoints, err := c.client.DiscoveryV1().EndpointSlices(corev1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := c.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.Services, o.Slices, o.Nodes = services.Items, endpoints.Items, nodes.Items
	return kube.Convert(&o, nodeName)
}

func save(ctx context.Context, fl xtables.Flavour, family xtables.Family, ns *netns.NS) (*xtables.Ruleset, error) {
	tools := xtables.Tools{Netns: ns.Fd()}
	return tools.Save(ctx, fl, family, "", false)
}
