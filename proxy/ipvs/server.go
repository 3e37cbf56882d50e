package ipvs

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// key names a virtual server.
type key struct {
	addr  netip.AddrPort
	proto conntrack.Proto
}

// String writes it as people do: "10.96.0.10:80/tcp".
func (k key) String() string { return k.addr.String() + "/" + k.proto.String() }

// Flags of a virtual server (linux/ip_vs.h).
const (
	flagPersistent = 0x1
	flagFallback   = 0x8  // of sh and mh
	flagPort       = 0x10 // of sh and mh
	flagsOurs      = flagPersistent | flagFallback | flagPort
)

// virtual is a virtual server that should be there. It does not change.
type virtual struct {
	key
	scheduler string
	flags     uint32
	// timeout is that of persistence, in seconds.
	timeout uint32
	reals   []real
	via     proxy.Via
}

// real is a real server.
type real struct {
	addr   netip.AddrPort
	weight uint32
}

// settings writes what can be changed of a virtual server.
func (v *virtual) settings() settings { return settings{v.scheduler, v.flags, v.timeout} }

type settings struct {
	scheduler      string
	flags, timeout uint32
}

// text writes the virtual server as ipvsadm --restore takes it.
func (v *virtual) text(b []byte) []byte {
	service := map[conntrack.Proto]string{conntrack.TCP: "-t ", conntrack.UDP: "-u "}[v.proto]
	if service == "" {
		service = "--sctp-service "
	}
	service += v.addr.String()
	b = fmt.Appendf(b, "-A %s -s %s", service, v.scheduler)
	if v.flags&flagPersistent != 0 {
		b = fmt.Appendf(b, " -p %d", v.timeout)
	}
	if v.flags&flagFallback != 0 {
		b = fmt.Appendf(b, " -b %s-fallback", v.scheduler)
	}
	if v.flags&flagPort != 0 {
		b = fmt.Appendf(b, " -b %s-port", v.scheduler)
	}
	b = append(b, '\n')
	for i := range v.reals {
		b = fmt.Appendf(b, "-a %s -r %s -m -w %d\n", service, v.reals[i].addr, v.reals[i].weight)
	}
	return b
}

// persistence is a Service's affinity in seconds, at least one.
func persistence(d time.Duration) uint32 {
	return uint32(max(1, min(d/time.Second, 1<<31))) //nolint:gosec // bounded
}
