package check

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// serves is what rules mean, of either mode.
type serves interface {
	Services() []*liverules.Service
	Walk(pkt proxy.Packet) proxy.Outcome
	PodRanges() []netip.Prefix
}

// services holds the rules against what the API says. It asks what rules mean and
// not how they are written, so it holds for any kube-proxy in iptables or nftables mode.
func (c *checker) services() {
	if c.Snapshot == nil {
		return
	}
	if c.live != nil && c.live.Mode() == proxy.IPTables {
		families := make(map[bool]bool)
		for _, d := range c.picked {
			families[d.Family == xtables.IPv6] = true
		}
		c.against(c.live, families, nil)
	}
	if c.NFT != nil && c.NFT.Mode() == proxy.NFTables {
		four, six := c.NFT.Families()
		c.against(c.NFT, map[bool]bool{false: four, true: six}, c.wantedOfNFT)
		c.strayClusterIPs()
	}
}

// against compares the Services of the families of which rules were read; more says
// what else there is to one.
func (c *checker) against(p serves, families map[bool]bool, more func(*proxy.Service, *liverules.Service)) {
	type key struct {
		name proxy.PortName
		six  bool
	}
	rules := make(map[key]*liverules.Service)
	for _, s := range p.Services() {
		rules[key{s.Name, s.IP6}] = s
	}
	for i := range c.Snapshot.Services {
		svc := &c.Snapshot.Services[i]
		k := key{svc.Name, svc.Is6()}
		live := rules[k]
		delete(rules, k)
		if !families[k.six] {
			continue // no rules of the family were read
		}
		c.service(p, svc, live)
		if more != nil {
			more(svc, live)
		}
	}
	for _, s := range p.Services() {
		if rules[key{s.Name, s.IP6}] == s && s.Name.Namespace != "" && len(s.Fronts) > 0 {
			c.add("service-extra", s.Name.String(), "restart kube-proxy, or wait for its next full sync", "the API does not have it, and the rules still serve %s", s.Fronts[0].String())
		}
	}
}

// front is an address that a Service should have, and what it should lead to.
type front struct {
	via  proxy.Via
	addr netip.Addr
	port uint16
	want []proxy.Endpoint
	// has says that the Service has endpoints at all, if not for this address.
	has bool
}

// fronts lists what a Service should have.
func fronts(svc *proxy.Service, sel *proxy.Select) []front {
	has := len(sel.Cluster) > 0
	internal, external := sel.Cluster, sel.Cluster
	if svc.InternalLocal {
		internal = sel.Local
	}
	if svc.ExternalLocal {
		external = sel.Local
	}
	out := []front{{proxy.ViaClusterIP, svc.ClusterIP, svc.Port, internal, has}}
	for _, a := range svc.ExternalIPs {
		out = append(out, front{proxy.ViaExternalIP, a, svc.Port, external, has})
	}
	for _, a := range svc.LoadBalancerIPs {
		out = append(out, front{proxy.ViaLoadBalancer, a, svc.Port, external, has})
	}
	if svc.NodePort != 0 {
		out = append(out, front{proxy.ViaNodePort, netip.Addr{}, svc.NodePort, external, has})
	}
	return out
}

func (c *checker) service(p serves, svc *proxy.Service, live *liverules.Service) {
	sel := svc.Select(c.Snapshot.Node, c.Overlay)
	name := svc.Name.String()
	const again = "restart kube-proxy, or wait for its next full sync"
	for _, want := range fronts(svc, &sel) {
		var have *liverules.Front
		if live != nil {
			i := slices.IndexFunc(live.Fronts, func(f liverules.Front) bool {
				return f.Addr == want.addr && f.Port == want.port && (f.Via == proxy.ViaNodePort) == (want.via == proxy.ViaNodePort)
			})
			if i >= 0 {
				have = &live.Fronts[i]
			}
		}
		at := fmt.Sprintf("%s:%d", want.addr, want.port)
		if want.via == proxy.ViaNodePort {
			at = fmt.Sprintf("node port %d", want.port)
		}
		refused := have != nil && (have.Verdict == proxy.Reject || have.Verdict == proxy.Drop)
		switch {
		case have == nil && len(want.want) > 0:
			c.add("service-missing", name, again, "no rule for its %s %s, which has %d endpoints", want.via, at, len(want.want))
		case have == nil && c.isNFT(p):
			c.add("element-missing", name, again, "nothing refuses its %s %s, which has no endpoint: clients may wait in vain", want.via, at)
		case have == nil:
			// Without a rule a connection runs into a timeout instead of being
			// refused; there is nothing to reach either way.
		case refused && len(want.want) > 0:
			c.add("service-refused", name, again, "the rules refuse its %s %s (%s), and the API has %d endpoints for it", want.via, at, have.Reason, len(want.want))
		case !refused && len(want.want) == 0 && len(have.Choices) > 0:
			f := c.add("service-not-refused", name, again, "the API has no endpoint for its %s %s, and the rules lead to %s", want.via, at, have.Choices[0].Endpoint)
			f.Severity = Breaks
		case !refused:
			c.endpoints(svc, want, have, at)
		}
		if have != nil && (have.Chain != "" || c.isNFT(p)) && svc.ExternalLocal && want.via != proxy.ViaClusterIP && len(sel.Cluster) > 0 {
			c.shortcut(p, svc, want, sel.Cluster, at)
		}
	}
}

