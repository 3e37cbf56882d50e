package node

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// packetsOf makes the packets a request is about: the one that it names, or one to
// each address and port of the Service, from a client of the same family.
func packetsOf(s *proxy.Snapshot, req *relay.ExplainRequest) ([]proxy.Packet, error) {
	own := func(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(s.Node.Addrs, a) }
	if req.Packet != nil {
		pkt := *req.Packet
		pkt.FromNode = pkt.FromNode || own(pkt.Src.Addr())
		return []proxy.Packet{pkt}, nil
	}
	sources, err := clientsOf(s, req)
	if err != nil {
		return nil, err
	}
	var out []proxy.Packet
	known := false
	for i := range s.Services {
		svc := &s.Services[i]
		if req.Namespace != "" && svc.Name.Namespace != req.Namespace || svc.Name.Name != req.Service || !asked(req.Ports, svc) {
			continue
		}
		known = true
		add := func(to netip.Addr, port uint16) {
			if src, ok := ofFamily(sources, to); ok {
				out = append(out, proxy.Packet{
					Proto: svc.Name.Proto, Src: netip.AddrPortFrom(src, clientPort), Dst: netip.AddrPortFrom(to, port),
					FromNode: own(src), In: req.In,
				})
			}
		}
		for _, a := range slices.Concat([]netip.Addr{svc.ClusterIP}, svc.ExternalIPs, svc.LoadBalancerIPs) {
			add(a, svc.Port)
		}
		if a, ok := ofFamily(s.Node.Addrs, svc.ClusterIP); ok && svc.NodePort != 0 {
			add(a, svc.NodePort)
		}
	}
	switch {
	case !known:
		sel := trace.Selector{Kind: trace.SelectService, Namespace: req.Namespace, Name: req.Service}
		if len(req.Ports) > 0 {
			sel.Port, _ = trace.ParsePort(req.Ports[0]) // what is no port is said to be none of the Service's
		}
		return nil, relay.MissingService(s, sel)
	case len(out) == 0:
		return nil, relay.NotFound("Service %s/%s has no address of the family of %s", req.Namespace, req.Service, sources[0])
	}
	return out, nil
}

// clientPort is the port that packets come from of which only the client is named.
const clientPort = 40000

// asked reports whether a Service port is among those wanted, by name or number.
func asked(ports []string, s *proxy.Service) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p string) bool {
		return p == s.Name.Port || p == strconv.Itoa(int(s.Port)) || s.NodePort != 0 && p == strconv.Itoa(int(s.NodePort))
	})
}

// ofFamily returns the first address of the family that another one has.
func ofFamily(list []netip.Addr, like netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(list, func(a netip.Addr) bool { return a.Is6() == like.Is6() })
	if i < 0 || !like.IsValid() {
		return netip.Addr{}, false
	}
	return list[i], true
}

// clientsOf are the addresses of the client that a request names: of a pod or the
// node it may have several.
func clientsOf(s *proxy.Snapshot, req *relay.ExplainRequest) ([]netip.Addr, error) {
	switch {
	case req.FromNode && len(s.Node.Addrs) > 0:
		return s.Node.Addrs, nil
	case req.FromNode:
		return nil, errors.New("the node's addresses are not known here: give the client's by --from")
	case req.FromPod != (relay.PodName{}):
		if addrs := s.PodAddrs(req.FromPod.Namespace, req.FromPod.Name); len(addrs) > 0 {
			return addrs, nil
		}
		return nil, relay.MissingPod(s, req.FromPod.Namespace, req.FromPod.Name)
	case req.From.IsValid():
		return []netip.Addr{req.From}, nil
	}
	// Somebody outside, whom no rule knows.
	return []netip.Addr{netip.AddrFrom4([4]byte{198, 51, 100, 254}), netip.MustParseAddr("2001:db8:ffff::fe")}, nil
}
