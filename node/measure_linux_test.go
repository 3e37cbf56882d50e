package node

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"
)

func TestHealthAddrs(t *testing.T) {
	loopback(t)
	for _, tt := range []struct {
		ranges []string
		want   []string
	}{
		{nil, nil},
		{[]string{"10.0.0.0/24"}, []string{"10.0.0.1"}},
		{[]string{"127.0.0.0/8", "10.0.0.0/24"}, []string{"127.0.0.1", "10.0.0.1"}},
		{[]string{"192.0.2.0/24"}, nil},
	} {
		n := &node{cfg: Config{Logger: slog.New(slog.DiscardHandler)}}
		for _, r := range tt.ranges {
			n.cfg.HealthPorts = append(n.cfg.HealthPorts, netip.MustParsePrefix(r))
		}
		if got := n.healthAddrs(); !slices.Equal(got, tt.want) {
			t.Errorf("%v: %v, want %v", tt.ranges, got, tt.want)
		}
	}
}
