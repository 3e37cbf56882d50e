package config

import (
	"net"
	"net/netip"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
)

// The ports of kube-proxy.
const (
	HealthzPort = 10256
	MetricsPort = 10249
)

// Default returns kube-proxy's defaults.
func Default() *Config {
	cfg := new(Config)
	SetDefaults(cfg)
	return cfg
}

// SetDefaults fills in what is not given.
func SetDefaults(c *Config) {
	given(&c.BindAddress, "0.0.0.0")
	healthz, metrics := "0.0.0.0", "127.0.0.1"
	if ip, err := netip.ParseAddr(c.BindAddress); err == nil && ip.Is6() && !ip.Is4In6() {
		healthz, metrics = "::", "::1"
	}
	c.HealthzBindAddress = WithPort(c.HealthzBindAddress, healthz, HealthzPort)
	c.MetricsBindAddress = WithPort(c.MetricsBindAddress, metrics, MetricsPort)
	pointed(&c.OOMScoreAdj, -999)

	pointed(&c.IPTables.MasqueradeBit, 14)
	pointed(&c.IPTables.LocalhostNodePorts, true)
	given(&c.IPTables.SyncPeriod.Duration, 30*time.Second)
	given(&c.IPTables.MinSyncPeriod.Duration, time.Second)
	given(&c.IPVS.SyncPeriod.Duration, 30*time.Second)
	pointed(&c.NFTables.MasqueradeBit, 14)
	given(&c.NFTables.SyncPeriod.Duration, 30*time.Second)
	given(&c.NFTables.MinSyncPeriod.Duration, time.Second)

	pointed(&c.Conntrack.MaxPerCore, 32*1024)
	pointed(&c.Conntrack.Min, 128*1024)
	pointed(&c.Conntrack.TCPEstablishedTimeout, metav1.Duration{Duration: 24 * time.Hour})
	pointed(&c.Conntrack.TCPCloseWaitTimeout, metav1.Duration{Duration: time.Hour})
	given(&c.ConfigSyncPeriod.Duration, 15*time.Minute)

	given(&c.ClientConnection.ContentType, "application/vnd.kubernetes.protobuf")
	given(&c.ClientConnection.QPS, 5)
	given(&c.ClientConnection.Burst, 10)
	if c.FeatureGates == nil {
		c.FeatureGates = map[string]bool{}
	}
	logsapi.SetRecommendedLoggingConfiguration(&c.Logging)
}

func given[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func pointed[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

// WithPort completes an address: an empty one by host and port, one without
// port by port. What is no address stays, for Validate to name.
func WithPort(addr, host string, port int) string {
	if addr == "" {
		return net.JoinHostPort(host, strconv.Itoa(port))
	}
	bare := addr
	if len(bare) > 2 && bare[0] == '[' && bare[len(bare)-1] == ']' {
		bare = bare[1 : len(bare)-1]
	}
	if _, err := netip.ParseAddr(bare); err == nil {
		return net.JoinHostPort(bare, strconv.Itoa(port))
	}
	return addr
}
