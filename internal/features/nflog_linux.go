package features

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_log.h.
const (
	subsysULOG      = 4
	nfulPacket      = 0
	nfulConfig      = 1
	nfulCfgCmd      = 1
	nfulCfgMode     = 2
	nfulCfgTimeout  = 4
	nfulCfgQThresh  = 5
	nfulCfgFlags    = 6
	nfulCmdBind     = 1
	nfulCopyPacket  = 2
	nfulFlagSeq     = 1
	nfulFlagCT      = 4
	nfulTimestamp   = 3
	nfulPrefix      = 10
	nfulSeq         = 12
	nfulCT          = 18
	nfulPayload     = 9
	nfulPacketHdr   = 1
	nfulCopyRange   = 128
	nfulTimeout10ms = 1
)

// nflog binds a group, sends a packet into an NFLOG rule and looks at the
// attributes that arrive.
func nflog(ctx context.Context, ns *netns.NS) (found, error) {
	const group, port, prefix = 107, 5303, "kp:probe"
	rules := fmt.Sprintf("*mangle\n-A PREROUTING -p udp --dport %d -j NFLOG --nflog-group %d --nflog-prefix %s\nCOMMIT\n",
		port, group, prefix)
	if err := restoreAny(ctx, ns, rules); err != nil {
		return nil, err
	}
	c, err := dial(ctx, ns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	glue, err := bindGroup(c, group)
	if err != nil {
		return nil, fmt.Errorf("features: binding an NFLOG group: %w", err)
	}
	if err := sendUDP(ns, port); err != nil {
		return nil, fmt.Errorf("features: sending into an NFLOG rule: %w", err)
	}
	attrs, err := nextPacket(c)
	if err != nil {
		return nil, errNothing("a packet from NFLOG", err)
	}
	if got := strings.TrimRight(string(attrs[nfulPrefix]), "\x00"); got != prefix {
		return nil, fmt.Errorf("features: NFLOG prefix %q came as %q", prefix, got)
	}
	for name, attr := range map[string]uint16{"sequence number": nfulSeq, "payload": nfulPayload, "packet header": nfulPacketHdr} {
		if len(attrs[attr]) == 0 {
			return nil, fmt.Errorf("features: NFLOG packet without %s", name)
		}
	}
	seen := found{NFLOG: "prefix, hook, payload, sequence number"}
	if len(attrs[nfulTimestamp]) == 16 {
		seen[NFLOGTimestamp] = "on a packet at PREROUTING"
	}
	if _, ok := attrs[nfulCT]; ok && glue {
		seen[NFLOGConntrack] = "conntrack entry on the packet"
	}
	return seen, nil
}

// bindGroup takes a group for this socket, with sequence numbers, and with
// conntrack entries where the kernel can; it reports whether it can.
func bindGroup(c *netlink.Conn, group uint16) (glue bool, err error) {
	config := func(attrs ...netlink.Attribute) error {
		body, err := netlink.MarshalAttributes(attrs)
		if err != nil {
			return err
		}
		_, err = c.Execute(netlink.Message{
			Header: netlink.Header{Type: messageType(subsysULOG, nfulConfig), Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group), body...),
		})
		return err
	}
	flags := func(f uint16) error {
		return config(netlink.Attribute{Type: nfulCfgFlags, Data: binary.BigEndian.AppendUint16(nil, f)})
	}
	be32 := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	if err := errors.Join(
		config(netlink.Attribute{Type: nfulCfgCmd, Data: []byte{nfulCmdBind}}),
		config(netlink.Attribute{Type: nfulCfgMode, Data: append(be32(nfulCopyRange), nfulCopyPacket, 0)},
			netlink.Attribute{Type: nfulCfgQThresh, Data: be32(1)},
			netlink.Attribute{Type: nfulCfgTimeout, Data: be32(nfulTimeout10ms)}),
		flags(nfulFlagSeq),
	); err != nil {
		return false, err
	}
	return flags(nfulFlagSeq|nfulFlagCT) == nil, nil
}

// nextPacket returns the attributes of the next packet of any group bound.
func nextPacket(c *netlink.Conn) (map[uint16][]byte, error) {
	for {
		msgs, err := c.Receive()
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			if m.Header.Type == messageType(subsysULOG, nfulPacket) {
				return attributes(m)
			}
		}
	}
}
