package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/pflag"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/kube/config"
	"github.com/kptrace/kptrace/proxy/userspace"
)

// relayFlags are the flags of the userspace mode.
type relayFlags struct {
	portRange         string
	udpTimeout, drain time.Duration
	reroute           time.Duration
}

func (f *relayFlags) add(fl *pflag.FlagSet) {
	fl.StringVar(&f.portRange, "proxy-port-range", "", "userspace mode: ports to listen at, one for each Service port, as 30000-30999 (default: the kernel's choice)")
	fl.DurationVar(&f.udpTimeout, "udp-timeout", userspace.DefaultUDPTimeout, "userspace mode: how long a UDP client's session lasts with nothing going through it")
	fl.DurationVar(&f.drain, "userspace-drain", userspace.DefaultDrain, "userspace mode: how long connections may go on when the proxy ends; 0 closes them at once")
	fl.DurationVar(&f.reroute, "reroute-unanswered", 0, "iptables mode: send a TCP connection to another pod if nobody answered it for this long, as 500ms; 0 never does")
}

// rerouteLeast keeps answers that are merely late from being given up.
const rerouteLeast = 50 * time.Millisecond

// checkReroute refuses a time in which nothing can be rerouted.
func (f *relayFlags) checkReroute(mode proxy.Mode, trace bool) error {
	switch {
	case f.reroute == 0:
	case f.reroute < rerouteLeast:
		return fmt.Errorf("--reroute-unanswered=%v: give at least %v", f.reroute, rerouteLeast)
	case mode == proxy.Userspace:
		return errors.New("--reroute-unanswered: the userspace mode tries another pod anyway; leave the flag out")
	case mode != proxy.IPTables:
		return fmt.Errorf("--reroute-unanswered is for the iptables mode, not for %s", mode)
	case !trace:
		return errors.New("--reroute-unanswered needs the tracer, which sees that nobody answers: leave out --trace=false")
	}
	return nil
}

// config says how the userspace mode works; ipt is what the iptables mode would
// do here, most of which holds for both. The configuration is valid.
func (f *relayFlags) config(c *config.Config, ipt *iptables.Config, logger *slog.Logger) (userspace.Config, error) {
	cfg := userspace.Config{
		Flavour: ipt.Flavour, Trace: ipt.Trace, NFLogGroup: ipt.NFLogGroup, LocalhostNodePorts: ipt.LocalhostNodePorts,
		Detect:     proxy.DetectConfig{Mode: ipt.LocalMode, ClusterCIDRs: ipt.ClusterCIDRs, Interface: ipt.PodInterface},
		NodePorts:  proxy.NodePortConfig{Ranges: ipt.NodePortAddresses, Primary: ipt.NodePortPrimary, LocalAddrs: ipt.LocalAddrs},
		UDPTimeout: f.udpTimeout, Drain: f.drain, Logger: logger,
	}
	if f.udpTimeout <= 0 {
		return cfg, fmt.Errorf("--udp-timeout=%v: give a time above 0", f.udpTimeout)
	}
	if f.drain < 0 {
		return cfg, fmt.Errorf("--userspace-drain=%v: is negative", f.drain)
	}
	if f.drain == 0 {
		cfg.Drain = -1
	}
	text := f.portRange
	if text == "" {
		text = c.PortRange
	}
	ports, err := userspace.ParsePortRange(text)
	if err != nil {
		return cfg, fmt.Errorf("--proxy-port-range: %w", err)
	}
	cfg.Ports = ports
	return cfg, nil
}

// cleaner removes what one or several modes write.
type cleaner []node.Cleaner

// Cleanup removes what all of them write.
func (c cleaner) Cleanup(ctx context.Context) error {
	var errs []error
	for _, b := range c {
		errs = append(errs, b.Cleanup(ctx))
	}
	return errors.Join(errs...)
}

// allModes removes what any mode writes but one, "" for none: a node changes
// its mode by starting in another one. The modes iptables and ipvs have chains of
// the same names: while one runs, only what is the other's alone goes.
func allModes(flavour string, but proxy.Mode) (cleaner, error) {
	var all cleaner
	switch but {
	case "":
		onIPVS, err := ipvs.New(ipvs.Config{Flavour: flavour})
		if err != nil {
			return nil, err
		}
		all = append(all, onIPVS, iptables.NewDual(iptables.Config{Flavour: flavour}))
	case proxy.IPTables:
		all = append(all, ipvs.NewLeftovers(ipvs.Config{Flavour: flavour}))
	case proxy.Userspace:
		all = append(all, ipvs.NewLeftovers(ipvs.Config{Flavour: flavour}), iptables.NewDual(iptables.Config{Flavour: flavour}))
	case proxy.IPVS: // removes the chains of iptables itself
	}
	if but != proxy.Userspace {
		all = append(all, userspace.New(userspace.Config{Flavour: flavour}))
	}
	return all, nil
}
