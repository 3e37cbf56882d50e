package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The values that kube-proxy knows. Userspace is older than the file format's
// present form and one of ours.
const (
	ModeIPTables  = "iptables"
	ModeIPVS      = "ipvs"
	ModeNFTables  = "nftables"
	ModeUserspace = "userspace"

	LocalClusterCIDR = "ClusterCIDR"
	LocalNodeCIDR    = "NodeCIDR"
	LocalBridge      = "BridgeInterface"
	LocalPrefix      = "InterfaceNamePrefix"

	// NodePortsPrimary stands for the node's own addresses.
	NodePortsPrimary = "primary"
)

// Validate returns every fault of a configuration with defaults filled in, one
// line each, which begins with the field as it stands in the file.
func Validate(c *Config) error {
	v := &validator{}
	if c.Mode != "" {
		v.oneOf("mode", string(c.Mode), ModeIPTables, ModeIPVS, ModeNFTables, ModeUserspace)
	}
	v.bit("iptables.masqueradeBit", c.IPTables.MasqueradeBit)
	switch c.Mode {
	case ModeIPVS:
		v.periods("ipvs", c.IPVS.SyncPeriod.Duration, c.IPVS.MinSyncPeriod.Duration)
		v.notNegative("ipvs.tcpTimeout", c.IPVS.TCPTimeout.Duration)
		v.notNegative("ipvs.tcpFinTimeout", c.IPVS.TCPFinTimeout.Duration)
		v.notNegative("ipvs.udpTimeout", c.IPVS.UDPTimeout.Duration)
		for i, s := range c.IPVS.ExcludeCIDRs {
			v.cidr(fmt.Sprintf("ipvs.excludeCIDRs[%d]", i), s)
		}
	case ModeNFTables:
		v.bit("nftables.masqueradeBit", c.NFTables.MasqueradeBit)
		v.periods("nftables", c.NFTables.SyncPeriod.Duration, c.NFTables.MinSyncPeriod.Duration)
	default:
		v.periods("iptables", c.IPTables.SyncPeriod.Duration, c.IPTables.MinSyncPeriod.Duration)
	}
	v.conntrack(c)
	if n := *c.OOMScoreAdj; n < -1000 || n > 1000 {
		v.bad("oomScoreAdj", n, "must be within -1000 to 1000")
	}
	if c.ConfigSyncPeriod.Duration <= 0 {
		v.bad("configSyncPeriod", c.ConfigSyncPeriod.Duration, "must be greater than 0")
	}
	if c.ClientConnection.Burst < 0 {
		v.bad("clientConnection.burst", c.ClientConnection.Burst, "must be greater than or equal to 0")
	}
	if _, err := netip.ParseAddr(c.BindAddress); err != nil {
		v.bad("bindAddress", c.BindAddress, "is not an IP address")
	}
	v.hostPort("healthzBindAddress", c.HealthzBindAddress)
	v.hostPort("metricsBindAddress", c.MetricsBindAddress)
	v.nodePorts(c.NodePortAddresses)
	v.local(c)
	if c.Logging.Format != "" {
		v.oneOf("logging.format", c.Logging.Format, "text", "json")
	}
	return errors.Join(v.errs...)
}

type validator struct{ errs []error }

func (v *validator) bad(field string, value any, format string, args ...any) {
	v.errs = append(v.errs, fmt.Errorf("%s: %q %s", field, fmt.Sprint(value), fmt.Sprintf(format, args...)))
}

func (v *validator) oneOf(field, value string, values ...string) {
	if !slices.Contains(values, value) {
		v.bad(field, value, "must be one of %s, or empty", strings.Join(values, ", "))
	}
}

func (v *validator) bit(field string, bit *int32) {
	if *bit < 0 || *bit > 31 {
		v.bad(field, *bit, "must be within 0 to 31")
	}
}

func (v *validator) notNegative(field string, d time.Duration) {
	if d < 0 {
		v.bad(field, d, "must be greater than or equal to 0")
	}
}

func (v *validator) periods(mode string, period, least time.Duration) {
	v.notNegative(mode+".minSyncPeriod", least)
	switch {
	case period <= 0:
		v.bad(mode+".syncPeriod", period, "must be greater than 0")
	case least > period:
		v.bad(mode+".syncPeriod", period, "must be greater than or equal to %s.minSyncPeriod, which is %v", mode, least)
	}
}

func (v *validator) conntrack(c *Config) {
	t := &c.Conntrack
	if *t.MaxPerCore < 0 {
		v.bad("conntrack.maxPerCore", *t.MaxPerCore, "must be greater than or equal to 0")
	}
	if *t.Min < 0 {
		v.bad("conntrack.min", *t.Min, "must be greater than or equal to 0")
	}
	v.notNegative("conntrack.tcpEstablishedTimeout", t.TCPEstablishedTimeout.Duration)
	v.notNegative("conntrack.tcpCloseWaitTimeout", t.TCPCloseWaitTimeout.Duration)
	v.notNegative("conntrack.udpTimeout", t.UDPTimeout.Duration)
	v.notNegative("conntrack.udpStreamTimeout", t.UDPStreamTimeout.Duration)
}

func (v *validator) cidr(field, text string) bool {
	if _, err := netip.ParsePrefix(text); err != nil {
		v.bad(field, text, "is not a CIDR such as 10.244.0.0/16 or fd00:10:244::/56")
		return false
	}
	return true
}

func (v *validator) hostPort(field, text string) {
	if text == "" {
		return // not served
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		v.bad(field, text, "must be IP:port")
		return
	}
	if _, err := netip.ParseAddr(host); err != nil {
		v.bad(field, text, "must begin with an IP address")
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		v.bad(field, text, "must end in a port within 1 to 65535")
	}
}

func (v *validator) nodePorts(list []string) {
	for i, s := range list {
		at := fmt.Sprintf("nodePortAddresses[%d]", i)
		switch {
		case s == NodePortsPrimary && len(list) > 1:
			v.bad(at, s, "cannot stand beside CIDRs")
			return
		case s != NodePortsPrimary:
			v.cidr(at, s)
		}
	}
}

func (v *validator) local(c *Config) {
	if c.DetectLocalMode != "" {
		v.oneOf("detectLocalMode", string(c.DetectLocalMode), LocalClusterCIDR, LocalNodeCIDR, LocalBridge, LocalPrefix)
	}
	switch c.DetectLocalMode {
	case LocalBridge:
		if c.DetectLocal.BridgeInterface == "" {
			v.bad("detectLocal.bridgeInterface", "", "must not be empty with detectLocalMode %s", LocalBridge)
		}
	case LocalPrefix:
		if c.DetectLocal.InterfaceNamePrefix == "" {
			v.bad("detectLocal.interfaceNamePrefix", "", "must not be empty with detectLocalMode %s", LocalPrefix)
		}
	case "", LocalClusterCIDR:
		v.clusterCIDR(c.ClusterCIDR)
	}
}

func (v *validator) clusterCIDR(text string) {
	if text == "" {
		return
	}
	list := strings.Split(text, ",")
	families := 0
	for _, s := range list {
		if !v.cidr("clusterCIDR", s) {
			return
		}
		if strings.Contains(s, ":") {
			families++
		}
	}
	if len(list) > 2 || len(list) == 2 && families != 1 {
		v.bad("clusterCIDR", text, "must be one CIDR, or one of each family such as 10.244.0.0/16,fd00:10:244::/56")
	}
}
