package features

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// dial opens a netfilter netlink socket in ns that gives up when ctx does.
func dial(ctx context.Context, ns *netns.NS, groups ...uint32) (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: ns.Fd()})
	if err != nil {
		return nil, fmt.Errorf("features: opening a netfilter socket: %w", err)
	}
	for _, group := range groups {
		if err := c.JoinGroup(group); err != nil {
			c.Close()
			return nil, fmt.Errorf("features: joining netlink group %d: %w", group, err)
		}
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(probeTimeout)
	}
	if err := c.SetDeadline(deadline); err != nil {
		c.Close()
		return nil, fmt.Errorf("features: setting a deadline: %w", err)
	}
	return c, nil
}

// listenUDP opens a socket on 127.0.0.1 in ns.
func listenUDP(ns *netns.NS, port int) (*net.UDPConn, error) {
	var c *net.UDPConn
	err := ns.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		return err
	})
	return c, err
}

// sendUDP sends one packet to 127.0.0.1 in ns.
func sendUDP(ns *netns.NS, port int) error {
	return ns.Do(func() error {
		c, err := new(net.Dialer).DialContext(context.Background(), "udp4", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("kptrace"))
		return err
	})
}

// attributes returns the netlink attributes of a netfilter message, by type;
// of several of one type the last.
func attributes(m netlink.Message) (map[uint16][]byte, error) {
	const nfgenmsg = 4 // linux/netfilter/nfnetlink.h
	if len(m.Data) < nfgenmsg {
		return nil, fmt.Errorf("features: netfilter message of %d bytes", len(m.Data))
	}
	list, err := netlink.UnmarshalAttributes(m.Data[nfgenmsg:])
	if err != nil {
		return nil, fmt.Errorf("features: reading a netfilter message: %w", err)
	}
	attrs := map[uint16][]byte{}
	for _, a := range list {
		attrs[a.Type] = a.Data
	}
	return attrs, nil
}

// messageType is a netfilter subsystem and one of its messages.
func messageType(subsystem, message uint16) netlink.HeaderType {
	return netlink.HeaderType(subsystem<<8 | message)
}
