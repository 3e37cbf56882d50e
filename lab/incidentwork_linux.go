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

	"github.com/kptrace/kptrace/internal/nfnl"
)

// workEnds is how long what an incident goes on with may take to end.
const workEnds = 10 * time.Second

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
	// raceOf is how many datagrams race, raceHeld how long each is held after its
	// endpoint was picked, and raceEvery how often there is a race.
	raceOf    = 8
	raceHeld  = 20 * time.Millisecond
	raceEvery = 400 * time.Millisecond
)

// Of NETLINK_NETFILTER's subsystem nfnetlink_queue (linux/netfilter/nfnetlink_queue.h).
const (
	queueSubsys                           = 3
	queueVerdict, queueConfig             = 1, 2
	queuePacketHdr, queueVerdictHdr       = 1, 2
	queueCfgCmd, queueCfgParams           = 1, 2
	queueBind, queueCopyMeta        uint8 = 1, 1
	queueAccept                           = 1
)

// race has a client of a UDP Service send many first datagrams at once from one
// port, again and again, and the node hold each between the pick and the making of
// its entry. Rules must send what is to be held to NFQUEUE 0.
func (l *Lab) race(pod string, to netip.AddrPort) error {
	var q *queue
	err := l.Do(NodeSpace(incidentNode), func() (err error) {
		q, err = openQueue()
		return err
	})
	if err != nil {
		return fmt.Errorf("holding packets: %w", err)
	}
	l.goOn(q.release)
	l.goOn(func(ctx context.Context) {
		l.in(podSpace(pod), func() {
			for ctx.Err() == nil {
				datagrams(ctx, to)
			}
		})
	})
	return nil
}

// datagrams sends those of one race, and waits for the next.
func datagrams(ctx context.Context, to netip.AddrPort) {
	if c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to)); err == nil {
		defer c.Close()
		for range raceOf {
			_, _ = c.Write([]byte("?"))
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(raceEvery):
	}
}

// queue is NFQUEUE 0 of a network namespace.
type queue struct {
	fd  int
	buf []byte
}

func openQueue() (*queue, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	q := &queue{fd, make([]byte, 64<<10)}
	params := append(binary.BigEndian.AppendUint32(nil, 0), queueCopyMeta)
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, attr := range [][]byte{
		nfnl.AppendAttr(nil, queueCfgCmd, queueBind, 0, 0, unix.AF_INET),
		nfnl.AppendAttr(nil, queueCfgParams, params...),
	} {
		if err == nil {
			err = q.configure(attr)
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return q, nil
}

// configure sends a request and reads the answer, before any packets can come.
func (q *queue) configure(attr []byte) error {
	if err := q.send(queueConfig, nfnl.FlagAck, attr); err != nil {
		return err
	}
	n, err := unix.Read(q.fd, q.buf) // it is there when the request was sent
	if err != nil {
		return err
	}
	if n >= nfnl.HeaderLen+4 && binary.NativeEndian.Uint16(q.buf[4:]) == unix.NLMSG_ERROR {
		if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(q.buf[nfnl.HeaderLen:]))); errno != 0 {
			return errno
		}
		return nil
	}
	return errors.New("the kernel's answer is none")
}

func (q *queue) send(msg uint8, flags uint16, attrs []byte) error {
	b := nfnl.AppendMessage(nil, nfnl.Type(queueSubsys, msg), nfnl.FlagRequest|flags, 0, nfnl.FamilyUnspec, 0, attrs)
	return unix.Sendto(q.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// release lets go of each packet when it was held for raceHeld, until ctx ends.
func (q *queue) release(ctx context.Context) {
	defer unix.Close(q.fd)
	type held struct {
		id    []byte
		until time.Time
	}
	var all []held
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		now := time.Now()
		for {
			n, err := unix.Read(q.fd, q.buf)
			if err != nil {
				break
			}
			for m := nfnl.NewMessages(q.buf[:n]); m.Next(); {
				for a := m.Attrs(); a.Next(); {
					if a.Type == queuePacketHdr && len(a.Data) >= 4 {
						all = append(all, held{append([]byte(nil), a.Data[:4]...), now.Add(raceHeld)})
					}
				}
			}
		}
		for len(all) > 0 && !all[0].until.After(now) {
			verdict := append(binary.BigEndian.AppendUint32(nil, queueAccept), all[0].id...)
			_ = q.send(queueVerdict, 0, nfnl.AppendAttr(nil, queueVerdictHdr, verdict...))
			all = all[1:]
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
