package lab

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

const (
	// secondDev is a pod's device that does not lead to its node.
	secondDev = "eth1"
	// sideTable, sidePriority and sideMark are those of nodeOneSided.
	sideTable, sidePriority, sideMark = 100, 100, 0x1000
)

// secondLink links two pods past their node and has the first one send to the second
// by it, or not.
func (l *Lab) secondLink(from, to string, on bool) error {
	a, b := l.pods[from], l.pods[to]
	if a == nil || b == nil {
		return fmt.Errorf("no pods %s and %s", from, to)
	}
	if !on {
		link, err := a.space.nl.LinkByName(secondDev)
		if err != nil {
			return err
		}
		return a.space.nl.LinkDel(link)
	}
	end := func(p *pod) End { return End{Space: p.space.plan.Name, Dev: secondDev} }
	if err := l.world.addLink(Link{A: end(a), B: end(b)}); err != nil {
		return err
	}
	link, err := a.space.nl.LinkByName(secondDev)
	if err != nil {
		return err
	}
	return a.space.nl.RouteAdd(&netlink.Route{Dst: ipNet(host(b.Addr)), LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK})
}

// nodeOneSided has the node's main table lead to foo-3 for a pod, and a rule for what
// has sideMark lead to the pod itself, or puts all back. Source validation looks for
// no mark (net.ipv4.conf.*.src_valid_mark). The pod knows the node's
// hardware address, for the node would not answer its ARP any more.
func (l *Lab) nodeOneSided(id string, on bool) error {
	sp, p := l.world.spaces[NodeSpace(incidentNode)], l.pods[id]
	if p == nil {
		return fmt.Errorf("no pod %s", id)
	}
	own, err := sp.nl.LinkByName(devName("veth", p.space.plan.Name))
	if err != nil {
		return err
	}
	other, err := sp.nl.LinkByName(devName("veth", PodSpace("shop", "foo-3")))
	if err != nil {
		return err
	}
	inside, err := p.space.nl.LinkByName(podDev)
	if err != nil {
		return err
	}
	dst := ipNet(host(p.Addr))
	var near net.IP
	for _, r := range p.space.plan.Routes {
		if r.Via.IsValid() {
			near = net.IP(r.Via.AsSlice())
		}
	}
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table = unix.AF_INET, sidePriority, sideTable
	mask := uint32(sideMark)
	rule.Mark, rule.Mask = sideMark, &mask
	side := &netlink.Route{Dst: dst, LinkIndex: own.Attrs().Index, Scope: netlink.SCOPE_LINK, Table: sideTable}
	neigh := &netlink.Neigh{LinkIndex: inside.Attrs().Index, IP: near, HardwareAddr: own.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}
	_ = sp.nl.RouteDel(&netlink.Route{Dst: dst, Scope: netlink.SCOPE_NOWHERE})
	if !on {
		return errors.Join(
			sp.nl.RouteAdd(&netlink.Route{Dst: dst, LinkIndex: own.Attrs().Index, Scope: netlink.SCOPE_LINK}),
			sp.nl.RuleDel(rule), sp.nl.RouteDel(side), p.space.nl.NeighDel(neigh))
	}
	return errors.Join(
		p.space.nl.NeighSet(neigh), sp.nl.RouteAdd(side), sp.nl.RuleAdd(rule),
		sp.nl.RouteAdd(&netlink.Route{Dst: dst, LinkIndex: other.Attrs().Index, Scope: netlink.SCOPE_LINK}))
}

// narrow has packets of more than 1000 bytes vanish as they come to a pod, or not.
func (l *Lab) narrow(ctx context.Context, id string, on bool) error {
	p := l.pods[id]
	if p == nil {
		return fmt.Errorf("no pod %s", id)
	}
	rules := "delete table ip narrow"
	if on {
		rules = "table ip narrow { chain arrive { type filter hook prerouting priority -300; meta length > 1000 drop; }; }"
	}
	_, err := exec.Run(ctx, exec.Spec{Path: "nft", Args: []string{rules}, Netns: p.space.ns.Fd()})
	return err
}
