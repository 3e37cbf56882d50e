package beside

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Config says how a Backend watches.
type Config struct {
	Tools xtables.Tools
	// Flavour is the flavour of iptables to read and to write our own chains
	// with: "nft", "legacy", or "auto" for the one in which a kube-proxy's
	// rules are live.
	Flavour string
	// ReadOnly adds nothing to the kernel. Connections are then known from
	// connection tracking alone.
	ReadOnly bool
	// NFLogGroup is the group that our rules report to.
	NFLogGroup uint16
	// Predict returns the mode of ours that decides as a kube-proxy of the given
	// mode should, nil if there is none. Of it only Render is used.
	Predict func(proxy.Mode) proxy.Backend
	// LocalAddrs are the node's addresses: proxy.InterfaceAddrs if nil.
	LocalAddrs func() []netip.Addr
	// LookEvery is how often Follow looks for changes: 1 s if zero.
	LookEvery time.Duration
	// MaxElements bounds the members of each of our sets: 2^20 if zero.
	MaxElements uint32
	Logger      *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.LocalAddrs == nil {
		c.LocalAddrs = proxy.InterfaceAddrs
	}
	if c.LookEvery <= 0 {
		c.LookEvery = time.Second
	}
	if c.MaxElements == 0 {
		c.MaxElements = 1 << 20
	}
	if c.Flavour == "" {
		c.Flavour = "auto"
	}
	if c.Predict == nil {
		c.Predict = func(proxy.Mode) proxy.Backend { return nil }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}
