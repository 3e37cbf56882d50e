package iptables

import (
	"fmt"

	"github.com/kptrace/kptrace/internal/netns"
)

// inNetns runs f in the network namespace that is programmed.
func (b *Backend) inNetns(f func() error) error {
	if b.cfg.Tools.Netns == 0 {
		return f()
	}
	ns, err := netns.Open(fmt.Sprintf("/proc/self/fd/%d", b.cfg.Tools.Netns))
	if err != nil {
		return fmt.Errorf("proxy/iptables: %w", err)
	}
	defer ns.Close()
	return ns.Do(f)
}
