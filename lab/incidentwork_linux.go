package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/nlbatch"
)

// workEnds is how long what an incident goes on with may take to end.
const workEnds = time.Minute

// background is what an incident goes on with until it is healed.
type background struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// goOn runs f in the background until the incident is healed or the lab is closed.
func (l *Lab) goOn(f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	b := &background{cancel, make(chan struct{})}
	l.reportMu.Lock()
	l.backgrounds = append(l.backgrounds, b)
	l.reportMu.Unlock()
	l.watchers.Go(func() {
		defer close(b.done)
		defer cancel()
		f(ctx)
	})
}

// endWork ends what the last incident goes on with.
func (l *Lab) endWork() error {
	l.reportMu.Lock()
	all := l.backgrounds
	l.backgrounds = nil
	l.reportMu.Unlock()
	for _, b := range all {
		b.cancel()
	}
	for _, b := range all {
		select {
		case <-b.done:
		case <-time.After(workEnds):
			return errors.New("what the incident did in the background does not end")
		}
	}
	return nil
}

// in runs f in a thread of its own in the namespace of a pod or node. Sockets that
// f opens belong there.
func (l *Lab) in(target string, f func()) {
	_ = l.Do(target, func() error {
		f()
		return nil
	})
}

// podSpace is the space of a pod ("NAMESPACE/NAME").
func podSpace(pod string) string {
	namespace, name, _ := strings.Cut(pod, "/")
	return PodSpace(namespace, name)
}

const (
	// crowdSize is how many clients a crowd has: three lists of 100 do not hold them.
	crowdSize = 390
	// crowdEvery is how long it is from one of its connections to the next.
	crowdEvery = 10 * time.Millisecond
)

// crowdNet are the addresses of a crowd.
var crowdNet = netip.MustParsePrefix("10.244.8.0/23") //nolint:gochecknoglobals // an address

// crowd has many clients, who all live in one pod, connect to a Service one after
// the other, again and again.
func (l *Lab) crowd(pod string, to netip.AddrPort) error {
	home := podSpace(pod)
	if err := l.crowdRoutes(pod, true); err != nil {
		return err
	}
	l.goOn(func(ctx context.Context) {
		l.in(home, func() {
			tick := time.NewTicker(crowdEvery)
			defer tick.Stop()
			for i := 0; ; i = (i + 1) % crowdSize {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				from := crowdNet.Addr().As4()
				binary.BigEndian.PutUint32(from[:], binary.BigEndian.Uint32(from[:])+uint32(i)+1)
				d := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: from[:]}}
				if c, err := d.DialContext(ctx, "tcp4", to.String()); err == nil {
					c.Close()
				}
			}
		})
	})
	return nil
}