// isNFT tells the rules of nftables mode.
func (c *checker) isNFT(p serves) bool { return c.NFT != nil && p == serves(c.NFT) }

// shortcut looks at what pods and the node get by an outside address whose policy
// is Local: all endpoints, as if they had gone out and come back.
func (c *checker) shortcut(p serves, svc *proxy.Service, want front, eps []proxy.Endpoint, at string) {
	dst := want.addr
	var clients []proxy.Packet
	for _, a := range c.Addrs {
		if a.Is6() != svc.Is6() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			continue
		}
		if !dst.IsValid() && c.isNFT(p) {
			if in, _ := c.NFT.Has("nodeport-ips", a); !in {
				continue // one that has no node ports
			}
		}
		if !dst.IsValid() {
			dst = a
		}
		clients = append(clients, proxy.Packet{Src: netip.AddrPortFrom(a, 40000), FromNode: true})
		break
	}
	for _, r := range p.PodRanges() {
		if r.Addr().Is6() == svc.Is6() {
			clients = append(clients, proxy.Packet{Src: netip.AddrPortFrom(r.Masked().Addr().Next(), 40000)})
		}
	}
	if !dst.IsValid() || len(svc.SourceRanges) > 0 && (want.via == proxy.ViaLoadBalancer || !c.isNFT(p)) {
		return
	}
	for _, pkt := range clients {
		pkt.Proto, pkt.Dst = svc.Name.Proto, netip.AddrPortFrom(dst, want.port)
		o := p.Walk(pkt)
		if o.Reason == "dropped-by-rule" || o.Reason == "policy-drop" {
			continue // that is another matter
		}
		same := len(o.Choices) == len(eps)
		for i := range eps {
			_, ok := o.Find(eps[i].Addr)
			same = same && ok
		}
		if same {
			continue
		}
		who := "pods"
		if pkt.FromNode {
			who = "the node itself"
		}
		c.add("shortcut-missing", svc.Name.String(), "restart kube-proxy, or wait for its next full sync",
			"%s by %s reaches %d of %d endpoints from %s", at, want.via, len(o.Choices), len(eps), who)
		return
	}
}

func (c *checker) endpoints(svc *proxy.Service, want front, have *liverules.Front, at string) {
	name := svc.Name.String()
	for _, x := range have.Choices {
		if slices.ContainsFunc(want.want, func(e proxy.Endpoint) bool { return e.Addr == x.Endpoint }) {
			continue
		}
		why := "the API does not have it"
		for i := range svc.Endpoints {
			if e := &svc.Endpoints[i]; e.Addr == x.Endpoint {
				switch {
				case e.Terminating:
					why = "it is terminating"
				case !e.Ready:
					why = "it is not ready"
				default:
					why = "policy or topology send its traffic elsewhere"
				}
			}
		}
		c.add("endpoint-gone", name, "restart kube-proxy, or see why it does not follow the API", "%.1f %% of connections to %s go to %s, and %s", 100*x.Probability, at, x.Endpoint, why)
	}
	for _, e := range want.want {
		if !slices.ContainsFunc(have.Choices, func(x proxy.Choice) bool { return x.Endpoint == e.Addr }) {
			c.add("endpoint-missing", name, "restart kube-proxy, or see why it does not follow the API", "%s gets no connection to %s: no rule leads to it", e.Addr, at)
		}
	}
}

// exact holds the rules against those that our own proxy wrote, one by one.
func (c *checker) exact() {
	if c.Program == nil {
		return
	}
	for _, d := range c.picked {
		for _, ch := range iptables.DiffPart(d.Rules, c.Program, c.Part) {
			object := ch.Table + "/" + ch.Chain
			f := c.add("rule-altered", object, "kptrace check --fix writes them again", "%s: rules that are missing or not as written: %d; that should not be there: %d", changeWords(ch.Kind), len(ch.Add), len(ch.Remove))
			f.Ours = true
			for _, r := range ch.Add {
				f.Evidence = append(f.Evidence, "want "+r)
			}
			for _, r := range ch.Remove {
				if !slices.Contains(ch.Add, r) {
					f.Evidence = append(f.Evidence, "have "+r)
				}
			}
			f.Evidence = first(f.Evidence, 8)
			if ch.Service != (proxy.PortName{}) {
				f.Message = "of " + ch.Service.String() + ", " + f.Message
			}
		}
	}
	switch {
	case c.SyncError != "":
		c.add("sync-failed", c.Node, "kptrace status says more", "%s", c.SyncError).Ours = true
	case !c.Wanted.IsZero() && c.Now.Sub(c.Wanted) > behind:
		c.add("rules-behind", c.Node, "kptrace status says more", "the API changed %v ago, and the kernel has not followed since", c.Now.Sub(c.Wanted).Round(behind/10)).Ours = true
	}
}

func changeWords(k xtables.DiffKind) string {
	switch k {
	case xtables.Missing:
		return "the chain is gone"
	case xtables.Extra:
		return "the chain should not be there"
	}
	return "changed"
}
