package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// incidentNode is the node that incidents happen on.
const incidentNode = "node1"

// worker is the pod whose clients an incident adds to.
const worker = "shop/batch"

// Incident lets an incident happen; Heal undoes it. The lab must have the
// IncidentScenario.
func (l *Lab) Incident(ctx context.Context, n int) error {
	all := Incidents()
	if n < 1 || n > len(all) {
		return fmt.Errorf("lab: no incident %d: there are 1 to %d", n, len(all))
	}
	in, never := all[n-1].In(l.mode())
	if never != "" {
		return fmt.Errorf("lab: incident %s cannot happen in mode %s: %s", in.Name, l.mode(), never)
	}
	l.reportMu.Lock()
	l.incident, l.healed = n, false
	l.reportMu.Unlock()
	if err := l.happen(ctx, &in.do); err != nil {
		return fmt.Errorf("lab: incident %s: %w", in.Name, err)
	}
	return nil
}

// Happened is the number of the last Incident, 0 if there was none.
func (l *Lab) Happened() int {
	l.reportMu.Lock()
	defer l.reportMu.Unlock()
	return l.incident
}

func (l *Lab) happen(ctx context.Context, s *step) error {
	node := l.world.spaces[NodeSpace(incidentNode)]
	if s.end {
		if err := l.endProxy(); err != nil {
			return err
		}
	}
	if s.stop {
		if err := l.followed(ctx); err != nil {
			return err
		}
		if err := l.signalBeside(syscall.SIGSTOP); err != nil {
			return err
		}
	}
	for _, f := range s.faults {
		if err := l.Fault(ctx, f[0], f[1], 0); err != nil {
			return err
		}
	}
	for _, c := range s.sysctls {
		if err := node.ns.SetSysctl(c.name, c.value); err != nil {
			return err
		}
	}
	if s.noRoute != "" {
		if err := l.nodeRoute(s.noRoute, unix.RTN_UNREACHABLE); err != nil {
			return err
		}
	}
	if s.detour != "" {
		if err := l.nodeDetour(s.detour, true); err != nil {
			return err
		}
	}
	if s.narrow != "" {
		if err := l.narrow(ctx, s.narrow, true); err != nil {
			return err
		}
	}
	if s.link[0] != "" {
		if err := l.secondLink(s.link[0], s.link[1], true); err != nil {
			return err
		}
	}
	if s.oneSided != "" {
		if err := l.nodeOneSided(s.oneSided, true); err != nil {
			return err
		}
	}
	if s.mtu != "" {
		if err := l.nodeMTU(s.mtu, 1000); err != nil {
			return err
		}
	}
	if s.busy != "" {
		if err := l.nodeBusy(s.busy, true); err != nil {
			return err
		}
	}
	if s.crowd {
		if err := l.crowd(worker, netip.MustParseAddrPort("10.96.0.11:80")); err != nil {
			return err
		}
	}
	if s.fill {
		if err := l.fill(); err != nil {
			return err
		}
	}
	if s.forget {
		if err := l.nodeForget(ctx); err != nil {
			return err
		}
	}
	if s.nft != "" {
		if err := l.nodeRun(ctx, "nft", "table ip guard { "+s.nft+"; }"); err != nil {
			return err
		}
	}
	if err := l.nodeIPTables(ctx, append(s.first, s.node...)); err != nil {
		return err
	}
	if s.pause > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(s.pause):
		}
	}
	if err := l.nodeIPTables(ctx, s.again); err != nil {
		return err
	}
	if s.edit == nil {
		return nil
	}
	path := filepath.Join(l.cfg.Dir, "shop.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed := s.edit(string(b))
	if changed == string(b) {
		return errors.New("the manifests are not those of the scenario incident")
	}
	if err := replaceFile(path, changed); err != nil {
		return err
	}
	if err := l.edited(ctx, len(s.then) > 0); err != nil {
		return err
	}
	for _, f := range s.then {
		if err := l.Fault(ctx, f[0], f[1], 0); err != nil {
			return err
		}
	}
	return nil
}

// edited returns when the changed manifests are known, as far as that is awaited.
func (l *Lab) edited(ctx context.Context, more bool) error {
	switch {
	case l.cfg.Edited != nil:
		return l.cfg.Edited(ctx)
	case !more:
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Second): // so that it has been read
		return nil
	}
}

// nodeRun runs a program on the node.
func (l *Lab) nodeRun(ctx context.Context, program string, args ...string) error {
	_, err := exec.Run(ctx, exec.Spec{Path: program, Args: args, Netns: l.world.spaces[NodeSpace(incidentNode)].ns.Fd()})
	return err
}

