package lab

import (
	"fmt"
	"hash/fnv"
	"net/netip"
)

// Topology says which network namespaces there are and what is in them. It is
// made by Plan, which touches nothing, and carried out by build.
type Topology struct {
	// Spaces has the LAN first, then nodes, then pods and outside clients.
	Spaces []Space
	Links  []Link
}

// Space is one network namespace. Its name is "lan", "node/NAME" or
// "pod/NAMESPACE/NAME" (outside clients too).
type Space struct {
	Name string
	// Bridge is made in it if not empty.
	Bridge string
	Addrs  []Addr
	Routes []Route
	// Sysctls are set before its devices exist, in this order.
	Sysctls []Sysctl
}

// Link is a veth pair.
type Link struct{ A, B End }

// End is one end of a Link: a device in a Space, in a bridge if Master is set.
// Hairpin lets the bridge send a packet back to where it came from.
type End struct {
	Space, Dev, Master string
	Hairpin            bool
}

// Addr puts an address on a device.
type Addr struct {
	Dev    string
	Prefix netip.Prefix
}

// Route is an entry of a routing table; without Via it is a route of scope
// link.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr
	Dev string
}

// Sysctl is a setting below net. An Optional one may be absent or read-only
// on some kernels.
type Sysctl struct {
	Name, Value string
	Optional    bool
}

// Options of a Plan.
type Options struct {
	// KernelTimeouts keeps the kernel's own conntrack timeouts on nodes. Else
	// they are shortened, so that the end of connections can be watched.
	KernelTimeouts bool
	// Bridge hangs the pods of a node on a bridge, as the bridge plugin of CNI
	// does, and has the node's netfilter see what crosses it.
	Bridge bool
}

const (
	lanSpace  = "lan"
	lanBridge = "br0"
	podDev    = "eth0"
	podBridge = "cni0"
)

// NodeSpace and PodSpace name the namespaces of nodes and pods.
func NodeSpace(node string) string { return "node/" + node }

// PodSpace names the namespace of a pod or outside client.
func PodSpace(namespace, pod string) string { return "pod/" + namespace + "/" + pod }

// Plan makes the Topology of a Cluster.
//
// Every pod has a /32 on its end of a veth pair and a default route through
// its node, which holds the first address of its pod range on the other end,
// as the ptp plugin of CNI does it, and a route to each pod; with Options.Bridge it
// has its range's mask, and the node the first address on a bridge. Nodes route each
// other's pods over the LAN. Their default route leads to the LAN's own
// address, where nothing is forwarded, so that a packet to an address of a
// Service has a route, and dies there if no rule turned it elsewhere.
func Plan(c *Cluster, opt Options) (*Topology, error) {
	lan, gw, err := lanOf(c)
	if err != nil {
		return nil, err
	}
	t := &Topology{Spaces: []Space{{
		Name: lanSpace, Bridge: lanBridge,
		Addrs: []Addr{{lanBridge, netip.PrefixFrom(gw, lan.Bits())}},
		Sysctls: []Sysctl{
			{"net/ipv4/ip_forward", "0", false},
			// What crosses the LAN is no business of its host's netfilter.
			{"net/bridge/bridge-nf-call-iptables", "0", true},
		},
	}}}
	onLAN := func(s *Space, addr netip.Addr) {
		t.Links = append(t.Links, Link{
			A: End{Space: s.Name, Dev: podDev},
			B: End{Space: lanSpace, Dev: devName("l", s.Name), Master: lanBridge},
		})
		s.Addrs = append(s.Addrs, Addr{podDev, netip.PrefixFrom(addr, lan.Bits())})
		s.Routes = append(s.Routes, Route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), gw, podDev})
	}
	for i := range c.Nodes {
		n := &c.Nodes[i]
		s := Space{Name: NodeSpace(n.Name), Sysctls: nodeSysctls(opt)}
		onLAN(&s, n.Addr)
		for j := range c.Nodes {
			if o := &c.Nodes[j]; i != j {
				s.Routes = append(s.Routes, Route{o.PodCIDR, o.Addr, podDev})
			}
		}
		pods := t.addPods(c, n, &s, opt)
		t.Spaces = append(append(t.Spaces, s), pods...)
	}
	for i := range c.Pods {
		if p := &c.Pods[i]; p.External {
			s := Space{Name: PodSpace(p.Namespace, p.Name), Sysctls: clientSysctls()}
			onLAN(&s, p.Addr)
			t.Spaces = append(t.Spaces, s)
		}
	}
	return t, nil
}

