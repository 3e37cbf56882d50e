package redact

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// Level says how much is replaced.
type Level string

// The levels: nothing; names, and addresses that the whole world can know; all
// addresses too.
const (
	None  Level = "none"
	Names Level = "names"
	All   Level = "all"
)

// ParseLevel reads a level.
func ParseLevel(s string) (Level, error) {
	switch l := Level(s); l {
	case None, Names, All:
		return l, nil
	}
	return "", fmt.Errorf("redact: level %q: use none, names or all", s)
}

// Redactor replaces. It has one user at a time.
type Redactor struct {
	level           Level
	key             []byte
	always, private []netip.Prefix
	addrs           map[netip.Addr]netip.Addr
	// names are replacements by name, namespaces those of which are namespaces,
	// hashes those of what stands in the names of chains.
	names      map[string]string
	namespaces map[string]bool
	hashes     map[string]string
}

// New returns a Redactor that knows no names yet. The same key replaces alike.
func New(level Level, key []byte) *Redactor {
	r := &Redactor{
		level: level, key: key, addrs: map[netip.Addr]netip.Addr{},
		names: map[string]string{}, namespaces: map[string]bool{"default": true, "kube-system": true, "kube-public": true},
		hashes: map[string]string{},
	}
	r.always, r.private = specials()
	return r
}

// common are names that every cluster has, and words of rules and outputs: they tell
// nothing, and stay.
var common = strings.Fields(`
	default kube-system kube-public kube-node-lease kubernetes kube-dns kube-proxy coredns node-local-dns
	kptrace localhost iptables ip6tables ipvs userspace nftables nft legacy none
	tcp udp sctp icmp ip ip6 inet http https dns dns-tcp metrics
	table chain type filter nat mangle raw hook priority policy accept drop reject return jump goto
	counter comment meta mark set map elements flags timeout numgen random mod vmap dnat snat masquerade
	deployment statefulset daemonset replicaset job service pod node namespace endpointslice`) //nolint:gochecknoglobals // a table

// word makes a replacement that begins with a kind.
func (r *Redactor) word(kind, name string) string {
	return kind + "-" + strings.ToLower(r.code(name, 8))
}

// code is n characters of base32 that only the key and a text lead to.
func (r *Redactor) code(text string, n int) string {
	m := hmac.New(sha256.New, r.key)
	m.Write([]byte{'n'})
	m.Write([]byte(text))
	return base32.StdEncoding.EncodeToString(m.Sum(nil))[:n]
}

// name returns the replacement of a name, which is of the kind that it was first
// met as.
func (r *Redactor) name(kind, name string) string {
	if r.level == None || name == "" || slices.Contains(common, strings.ToLower(name)) {
		return name
	}
	if out, ok := r.names[name]; ok {
		return out
	}
	out := r.word(kind, name)
	r.names[name] = out
	return out
}

func (r *Redactor) namespace(name string) string {
	if name != "" {
		r.namespaces[name] = true
	}
	return r.name("ns", name)
}

// workload replaces the name in "Deployment/foo".
func (r *Redactor) workload(s string) string {
	kind, name, ok := strings.Cut(s, "/")
	if !ok {
		return r.name("app", s)
	}
	return kind + "/" + r.name("app", name)
}

// PortName returns the replacement of a Service port's name; the port's own name
// stays.
func (r *Redactor) PortName(n proxy.PortName) proxy.PortName {
	n.Namespace, n.Name = r.namespace(n.Namespace), r.name("svc", n.Name)
	return n
}

// Node learns the name of a node and returns its replacement.
func (r *Redactor) Node(name string) string { return r.name("node", name) }

// Learn takes the names in a Snapshot, and the chains that its Services have.
func (r *Redactor) Learn(s *proxy.Snapshot) {
	if s != nil {
		r.Snapshot(s)
	}
}

// LearnRules takes the names of Services that rules have.
func (r *Redactor) LearnRules(p interface{ Services() []*liverules.Service }) {
	for _, s := range p.Services() {
		r.hash(s.Name, netip.AddrPort{})
		for i := range s.Fronts {
			for _, c := range s.Fronts[i].Choices {
				r.hash(s.Name, c.Endpoint)
			}
		}
	}
}

// LearnObject takes the names in "Service shop/foo" or "shop/foo".
func (r *Redactor) LearnObject(s string) {
	kind, rest, ok := strings.Cut(s, " ")
	if !ok {
		kind, rest = "", s
	}
	ns, name, ok := strings.Cut(rest, "/")
	if !ok {
		return
	}
	r.namespace(ns)
	words := map[string]string{"Service": "svc", "Pod": "pod", "Node": "node", "EndpointSlice": "slice"}
	word := words[kind]
	if word == "" {
		word = "svc"
	}
	name, _, _ = strings.Cut(name, ":")
	r.name(word, name)
}

