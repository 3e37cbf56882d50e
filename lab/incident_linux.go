package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
)

// incidentNode is the node that incidents happen on.
const incidentNode = "node1"

// Incident lets an incident happen; Heal undoes it. The lab must have the
// IncidentScenario.
func (l *Lab) Incident(ctx context.Context, n int) error {
	all := Incidents()
	if n < 1 || n > len(all) {
		return fmt.Errorf("lab: no incident %d: there are 1 to %d", n, len(all))
	}
	in := &all[n-1]
	l.reportMu.Lock()
	l.incident = n
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
	for _, f := range s.faults {
		if err := l.Fault(ctx, f[0], f[1], 0); err != nil {
			return err
		}
	}
	for _, c := range s.sysctls {
		if err := l.world.spaces[NodeSpace(incidentNode)].ns.SetSysctl(c[0], c[1]); err != nil {
			return err
		}
	}
	if s.noRoute != "" {
		if err := l.nodeRoute(s.noRoute, unix.RTN_UNREACHABLE); err != nil {
			return err
		}
	}
	if s.edit != nil {
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
	}
	return l.nodeIPTables(ctx, s.node)
}

// nodeIPTables runs iptables of the flavour that the node's proxy uses.
func (l *Lab) nodeIPTables(ctx context.Context, commands [][]string) error {
	if len(commands) == 0 {
		return nil
	}
	flavour := xtables.NFT
	if i := slices.Index(l.cfg.ProxyArgs, "--iptables-flavour"); i >= 0 && i+1 < len(l.cfg.ProxyArgs) && l.cfg.ProxyArgs[i+1] == "legacy" {
		flavour = xtables.Legacy
	}
	for _, args := range commands {
		spec := exec.Spec{Path: xtables.Program(flavour, xtables.IPv4, ""), Args: append([]string{"-w", "5"}, args...),
			Netns: l.world.spaces[NodeSpace(incidentNode)].ns.Fd()}
		if _, err := exec.Run(ctx, spec); err != nil {
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

// Heal undoes the last Incident, so that another one can happen.
func (l *Lab) Heal(ctx context.Context) error {
	n := l.Happened()
	if n == 0 {
		return nil
	}
	s := Incidents()[n-1].do
	for _, f := range s.faults {
		if err := l.Fault(ctx, FaultHeal, f[1], 0); err != nil {
			return err
		}
	}
	for _, c := range s.sysctls {
		if err := l.world.spaces[NodeSpace(incidentNode)].ns.SetSysctl(c[0], "1"); err != nil {
			return err
		}
	}
	if s.noRoute != "" {
		if err := l.nodeRoute(s.noRoute, unix.RTN_UNICAST); err != nil {
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
