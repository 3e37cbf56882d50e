package features

import (
	"context"
	"fmt"
	"strings"

	"github.com/kptrace/kptrace/internal/netns"
)

// From linux/netfilter/nfnetlink.h and nf_tables.h.
const (
	groupNFTrace    = 9
	subsysNFTables  = 10
	nftMsgTrace     = 17
	nftaTraceTable  = 1
	nftaTraceChain  = 2
	nftaTraceID     = 6
	nftaTraceCTID   = 18 // Linux 6.16
	traceProbePort  = 5304
	traceProbeRules = "*raw\n-A PREROUTING -p udp --dport 5304 -j TRACE\nCOMMIT\n" +
		"*mangle\n:KP-PROBE - [0:0]\n-A PREROUTING -j KP-PROBE\n-A KP-PROBE -m conntrack --ctstate NEW -j MARK --set-mark 1\nCOMMIT\n"
)

// nftTrace traces one packet through iptables-nft rules until it is in the
// mangle table, where it has a conntrack entry.
func nftTrace(ctx context.Context, ns *netns.NS) (found, error) {
	if err := restore(ctx, ns, "iptables-nft", traceProbeRules); err != nil {
		return nil, err
	}
	c, err := dial(ctx, ns, groupNFTrace)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := sendUDP(ns, traceProbePort); err != nil {
		return nil, fmt.Errorf("features: sending into a TRACE rule: %w", err)
	}
	var where []string
	for {
		msgs, err := c.Receive()
		if err != nil {
			return nil, errNothing("an nftables trace", err)
		}
		for _, m := range msgs {
			if m.Header.Type != messageType(subsysNFTables, nftMsgTrace) {
				continue
			}
			attrs, err := attributes(m)
			if err != nil {
				return nil, err
			}
			if len(attrs[nftaTraceID]) != 4 {
				return nil, fmt.Errorf("features: nftables trace without an id")
			}
			at := cString(attrs[nftaTraceTable]) + " " + cString(attrs[nftaTraceChain])
			where = append(where, at)
			if !strings.HasPrefix(at, "mangle ") {
				continue
			}
			// The first message of a base chain carries the packet.
			seen := found{NFTTrace: strings.Join(where, ", ")}
			if id, ok := attrs[nftaTraceCTID]; ok && len(id) == 4 {
				seen[NFTTraceConntrack] = "conntrack id in " + at
			}
			return seen, nil
		}
	}
}

// legacyTrace does the same with iptables-legacy, whose trace comes as NFLOG
// group 0 once nf_log is told so.
func legacyTrace(ctx context.Context, ns *netns.NS) (found, error) {
	if err := restore(ctx, ns, "iptables-legacy", traceProbeRules); err != nil {
		return nil, err
	}
	c, err := dial(ctx, ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := bindGroup(c, 0); err != nil {
		return nil, fmt.Errorf("features: binding NFLOG group 0: %w", err)
	}
	if err := ns.SetSysctl("net.netfilter.nf_log.2", "nfnetlink_log"); err != nil {
		return nil, err
	}
	if err := sendUDP(ns, traceProbePort); err != nil {
		return nil, fmt.Errorf("features: sending into a TRACE rule: %w", err)
	}
	var where []string
	for {
		attrs, err := nextPacket(c)
		if err != nil {
			return nil, errNothing("an iptables-legacy trace", err)
		}
		prefix := cString(attrs[nfulPrefix])
		where = append(where, strings.TrimSpace(strings.TrimPrefix(prefix, "TRACE: ")))
		if strings.HasPrefix(prefix, "TRACE: mangle:KP-PROBE:rule:1") {
			return found{LegacyTrace: strings.Join(where, ", ")}, nil
		}
	}
}

func cString(b []byte) string { return strings.TrimRight(string(b), "\x00") }
