package iptables

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// The packet counters that rules feed where the kernel has them, by
// kube-proxy's names.
const (
	// CounterInvalid counts forwarded packets dropped because connection
	// tracking called them invalid.
	CounterInvalid = "ct_state_invalid_dropped_pkts"
	// CounterLocalhost counts connections to node ports on 127.0.0.0/8.
	CounterLocalhost = "localhost_nps_accepted_pkts"
)

// EnsureCounters makes both counters in the calling thread's network namespace.
// An error is for a kernel without them (nfnetlink_acct, Linux 3.3) or missing
// CAP_NET_ADMIN; without Config.Counters all works but the counting.
func EnsureCounters() error {
	for _, name := range []string{CounterInvalid, CounterLocalhost} {
		if err := nfnl.EnsureCounter(name); err != nil {
			return fmt.Errorf("proxy/iptables: %w", err)
		}
	}
	return nil
}

// deleteCounters removes both, as far as nobody's rules feed them any more. A
// kernel that has no counters has none of ours.
func deleteCounters() error {
	for _, name := range []string{CounterInvalid, CounterLocalhost} {
		err := nfnl.DeleteCounter(name)
		if err != nil && !errors.Is(err, syscall.EBUSY) && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, syscall.EINVAL) {
			return err
		}
	}
	return nil
}