// hash learns the chains of a Service port, or with an endpoint that one's.
func (r *Redactor) hash(n proxy.PortName, ep netip.AddrPort) {
	if r.level != None {
		r.hashes[liverules.Hash(n, ep)] = liverules.Hash(r.PortName(n), r.AddrPort(ep))
	}
}

// Snapshot returns a copy with everything replaced, in the order a Snapshot has.
func (r *Redactor) Snapshot(in *proxy.Snapshot) *proxy.Snapshot {
	if r.level == None {
		return in
	}
	out := *in
	out.Node.Name, out.Node.Zone = r.Node(in.Node.Name), r.name("zone", in.Node.Zone)
	out.Node.Addrs, out.Node.PodCIDRs = each(in.Node.Addrs, r.Addr), each(in.Node.PodCIDRs, r.Prefix)
	out.Services = each(in.Services, r.service)
	slices.SortStableFunc(out.Services, func(a, b proxy.Service) int {
		if c := a.Name.Compare(b.Name); c != 0 {
			return c
		}
		return a.ClusterIP.BitLen() - b.ClusterIP.BitLen()
	})
	out.Pods = make(map[netip.Addr]proxy.Pod, len(in.Pods))
	for a, p := range in.Pods {
		out.Pods[r.Addr(a)] = proxy.Pod{
			Namespace: r.namespace(p.Namespace), Name: r.name("pod", p.Name), Node: r.Node(p.Node), Workload: r.workload(p.Workload),
		}
	}
	out.Nodes = make(map[netip.Addr]string, len(in.Nodes))
	for a, n := range in.Nodes {
		out.Nodes[r.Addr(a)] = r.Node(n)
	}
	out.ServiceCIDRs = each(in.ServiceCIDRs, r.Prefix)
	out.Skipped = each(in.Skipped, func(s proxy.Skipped) proxy.Skipped {
		s.Namespace, s.Name = r.namespace(s.Namespace), r.name("svc", s.Name)
		return s
	})
	for i := range in.Problems {
		r.LearnObject(in.Problems[i].Object)
	}
	out.Problems = each(in.Problems, func(p proxy.Problem) proxy.Problem {
		return proxy.Problem{Object: r.Text(p.Object), Field: p.Field, Message: r.Text(p.Message)}
	})
	out.Triggers = nil // their keys are names, and they serve to measure only
	return &out
}

func (r *Redactor) service(s proxy.Service) proxy.Service {
	r.hash(s.Name, netip.AddrPort{})
	for i := range s.Endpoints {
		r.hash(s.Name, s.Endpoints[i].Addr)
	}
	s.Name = r.PortName(s.Name)
	s.ClusterIP = r.Addr(s.ClusterIP)
	s.ExternalIPs, s.LoadBalancerIPs = each(s.ExternalIPs, r.Addr), each(s.LoadBalancerIPs, r.Addr)
	s.SourceRanges = each(s.SourceRanges, r.Prefix)
	s.Endpoints = each(s.Endpoints, func(e proxy.Endpoint) proxy.Endpoint {
		e.Addr = r.AddrPort(e.Addr)
		e.Namespace, e.Pod, e.Node, e.Zone = r.namespace(e.Namespace), r.name("pod", e.Pod), r.Node(e.Node), r.name("zone", e.Zone)
		e.ZoneHints = each(e.ZoneHints, func(z string) string { return r.name("zone", z) })
		e.NodeHints = each(e.NodeHints, r.Node)
		return e
	})
	slices.SortFunc(s.Endpoints, func(a, b proxy.Endpoint) int { return strings.Compare(a.Addr.String(), b.Addr.String()) })
	return s
}

// Overlay returns a copy with everything replaced.
func (r *Redactor) Overlay(in proxy.Overlay) proxy.Overlay {
	if r.level == None || in.Out == nil {
		return in
	}
	out := proxy.Overlay{Out: make(map[netip.AddrPort]proxy.Outage, len(in.Out))}
	for ep, o := range in.Out {
		o.Reason = r.Text(o.Reason)
		out.Out[r.AddrPort(ep)] = o
	}
	return out
}

// each maps a list; nil stays nil.
func each[T any](in []T, f func(T) T) []T {
	if in == nil {
		return nil
	}
	out := make([]T, len(in))
	for i := range in {
		out[i] = f(in[i])
	}
	return out
}
