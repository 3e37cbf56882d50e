package main

import "testing"

// TestCausesUserspace is TestCauses in userspace mode, where each try has a reason: of
// the incidents whose reason comes by another way there. KPTRACE_INCIDENTS=all is of
// all that can happen, in two minutes.
func TestCausesUserspace(t *testing.T) {
	t.Parallel()
	for flavour, only := range map[string]string{
		"nft":    "closed-port,shadow",
		"legacy": "policy,firewall,route,rollout,shadow,ports,bypass,eviction",
	} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			causes(t, flavour+", userspace", only, []string{"--iptables-flavour", flavour, "--mode", "userspace"})
		})
	}
}
