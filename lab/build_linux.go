package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
)

// world is a Topology that exists. It vanishes when it is closed and no
// process is left in it.
type world struct {
	spaces map[string]*space
}

type space struct {
	plan Space
	ns   *netns.NS
	nl   *netlink.Handle
}

// build carries out a Topology.
func build(t *Topology) (w *world, err error) {
	w = &world{spaces: map[string]*space{}}
	defer func() {
		if err != nil {
			w.close()
			w = nil
		}
	}()
	for _, plan := range t.Spaces {
		if err := w.addSpace(plan); err != nil {
			return w, fmt.Errorf("lab: making %s: %w", plan.Name, err)
		}
	}
	for _, l := range t.Links {
		if err := w.addLink(l); err != nil {
			return w, fmt.Errorf("lab: linking %s with %s: %w", l.A.Space, l.B.Space, err)
		}
	}
	for _, plan := range t.Spaces {
		if err := w.spaces[plan.Name].configure(); err != nil {
			return w, fmt.Errorf("lab: configuring %s: %w", plan.Name, err)
		}
	}
	return w, nil
}

func (w *world) close() {
	for _, s := range w.spaces {
		if s.nl != nil {
			s.nl.Close()
		}
		s.ns.Close()
	}
	clear(w.spaces)
}

func (w *world) addSpace(plan Space) error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	s := &space{plan: plan, ns: ns}
	w.spaces[plan.Name] = s
	for _, c := range plan.Sysctls {
		err := ns.SetSysctl(c.Name, c.Value)
		if err != nil && !(c.Optional && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission))) {
			return err
		}
	}
	if s.nl, err = netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("opening rtnetlink: %w", err)
	}
	if plan.Bridge == "" {
		return nil
	}
	if err := s.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: plan.Bridge}}); err != nil {
		return fmt.Errorf("adding bridge %s: %w", plan.Bridge, err)
	}
	return s.up(End{Dev: plan.Bridge})
}

func (w *world) addLink(l Link) error {
	a, b := w.spaces[l.A.Space], w.spaces[l.B.Space]
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: l.A.Dev},
		PeerName:  l.B.Dev, PeerNamespace: netlink.NsFd(b.ns.Fd()),
	}
	if err := a.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("adding veth pair %s, %s: %w", l.A.Dev, l.B.Dev, err)
	}
	if err := b.up(l.B); err != nil {
		return err
	}
	return a.up(l.A)
}

// up brings a device up, in its bridge if it has one.
func (s *space) up(e End) error {
	link, err := s.nl.LinkByName(e.Dev)
	if err != nil {
		return fmt.Errorf("finding %s: %w", e.Dev, err)
	}
	if e.Master != "" {
		bridge, err := s.nl.LinkByName(e.Master)
		if err != nil {
			return fmt.Errorf("finding %s: %w", e.Master, err)
		}
		if err := s.nl.LinkSetMaster(link, bridge); err != nil {
			return fmt.Errorf("putting %s into %s: %w", e.Dev, e.Master, err)
		}
	}
	if e.Hairpin {
		if err := s.nl.LinkSetHairpin(link, true); err != nil {
			return fmt.Errorf("letting %s send packets back: %w", e.Dev, err)
		}
	}
	if err := s.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing %s up: %w", e.Dev, err)
	}
	return nil
}

func (s *space) configure() error {
	for _, a := range s.plan.Addrs {
		link, err := s.nl.LinkByName(a.Dev)
		if err != nil {
			return fmt.Errorf("finding %s: %w", a.Dev, err)
		}
		if err := s.nl.AddrAdd(link, &netlink.Addr{IPNet: ipNet(a.Prefix)}); err != nil {
			return fmt.Errorf("adding address %s to %s: %w", a.Prefix, a.Dev, err)
		}
	}
	return s.setRoutes(unix.RTN_UNICAST)
}

// setRoutes makes the planned routes be of a type: RTN_UNICAST as planned, or
// RTN_BLACKHOLE, by which whatever is sent vanishes without a word.
func (s *space) setRoutes(kind int) error {
	for _, r := range s.plan.Routes {
		// Not Replace: that would keep an entry of the other type beside it.
		_ = s.nl.RouteDel(&netlink.Route{Dst: ipNet(r.Dst), Scope: netlink.SCOPE_NOWHERE})
		route := &netlink.Route{Dst: ipNet(r.Dst), Type: kind}
		if kind == unix.RTN_UNICAST {
			link, err := s.nl.LinkByName(r.Dev)
			if err != nil {
				return fmt.Errorf("finding %s: %w", r.Dev, err)
			}
			route.LinkIndex = link.Attrs().Index
			if r.Via.IsValid() {
				route.Gw = net.IP(r.Via.AsSlice())
			} else {
				route.Scope = netlink.SCOPE_LINK
			}
		}
		if err := s.nl.RouteAdd(route); err != nil {
			return fmt.Errorf("adding route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: net.IP(p.Addr().AsSlice()), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