// followed waits until the node's rules lead to foo-3 again, as they do before an
// incident.
func (l *Lab) followed(ctx context.Context) error {
	if l.cfg.SignalProxy != nil {
		return nil // its rules may be of any kind
	}
	program := xtables.Program(xtables.NFT, xtables.IPv4, "save")
	if l.flavour() == "legacy" {
		program = xtables.Program(xtables.Legacy, xtables.IPv4, "save")
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		res, err := exec.Run(ctx, exec.Spec{Path: program, Args: []string{"-t", "nat"}, Netns: l.world.spaces[NodeSpace(incidentNode)].ns.Fd()})
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(res.Stdout)) {
			if strings.Contains(line, "shop/foo:http") && strings.Contains(line, "10.244.1.23:8080") {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return errors.New("the rules do not lead to foo-3")
		}
	}
}

// signalBeside signals the kube-proxy that kptrace only watches.
func (l *Lab) signalBeside(sig syscall.Signal) error {
	if l.cfg.SignalProxy != nil {
		return l.cfg.SignalProxy(sig)
	}
	l.nodesMu.Lock()
	defer l.nodesMu.Unlock()
	p := l.nodes[besideKey(incidentNode)]
	if p == nil {
		return errors.New("there is no kube-proxy beside kptrace: the lab needs --beside")
	}
	return p.Signal(sig)
}

// endProxy ends the node's proxy, which is to be one in userspace mode.
func (l *Lab) endProxy() error {
	if l.mode() != proxy.Userspace {
		return errors.New("only the userspace proxy ends connections with itself: the lab needs --mode userspace")
	}
	l.nodesMu.Lock()
	defer l.nodesMu.Unlock()
	p := l.nodes[incidentNode]
	if p == nil {
		return errors.New("no proxy runs on " + incidentNode)
	}
	return p.Signal(syscall.SIGTERM)
}

