package lab

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Fault does something to a pod ("NAMESPACE/NAME"): one of the Fault words.
// Faults add up until FaultHeal. delay is for FaultSlow.
func (l *Lab) Fault(ctx context.Context, kind, id string, delay time.Duration) error {
	p, ok := l.pods[id]
	if !ok {
		return fmt.Errorf("lab: no pod %s: there are %v", id, l.Targets())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.fault(ctx, kind, delay); err != nil {
		return fmt.Errorf("lab: %s of pod %s: %w", kind, id, err)
	}
	return nil
}

// Faults lists the faults of a pod that are in force, in order.
func (l *Lab) Faults(id string) []string {
	p, ok := l.pods[id]
	if !ok {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.faults)
}

func (p *pod) fault(ctx context.Context, kind string, delay time.Duration) error {
	var o order
	switch kind {
	case FaultKill:
		if p.link != nil {
			p.link.end()
			p.link = nil
		}
	case FaultBlackhole:
		// Not by a firewall rule, which would need a tool, nor by taking the
		// device down, which neighbours notice: the pod hears everything and
		// still answers ARP, but no answer of its finds a way.
		if err := p.space.setRoutes(unix.RTN_BLACKHOLE); err != nil {
			return err
		}
	case FaultRefuse:
		o = order{Do: doRefuse}
	case FaultSlow:
		if delay <= 0 {
			return fmt.Errorf("by how much? Give a time above 0")
		}
		o = order{Do: doSlow, Delay: delay}
	case FaultReset:
		o = order{Do: doReset, On: true}
	case FaultAbort:
		o = order{Do: doAbort, On: true}
	case FaultLarge:
		o = order{Do: doLarge, On: true}
	case FaultVanish:
		if err := p.arp(false); err != nil {
			return err
		}
	case FaultHeal:
		p.faults = nil
		return p.heal(ctx)
	default:
		return fmt.Errorf("unknown fault: use kill, blackhole, refuse, slow, reset, abort, large, vanish or heal")
	}
	if o.Do != "" {
		if p.link == nil {
			return errGone
		}
		if err := p.link.do(ctx, o); err != nil {
			return err
		}
	}
	if !slices.Contains(p.faults, kind) {
		p.faults = append(p.faults, kind)
	}
	return nil
}

func (p *pod) heal(ctx context.Context) error {
	if err := p.space.setRoutes(unix.RTN_UNICAST); err != nil {
		return err
	}
	if p.link == nil {
		if err := p.launch(ctx); err != nil {
			return err
		}
	}
	if err := p.arp(true); err != nil {
		return err
	}
	orders := []order{{Do: doListen}, {Do: doSlow}, {Do: doReset}, {Do: doAbort}, {Do: doLarge}}
	if p.talking {
		orders = append(orders, order{Do: doStart})
	}
	for _, o := range orders {
		if err := p.link.do(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

// arp says whether the pod answers ARP. Its gateway forgets where it was.
func (p *pod) arp(on bool) error {
	link, err := p.space.nl.LinkByName(podDev)
	if err != nil {
		return fmt.Errorf("finding %s: %w", podDev, err)
	}
	if on {
		return p.space.nl.LinkSetARPOn(link)
	}
	if err := p.space.nl.LinkSetARPOff(link); err != nil {
		return err
	}
	node, ok := p.lab.world.spaces[NodeSpace(p.Node)]
	if !ok {
		return nil
	}
	peers, err := node.nl.NeighList(0, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for i := range peers {
		if a, ok := netip.AddrFromSlice(peers[i].IP); ok && a.Unmap() == p.Addr {
			if err := node.nl.NeighDel(&peers[i]); err != nil {
				return err
			}
		}
	}
	return nil
}
