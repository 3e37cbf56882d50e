package features

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
)

// Groups of linux/netfilter/nfnetlink_compat.h, and the attribute of Linux
// 6.14 that libraries do not know (linux/netfilter/nfnetlink_conntrack.h).
const (
	groupConntrackNew     = 1
	groupConntrackDestroy = 3
	ctaTimestampEvent     = 27
)

// conntrackEvents makes a UDP flow on lo through a DNAT rule, deletes its
// entry, and reads NEW and DESTROY.
func conntrackEvents(ctx context.Context, ns *netns.NS) (found, error) {
	const asked, served = 5301, 5302
	rules := fmt.Sprintf("*nat\n-A OUTPUT -p udp -d 127.0.0.1 --dport %d -j DNAT --to-destination 127.0.0.1:%d\nCOMMIT\n",
		asked, served)
	if err := restoreAny(ctx, ns, rules); err != nil {
		return nil, err
	}
	// Absent settings show in the event.
	acct := ns.SetSysctl("net.netfilter.nf_conntrack_acct", "1")
	stamps := ns.SetSysctl("net.netfilter.nf_conntrack_timestamp", "1")

	// The listener first: the kernel gives entries made without one no
	// events for life (nf_conntrack_events=2).
	events, err := dial(ctx, ns, groupConntrackNew, groupConntrackDestroy)
	if err != nil {
		return nil, err
	}
	defer events.Close()
	server, err := listenUDP(ns, served)
	if err != nil {
		return nil, fmt.Errorf("features: listening: %w", err)
	}
	defer server.Close()
	if err := sendUDP(ns, asked); err != nil {
		return nil, fmt.Errorf("features: sending through a DNAT rule: %w", err)
	}
	created, timed, err := nextEvent(events, func(e conntrack.Event) bool { return e.Type == conntrack.EventNew })
	if err != nil {
		return nil, errNothing("a conntrack NEW event", err)
	}
	orig, reply := created.TupleOrig, created.TupleReply
	if orig.Proto.DestinationPort != asked || reply.Proto.SourcePort != served {
		return nil, fmt.Errorf("features: conntrack NEW shows %v -> %v, want ports %d and %d", orig, reply, asked, served)
	}
	if err := deleteFlow(ns, created); err != nil {
		return nil, fmt.Errorf("features: deleting a conntrack entry: %w", err)
	}
	destroyed, _, err := nextEvent(events, func(e conntrack.Event) bool { return e.Type == conntrack.EventDestroy })
	if err != nil {
		return nil, errNothing("a conntrack DESTROY event", err)
	}
	seen := found{ConntrackEvents: "NEW with both tuples of a DNAT, DESTROY"}
	if acct == nil && destroyed.CountersOrig.Packets == 1 {
		seen[ConntrackAccounting] = fmt.Sprintf("DESTROY with 1 packet, %d bytes", destroyed.CountersOrig.Bytes)
	}
	if stamps == nil && !destroyed.Timestamp.Start.IsZero() && !destroyed.Timestamp.Stop.Before(destroyed.Timestamp.Start) {
		seen[ConntrackTimestamps] = "DESTROY with start and stop"
	}
	if timed {
		seen[ConntrackEventTime] = "time of the event in NEW"
	}
	return seen, nil
}

// nextEvent returns the next event wanted, and whether the kernel put its
// time in it. It reads all others away.
func nextEvent(c *netlink.Conn, wanted func(conntrack.Event) bool) (flow *conntrack.Flow, timed bool, err error) {
	for {
		msgs, err := c.Receive()
		if err != nil {
			return nil, false, err
		}
		for _, m := range msgs {
			var e conntrack.Event
			if err := e.Unmarshal(m); err != nil {
				return nil, false, err
			}
			if !wanted(e) || e.Flow == nil {
				continue
			}
			attrs, err := attributes(m)
			_, timed := attrs[ctaTimestampEvent]
			return e.Flow, timed, err
		}
	}
}

func deleteFlow(ns *netns.NS, flow *conntrack.Flow) error {
	c, err := conntrack.Dial(&netlink.Config{NetNS: ns.Fd()})
	if err != nil {
		return err
	}
	return errors.Join(c.Delete(*flow), c.Close())
}
