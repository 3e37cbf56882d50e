package userspace

import (
	"log/slog"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Config says how the mode works on this node. Its zero value chooses ports as
// the kernel gives them, and traces nothing.
type Config struct {
	// Tools says where the programs are and in which namespace they run. The
	// process listens and dials there.
	Tools xtables.Tools
	// Flavour is "auto", "nft" or "legacy"; empty means auto.
	Flavour string

	// Detect tells the traffic of pods. Under policy Local, pods that dial an
	// outside address may use all endpoints.
	Detect proxy.DetectConfig
	// NodePorts says which of the node's addresses serve node ports.
	NodePorts proxy.NodePortConfig
	// LocalhostNodePorts serves node ports on 127.0.0.0/8.
	LocalhostNodePorts bool

	// Ports is where the ports come from; the zero value is the kernel's
	// choice.
	Ports PortRange
	// UDPTimeout ends a UDP session through which nothing goes; zero means
	// DefaultUDPTimeout.
	UDPTimeout time.Duration
	// Drain is how long connections may go on when the proxy ends; zero means
	// DefaultDrain, less than zero not at all.
	Drain time.Duration
	// DialLimits are how long each try may take; nil means DialLimits().
	DialLimits []time.Duration
	// MaxDescriptors bounds the descriptors used for connections, sessions and
	// ports; zero means seven eighths of the process's limit.
	MaxDescriptors int

	// Trace adds NFLOG rules to refusals; they report to NFLogGroup, 100 if
	// zero.
	Trace      bool
	NFLogGroup uint16
	Logger     *slog.Logger
}

const (
	// DefaultUDPTimeout is kube-proxy's --udp-timeout.
	DefaultUDPTimeout = 250 * time.Millisecond
	// DefaultDrain is for the last answers of requests under way.
	DefaultDrain      = 2 * time.Second
	defaultNFLogGroup = 100
	nflogSize         = 64
)

// DialLimits are kube-proxy's.
func DialLimits() []time.Duration {
	return []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second}
}

func (c Config) withDefaults() Config {
	if c.Flavour == "" {
		c.Flavour = "auto"
	}
	if c.UDPTimeout == 0 {
		c.UDPTimeout = DefaultUDPTimeout
	}
	if c.Drain == 0 {
		c.Drain = DefaultDrain
	}
	if c.DialLimits == nil {
		c.DialLimits = DialLimits()
	}
	if c.NFLogGroup == 0 {
		c.NFLogGroup = defaultNFLogGroup
	}
	if c.MaxDescriptors == 0 {
		limit := descriptorLimit()
		c.MaxDescriptors = limit - limit/8
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}