// nodeIPTables runs iptables of the flavour that the node's proxy uses.
func (l *Lab) nodeIPTables(ctx context.Context, commands [][]string) error {
	if len(commands) == 0 {
		return nil
	}
	flavour := xtables.NFT
	if l.flavour() == "legacy" {
		flavour = xtables.Legacy
	}
	for _, args := range commands {
		if err := l.nodeRun(ctx, xtables.Program(flavour, xtables.IPv4, ""), append([]string{"-w", "5"}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// nodeRoute makes the node's route to a pod one of a kind.
func (l *Lab) nodeRoute(to string, kind int) error {
	sp := l.world.spaces[NodeSpace(incidentNode)]
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return err
	}
	for _, r := range sp.plan.Routes {
		if r.Dst.String() != to {
			continue
		}
		_ = sp.nl.RouteDel(&netlink.Route{Dst: dst, Scope: netlink.SCOPE_NOWHERE})
		route := &netlink.Route{Dst: dst, Type: kind}
		if kind == unix.RTN_UNICAST {
			link, err := sp.nl.LinkByName(r.Dev)
			if err != nil {
				return err
			}
			route.LinkIndex, route.Scope = link.Attrs().Index, netlink.SCOPE_LINK
		}
		return sp.nl.RouteAdd(route)
	}
	return fmt.Errorf("the node has no route to %s", to)
}

// nodeDetour makes a route of the node's to an address that leads to foo-3, or
// takes it away.
func (l *Lab) nodeDetour(to string, on bool) error {
	sp := l.world.spaces[NodeSpace(incidentNode)]
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return err
	}
	link, err := sp.nl.LinkByName(devName("veth", PodSpace("shop", "foo-3")))
	if err != nil {
		return err
	}
	route := &netlink.Route{Dst: dst, LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK}
	if !on {
		return sp.nl.RouteDel(route)
	}
	return sp.nl.RouteAdd(route)
}

// nodeMTU sets the MTU of the node's link to a pod ("NAMESPACE/NAME").
func (l *Lab) nodeMTU(pod string, mtu int) error {
	sp := l.world.spaces[NodeSpace(incidentNode)]
	namespace, name, _ := strings.Cut(pod, "/")
	link, err := sp.nl.LinkByName(devName("veth", PodSpace(namespace, name)))
	if err != nil {
		return err
	}
	return sp.nl.LinkSetMTU(link, mtu)
}

// nodeBusy has eight of the node's ports be taken by connections to an endpoint, or
// not.
func (l *Lab) nodeBusy(to string, on bool) error {
	ep, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	var node netip.Addr
	for i := range l.cluster.Nodes {
		if n := &l.cluster.Nodes[i]; n.Name == incidentNode {
			node = gateway(n.PodCIDR) // which it has towards pods
		}
	}
	return l.Do(NodeSpace(incidentNode), func() error {
		c, err := conntrack.Open(conntrack.Config{})
		if err != nil {
			return err
		}
		defer c.Close()
		for port := uint16(61000); port < 61008; port++ {
			t := conntrack.NewTuple(conntrack.TCP, netip.AddrPortFrom(node, port), ep)
			f := conntrack.Flow{Orig: t, Reply: t.Reverse(), Timeout: time.Hour}
			if on {
				err = c.Create(f)
			} else {
				err = c.Delete(f)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
}

// nodeForget deletes the node's entries of established connections.
func (l *Lab) nodeForget(ctx context.Context) error {
	return l.Do(NodeSpace(incidentNode), func() error {
		c, err := conntrack.Open(conntrack.Config{})
		if err != nil {
			return err
		}
		defer c.Close()
		var open []conntrack.Flow
		err = c.Dump(ctx, func(f conntrack.Flow) error {
			if f.Orig.Proto() == conntrack.TCP && f.State == conntrack.TCPEstablished {
				open = append(open, f)
			}
			return nil
		})
		for i := range open {
			if err == nil {
				err = c.Delete(open[i])
			}
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		}
		return err
	})
}

// Heal undoes the last Incident, so that another one can happen.
func (l *Lab) Heal(ctx context.Context) error {
	l.reportMu.Lock()
	n, healed := l.incident, l.healed
	l.healed = true
	l.reportMu.Unlock()
	if n == 0 || healed {
		return nil
	}
	in, _ := Incidents()[n-1].In(l.mode())
	s := in.do
	if err := l.endWork(); err != nil {
		return err
	}
	if s.crowd {
		if err := l.crowdRoutes(worker, false); err != nil {
			return err
		}
	}
	node := l.world.spaces[NodeSpace(incidentNode)]
	for _, f := range slices.Concat(s.faults, s.then) {
		if err := l.Fault(ctx, FaultHeal, f[1], 0); err != nil {
			return err
		}
	}
	for _, c := range s.sysctls {
		if err := node.ns.SetSysctl(c.name, c.was); err != nil {
			return err
		}
	}
	if s.noRoute != "" {
		if err := l.nodeRoute(s.noRoute, unix.RTN_UNICAST); err != nil {
			return err
		}
	}
	if s.detour != "" {
		if err := l.nodeDetour(s.detour, false); err != nil {
			return err
		}
	}
	if s.narrow != "" {
		if err := l.narrow(ctx, s.narrow, false); err != nil {
			return err
		}
	}
	if s.link[0] != "" {
		if err := l.secondLink(s.link[0], s.link[1], false); err != nil {
			return err
		}
	}
	if s.oneSided != "" {
		if err := l.nodeOneSided(s.oneSided, false); err != nil {
			return err
		}
	}
	if s.mtu != "" {
		if err := l.nodeMTU(s.mtu, 1500); err != nil {
			return err
		}
	}
	if s.busy != "" {
		if err := l.nodeBusy(s.busy, false); err != nil {
			return err
		}
	}
	if s.nft != "" {
		if err := l.nodeRun(ctx, "nft", "delete table ip guard"); err != nil {
			return err
		}
	}
	if s.edit != nil {
		b, err := scenarios.ReadFile("scenario/" + IncidentScenario + "/shop.yaml")
		if err != nil {
			return err
		}
		if err := replaceFile(filepath.Join(l.cfg.Dir, "shop.yaml"), string(b)); err != nil {
			return err
		}
	}
	if s.stop {
		if err := l.signalBeside(syscall.SIGCONT); err != nil {
			return err
		}
	}
	var undo [][]string
	for _, args := range slices.Backward(s.node) {
		if u := opposite(args); u != nil {
			undo = append(undo, u...)
		}
	}
	return l.nodeIPTables(ctx, undo)
}

// opposite undoes a command of iptables.
func opposite(args []string) [][]string {
	for i, a := range args {
		c := slices.Clone(args)
		switch a {
		case "-I", "-A":
			c[i] = "-D"
			return [][]string{c}
		case "-N":
			return [][]string{{"-X", args[i+1]}}
		case "-P":
			c[i+2] = "ACCEPT"
			return [][]string{c}
		}
	}
	return nil
}

// replaceFile writes a file at once, as editors do.
func replaceFile(path, text string) error {
	tmp := filepath.Join(filepath.Dir(path), ".new-"+filepath.Base(path))
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// incidentSettle is how long traffic runs before an incident happens, so that
// there is something to compare with and affinity is settled.
const incidentSettle = 3 * time.Second

// RunIncident lets traffic run for a moment and then an incident happen.
func (l *Lab) RunIncident(ctx context.Context, n int) error {
	if err := l.StartTraffic(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(incidentSettle):
	}
	return l.Incident(ctx, n)
}
