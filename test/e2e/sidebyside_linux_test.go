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
	for _, fl := range flavours(t) {
		for _, v := range variants() {
			t.Run(fl.String()+"/"+v.name, func(t *testing.T) {
				newPair(t, c, fl, v).compare(t, c)
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
	p := newPair(t, c, xtables.NFT, variants()[1])
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
	v := variants()[1]
	pairs := map[xtables.Flavour]*pair{}
	for _, fl := range flavours(t) {
		p := newPair(t, c, fl, v)
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
	kptrace      *exec.Process // nil where ours is not a process of its own
	ours         ours
}

func newPair(t *testing.T, c *cluster, fl xtables.Flavour, v variant) *pair {
	t.Helper()
	p := &pair{flavour: fl, theirs: newNode(t, c), mine: newNode(t, c)}
	p.upstream = startUpstream(t, c, p.theirs, fl, v.upstream...)
	if err := p.mine.Do(iptables.EnsureCounters); err != nil {
		t.Fatal(err)
	}
	p.ours = newOurs(p.mine, fl, v.ours)
	return p
}

// compare waits until both have the same rules for what the API server has now,
// and says how many.
func (p *pair) compare(t *testing.T, c *cluster) {
	t.Helper()
	p.ours.sync(t, c)
	p.same(t)
}

// same waits until both have the same rules.
func (p *pair) same(t *testing.T) {
	t.Helper()
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		var last comparison
		eventually(t, fmt.Sprintf("the same %s %s rules", p.flavour, family), func() error {
			select {
			case <-p.upstream.Done():
				t.Fatalf("upstream kube-proxy ended: %v", p.upstream.Wait())
			default:
			}
			if p.kptrace != nil {
				select {
				case <-p.kptrace.Done():
					t.Fatalf("kptrace ended: %v", p.kptrace.Wait())
				default:
				}
			}
			a, err := save(t.Context(), p.flavour, family, p.mine)
			if err != nil {
				return err
			}
			b, err := save(t.Context(), p.flavour, family, p.theirs)
			if err != nil {
				return err
			}
			if last = compare(a, b); len(last.differences) > 0 {
				return fmt.Errorf("%d differences:\n%s", len(last.differences), last)
			}
			if last.chains == 0 {
				return errors.New("nothing is programmed yet")
			}
			return nil
		})
		t.Logf("%s %s: %s", p.flavour, family, last)
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
