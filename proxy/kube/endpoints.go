package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// endpoints gives every Service port the endpoints of its slices.
func (c *converter) endpoints() {
	byService := map[string][]*discoveryv1.EndpointSlice{}
	known := map[string]bool{}
	for i := range c.objects.Services {
		known[c.objects.Services[i].Namespace+"/"+c.objects.Services[i].Name] = true
	}
	for i := range c.objects.Slices {
		slice := &c.objects.Slices[i]
		if _, ok := slice.Labels[labelHeadless]; ok {
			continue
		}
		name := slice.Labels[discoveryv1.LabelServiceName]
		switch {
		case name == "":
			c.problem("EndpointSlice", slice.Namespace, slice.Name, "metadata.labels",
				"has no label %s: it belongs to no Service", discoveryv1.LabelServiceName)
		case !known[slice.Namespace+"/"+name]:
			c.problem("EndpointSlice", slice.Namespace, slice.Name, "metadata.labels",
				"belongs to Service %s/%s, which does not exist", slice.Namespace, name)
		default:
			byService[slice.Namespace+"/"+name] = append(byService[slice.Namespace+"/"+name], slice)
			c.checkSlice(slice)
		}
	}
	for i := range c.snap.Services {
		s := &c.snap.Services[i]
		merged := map[netip.AddrPort]proxy.Endpoint{}
		for _, slice := range byService[s.Name.Namespace+"/"+s.Name.Name] {
			c.merge(s, slice, merged)
		}
		for _, ep := range merged {
			s.Endpoints = append(s.Endpoints, ep)
		}
		slices.SortFunc(s.Endpoints, func(a, b proxy.Endpoint) int {
			return strings.Compare(a.Addr.String(), b.Addr.String())
		})
	}
}

// checkSlice reports faults of a slice once, whatever Services use it.
func (c *converter) checkSlice(slice *discoveryv1.EndpointSlice) {
	bad := func(field, format string, args ...any) {
		c.problem("EndpointSlice", slice.Namespace, slice.Name, field, format, args...)
	}
	switch slice.AddressType {
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN:
	default:
		bad("addressType", "%q is not IPv4, IPv6 or FQDN", slice.AddressType)
	}
	if len(slice.Ports) == 0 && len(slice.Endpoints) > 0 {
		bad("ports", "is empty: its %d endpoints are left out", len(slice.Endpoints))
	}
	for i, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			bad(fmt.Sprintf("ports[%d].port", i), "is missing or not within 1 to 65535: endpoints of port %q are left out", value(p.Name))
		}
	}
	for i, ep := range slice.Endpoints {
		field := fmt.Sprintf("endpoints[%d].addresses", i)
		if len(ep.Addresses) == 0 {
			bad(field, "is empty")
		} else if ip, err := netip.ParseAddr(ep.Addresses[0]); err != nil && slice.AddressType != discoveryv1.AddressTypeFQDN {
			bad(field, "%q is not an IP address", ep.Addresses[0])
		} else if err == nil && ip.Is6() != (slice.AddressType == discoveryv1.AddressTypeIPv6) {
			bad(field, "%s does not fit addressType %s", ip, slice.AddressType)
		}
	}
}

func (c *converter) merge(s *proxy.Service, slice *discoveryv1.EndpointSlice, into map[netip.AddrPort]proxy.Endpoint) {
	if (slice.AddressType == discoveryv1.AddressTypeIPv6) != s.Is6() || slice.AddressType == discoveryv1.AddressTypeFQDN {
		return
	}
	for _, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 || value(p.Name) != s.Name.Port {
			continue
		}
		proto := conntrack.TCP
		if p.Protocol != nil {
			var err error
			if proto, err = conntrack.ParseProto(string(*p.Protocol)); err != nil {
				continue
			}
		}
		if proto != s.Name.Proto {
			continue
		}
		for i := range slice.Endpoints {
			ep := &slice.Endpoints[i]
			if len(ep.Addresses) == 0 {
				continue
			}
			ip, err := netip.ParseAddr(ep.Addresses[0])
			if err != nil || ip.Is6() != s.Is6() {
				continue
			}
			e := c.endpoint(slice, ep, netip.AddrPortFrom(ip, uint16(*p.Port)))
			// The same address in several slices: one that is not
			// terminating wins.
			if old, ok := into[e.Addr]; !ok || old.Terminating && !e.Terminating {
				into[e.Addr] = e
			}
		}
	}
}

func (c *converter) endpoint(slice *discoveryv1.EndpointSlice, ep *discoveryv1.Endpoint, addr netip.AddrPort) proxy.Endpoint {
	e := proxy.Endpoint{
		Addr:        addr,
		Ready:       ep.Conditions.Ready == nil || *ep.Conditions.Ready,
		Serving:     ep.Conditions.Serving == nil || *ep.Conditions.Serving,
		Terminating: ep.Conditions.Terminating != nil && *ep.Conditions.Terminating,
		Node:        value(ep.NodeName),
		Zone:        value(ep.Zone),
	}
	e.Local = e.Node != "" && e.Node == c.snap.Node.Name
	if r := ep.TargetRef; r != nil && (r.Kind == "Pod" || r.Kind == "") {
		e.Pod, e.Namespace = r.Name, r.Namespace
		if e.Namespace == "" {
			e.Namespace = slice.Namespace
		}
	} else if p, ok := c.snap.Pods[addr.Addr()]; ok {
		e.Pod, e.Namespace = p.Name, p.Namespace
	}
	if p, ok := c.snap.Pods[addr.Addr()]; !ok && e.Pod != "" {
		// Names from slices serve clients too: an endpoint may call others.
		c.snap.Pods[addr.Addr()] = proxy.Pod{Namespace: e.Namespace, Name: e.Pod, Node: e.Node}
	} else if e.Node == "" {
		e.Node = p.Node
	}
	if h := ep.Hints; h != nil {
		for _, z := range h.ForZones {
			e.ZoneHints = append(e.ZoneHints, z.Name)
		}
		for _, n := range h.ForNodes {
			e.NodeHints = append(e.NodeHints, n.Name)
		}
	}
	return e
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}