// crowdRoutes gives the pod the crowd's addresses, or takes them away.
func (l *Lab) crowdRoutes(pod string, on bool) error {
	home := podSpace(pod)
	node, inside := l.world.spaces[NodeSpace(incidentNode)], l.world.spaces[home]
	veth, err := node.nl.LinkByName(devName("veth", home))
	if err != nil {
		return err
	}
	lo, err := inside.nl.LinkByName("lo")
	if err != nil {
		return err
	}
	var addr netip.Addr
	for i := range l.cluster.Pods {
		if p := &l.cluster.Pods[i]; p.ID() == pod {
			addr = p.Addr
		}
	}
	there := &netlink.Route{Dst: ipNet(crowdNet), LinkIndex: veth.Attrs().Index, Gw: addr.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	here := &netlink.Route{Dst: ipNet(crowdNet), LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
	if !on {
		return errors.Join(node.nl.RouteDel(there), inside.nl.RouteDel(here))
	}
	return errors.Join(node.nl.RouteAdd(there), inside.nl.RouteAdd(here))
}

const (
	// fillMost is how many entries a lab makes at most, some 400 bytes each.
	fillMost = 600000
	// fillPiece entries are made in one go, and there is a pause of fillPause before
	// the next, so that those who read of new entries keep up.
	fillPiece = 1000
	fillAgain = 20
	fillPause = 10 * time.Millisecond
)

// Of NETLINK_NETFILTER's subsystem ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	entryNew, entryDelete                                               = 0, 2
	entryOrig, entryReply, entryStatus, entryProtoInfo, entryTimeout    = 1, 2, 3, 4, 7
	entryIP, entryProto, entryIPSrc, entryIPDst                         = 1, 2, 1, 2
	entryProtoNum, entryProtoSport, entryProtoDport, entryTCP, tcpState = 1, 2, 3, 1, 1
	nestedAttr                                                          = 1 << 15
	// fillStatus is seen reply, assured, confirmed: nothing throws such an entry out.
	fillStatus = 2 | 4 | 8
)

// fill makes entries of connections that nobody ends until the node's table of
// connections has no room, and again whenever it has some.
func (l *Lab) fill() error {
	var limit uint64
	var conn *nlbatch.Conn
	err := l.Do(NodeSpace(incidentNode), func() error {
		c, err := conntrack.Open(conntrack.Config{})
		if err != nil {
			return err
		}
		defer c.Close()
		st, err := c.Stats()
		if err != nil {
			return err
		}
		if limit = st.Limit; limit > fillMost {
			return fmt.Errorf("nf_conntrack_max is %d here: more than %d entries are too many for a lab", limit, fillMost)
		}
		conn, err = nlbatch.Open(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return err
	}
	made := 0
	// more makes entries until there is no room, or ctx ends.
	more := func(ctx context.Context, piece int) {
		for made < fillMost && ctx.Err() == nil {
			n := pieces(conn, entryNew, made, made+piece)
			if made += n; n < piece {
				return
			}
			time.Sleep(fillPause)
		}
	}
	more(context.Background(), fillPiece)
	l.goOn(func(ctx context.Context) {
		defer conn.Close()
		for ctx.Err() == nil {
			more(ctx, fillAgain)
			select {
			case <-ctx.Done():
			case <-time.After(fillPause):
			}
		}
		for i := 0; i < made; i += fillPiece {
			select {
			case <-l.closing: // all goes with the namespace
				return
			case <-time.After(fillPause):
			}
			pieces(conn, entryDelete, i, min(made, i+fillPiece))
		}
	})
	return nil
}

// pieces makes or deletes entries, and returns how many the kernel took before it
// refused one.
func pieces(conn *nlbatch.Conn, msg uint8, from, to int) int {
	var msgs []nlbatch.Message
	for i := from; i < to; i++ {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i/60000)}), uint16(1024+i%60000))
		server := netip.MustParseAddrPort("203.0.113.250:443")
		body := []byte{unix.AF_INET, 0, 0, 0}
		body = nfnl.AppendAttr(body, entryOrig|nestedAttr, entryTuple(client, server)...)
		flags := uint16(unix.NLM_F_REQUEST)
		if msg == entryNew {
			flags |= unix.NLM_F_CREATE | unix.NLM_F_EXCL
			body = nfnl.AppendAttr(body, entryReply|nestedAttr, entryTuple(server, client)...)
			body = nfnl.AppendAttr(body, entryStatus, binary.BigEndian.AppendUint32(nil, fillStatus)...)
			body = nfnl.AppendAttr(body, entryTimeout, binary.BigEndian.AppendUint32(nil, 3600)...)
			tcp := nfnl.AppendAttr(nil, tcpState, byte(conntrack.TCPEstablished))
			body = nfnl.AppendAttr(body, entryProtoInfo|nestedAttr, nfnl.AppendAttr(nil, entryTCP|nestedAttr, tcp...)...)
		}
		msgs = append(msgs, nlbatch.Message{Type: nfnl.Type(nfnl.SubsysConntrack, msg), Flags: flags, Body: body})
	}
	results, _ := conn.Do(msgs)
	for i, err := range results {
		if err != nil && !errors.Is(err, unix.EEXIST) { // it took some behind one that it refused
			return i
		}
	}
	return len(results)
}

func entryTuple(src, dst netip.AddrPort) []byte {
	ip := nfnl.AppendAttr(nil, entryIPSrc, src.Addr().AsSlice()...)
	ip = nfnl.AppendAttr(ip, entryIPDst, dst.Addr().AsSlice()...)
	proto := nfnl.AppendAttr(nil, entryProtoNum, unix.IPPROTO_TCP)
	proto = nfnl.AppendAttr(proto, entryProtoSport, binary.BigEndian.AppendUint16(nil, src.Port())...)
	proto = nfnl.AppendAttr(proto, entryProtoDport, binary.BigEndian.AppendUint16(nil, dst.Port())...)
	return nfnl.AppendAttr(nfnl.AppendAttr(nil, entryIP|nestedAttr, ip...), entryProto|nestedAttr, proto...)
}
