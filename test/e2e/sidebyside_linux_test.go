//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube"
)

// variant is one way to set up a kube-proxy, in upstream's flags and in ours.
type variant struct {
	name     string
	upstream []string
	ours     iptables.Config
}

func variants() []variant {
	cidrs := []netip.Prefix{}
	for _, s := range strings.Split(clusterCIDR, ",") {
		cidrs = append(cidrs, netip.MustParsePrefix(s))
	}
	return []variant{
		{"default", nil, iptables.Config{LocalhostNodePorts: true}},
		{"cluster-cidr", []string{"--cluster-cidr=" + clusterCIDR},
			iptables.Config{LocalhostNodePorts: true, ClusterCIDRs: cidrs}},
		{"masquerade-all", []string{"--masquerade-all", "--iptables-masquerade-bit=5", "--cluster-cidr=" + clusterCIDR},
			iptables.Config{LocalhostNodePorts: true, MasqueradeAll: true, MasqueradeMark: 1 << 5, ClusterCIDRs: cidrs}},
		{"no-localhost-nodeports", []string{"--iptables-localhost-nodeports=false"},
			iptables.Config{}},
	}
}

// TestSideBySide programs the same objects with upstream kube-proxy and with
// ours, each in a namespace of its own, and compares what the kernel then has.
func TestSideBySide(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, v := range variants() {
			t.Run(fl.String()+"/"+v.name, func(t *testing.T) {
				theirs, mine := newNode(t, c), newNode(t, c)
				startUpstream(t, c, theirs, fl, v.upstream...)
				if err := mine.Do(iptables.EnsureCounters); err != nil {
					t.Fatal(err)
				}
				ours := newOurs(mine, fl, v.ours)
				ours.sync(t, c)
				for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
					same(t, fl, family, mine, theirs)
				}
			})
		}
	}
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
	for _, p := range snap.Problems {
		t.Logf("problem: %v", p)
	}
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

func snapshot(t *testing.T, c *cluster) *proxy.Snapshot {
	t.Helper()
	var o kube.Objects
	services, err := c.client.CoreV1().Services(corev1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	slices, err := c.client.DiscoveryV1().EndpointSlices(corev1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := c.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.Services, o.Slices, o.Nodes = services.Items, slices.Items, nodes.Items
	return kube.Convert(&o, nodeName)
}

// same waits until both namespaces have the same rules and says how many.
func same(t *testing.T, fl xtables.Flavour, family xtables.Family, mine, theirs *netns.NS) {
	t.Helper()
	var c comparison
	eventually(t, fmt.Sprintf("the same %s rules", family), func() error {
		a, err := save(t.Context(), fl, family, mine)
		if err != nil {
			return err
		}
		b, err := save(t.Context(), fl, family, theirs)
		if err != nil {
			return err
		}
		if c = compare(a, b); len(c.differences) > 0 {
			return fmt.Errorf("%d differences:\n%s", len(c.differences), c)
		}
		return nil
	})
	t.Logf("%s %s: %s", fl, family, c)
}

func save(ctx context.Context, fl xtables.Flavour, family xtables.Family, ns *netns.NS) (*xtables.Ruleset, error) {
	tools := xtables.Tools{Netns: ns.Fd()}
	return tools.Save(ctx, fl, family, "", false)
}