// addPods links a node's pods to it and returns their spaces.
func (t *Topology) addPods(c *Cluster, n *Node, s *Space, opt Options) []Space {
	gw := gateway(n.PodCIDR)
	if opt.Bridge {
		s.Bridge = podBridge
		s.Addrs = append(s.Addrs, Addr{podBridge, netip.PrefixFrom(gw, n.PodCIDR.Bits())})
	}
	var pods []Space
	for i := range c.Pods {
		p := &c.Pods[i]
		if p.External || p.Node != n.Name {
			continue
		}
		space := PodSpace(p.Namespace, p.Name)
		dev := devName("veth", space)
		end, addr, near := End{Space: s.Name, Dev: dev}, host(p.Addr), host(gw)
		if opt.Bridge {
			end.Master, end.Hairpin = podBridge, true
			addr, near = netip.PrefixFrom(p.Addr, n.PodCIDR.Bits()), n.PodCIDR
		} else {
			s.Addrs = append(s.Addrs, Addr{dev, host(gw)})
			s.Routes = append(s.Routes, Route{Dst: host(p.Addr), Dev: dev})
		}
		t.Links = append(t.Links, Link{A: End{Space: space, Dev: podDev}, B: end})
		pods = append(pods, Space{
			Name: space, Sysctls: clientSysctls(),
			Addrs: []Addr{{podDev, addr}},
			Routes: []Route{
				{Dst: near, Dev: podDev},
				{netip.PrefixFrom(netip.IPv4Unspecified(), 0), gw, podDev},
			},
		})
	}
	return pods
}

// lanOf finds the smallest range from /24 up that holds all nodes and outside
// clients, and an address in it that is free.
func lanOf(c *Cluster) (netip.Prefix, netip.Addr, error) {
	taken := map[netip.Addr]bool{}
	var all []netip.Addr
	for _, n := range c.Nodes {
		all = append(all, n.Addr)
	}
	for _, p := range c.Pods {
		if p.External {
			all = append(all, p.Addr)
		}
	}
	if len(all) == 0 {
		return netip.Prefix{}, netip.Addr{}, fmt.Errorf("lab: planning: no node")
	}
	lan := netip.PrefixFrom(all[0], 24).Masked()
	for _, a := range all {
		taken[a] = true
		for !lan.Contains(a) {
			if lan.Bits() <= 8 {
				return lan, netip.Addr{}, fmt.Errorf("lab: planning: addresses of nodes and outside clients are too far apart: %s and %s", all[0], a)
			}
			lan = netip.PrefixFrom(lan.Addr(), lan.Bits()-1).Masked()
		}
	}
	for _, n := range c.Nodes {
		if n.PodCIDR.Overlaps(lan) {
			return lan, netip.Addr{}, fmt.Errorf("lab: planning: pod range %s of Node %s overlaps the nodes' LAN %s", n.PodCIDR, n.Name, lan)
		}
		for _, o := range c.Nodes {
			if o.Name != n.Name && o.PodCIDR.Overlaps(n.PodCIDR) {
				return lan, netip.Addr{}, fmt.Errorf("lab: planning: pod ranges of Nodes %s and %s overlap: %s, %s", n.Name, o.Name, n.PodCIDR, o.PodCIDR)
			}
		}
	}
	gw := gateway(lan)
	for taken[gw] {
		gw = gw.Next()
	}
	if !lan.Contains(gw.Next()) {
		return lan, gw, fmt.Errorf("lab: planning: no address left in %s", lan)
	}
	return lan, gw, nil
}

func gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// devName makes a device name of at most 15 bytes that is the same each time.
func devName(prefix, space string) string {
	h := fnv.New32a()
	h.Write([]byte(space))
	return fmt.Sprintf("%s%08x", prefix, h.Sum32())
}
