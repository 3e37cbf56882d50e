package userspace

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// target is what a listener serves at the moment.
type target struct {
	program *program
	unit    *unit
}

// listener is the port of one Service port in one family.
type listener struct {
	b       *Backend
	key     key
	port    uint16
	balance balancer
	target  atomic.Pointer[target]
	tcp     *net.TCPListener
	udp     *udpServer
	closed  atomic.Bool
}

// listen opens the port of a unit and starts to serve it.
func (b *Backend) listen(t *target) (*listener, error) {
	if !b.tryTake(1) {
		b.stats.exhausted.Add(1)
		return nil, fmt.Errorf("no file descriptor is left of %d: raise the limit (ulimit -n)", b.cfg.MaxDescriptors)
	}
	l := &listener{b: b, key: t.unit.key()}
	l.balance.evicted = &b.stats.evicted
	l.set(t)
	var serve func()
	err := b.ports.take(func(port uint16) error {
		return b.inNetns(func() (err error) {
			serve, err = l.open(port)
			return err
		})
	}, func(err error) bool { return errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES) })
	if err != nil {
		b.give(1)
		return nil, err
	}
	b.wg.Go(serve)
	return l, nil
}

func (l *listener) open(port uint16) (serve func(), err error) {
	at, four := netip.AddrPortFrom(netip.IPv4Unspecified(), port), "4"
	if l.key.six {
		at, four = netip.AddrPortFrom(netip.IPv6Unspecified(), port), "6"
	}
	if l.key.name.Proto == conntrack.UDP {
		if l.udp, err = listenUDP("udp"+four, at); err != nil {
			return nil, err
		}
		l.udp.l = l
		l.port = l.udp.port()
		return l.udp.serve, nil
	}
	lc := net.ListenConfig{KeepAlive: keepAlive}
	lc.SetMultipathTCP(false)
	listening, err := lc.Listen(context.Background(), "tcp"+four, at.String())
	if err != nil {
		return nil, err
	}
	tcp, ok := listening.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("%T is no TCP listener", listening)
	}
	l.tcp = tcp
	if addr, err := netip.ParseAddrPort(tcp.Addr().String()); err == nil {
		l.port = addr.Port()
	}
	return l.serveTCP, nil
}

// keepAlive finds out about peers that are gone, between as between a client
// and its endpoint where nobody relays.
const keepAlive = 2 * time.Minute

// set changes what is served. Connections stay; UDP sessions to endpoints that
// serve no more end, so that their clients move on.
func (l *listener) set(t *target) {
	l.target.Store(t)
	l.balance.set(t.unit.svc.Affinity, t.unit.sel.Cluster, t.unit.sel.Local, time.Now())
	if l.udp != nil {
		l.udp.keep(t.unit)
	}
}

// close ends listening. TCP connections go on.
func (l *listener) close(why proxy.RelayEnd) {
	if l.closed.Swap(true) {
		return
	}
	if l.tcp != nil {
		_ = l.tcp.Close()
	}
	if l.udp != nil {
		l.udp.close(why)
	}
	l.b.ports.release(l.port)
	l.b.give(1)
}

// The waits after the kernel refused a descriptor.
const (
	pauseLeast = 5 * time.Millisecond
	pauseMost  = time.Second
)

// serveTCP accepts until the listener is closed. It never dials: that is for
// each connection's own goroutine.
func (l *listener) serveTCP() {
	b, pause := l.b, time.Duration(0)
	for {
		c, err := l.tcp.AcceptTCP()
		switch {
		case err == nil:
		case l.closed.Load() || errors.Is(err, net.ErrClosed):
			return
		case exhausted(err):
			b.stats.exhausted.Add(1)
			pause = min(max(2*pause, pauseLeast), pauseMost)
			b.say("out of file descriptors: connections queue in the kernel", "pause", pause, "err", err)
			fallthrough
		default: // such as a connection that was gone before it was accepted
			select {
			case <-time.After(max(pause, pauseLeast)):
			case <-b.ctx.Done():
			}
			continue
		}
		pause = 0
		b.stats.accepted.Add(1)
		if !b.take(descriptorsPerConn) {
			_ = c.SetLinger(0) // an RST: this was no answer
			_ = c.Close()
			return
		}
		b.wg.Go(func() {
			defer b.give(descriptorsPerConn)
			l.relay(c)
		})
	}
}

// descriptorsPerConn is what a connection needs: one to each side. Pipes are
// extra, and only while there is something in them.
const descriptorsPerConn = 2

// exhausted reports whether the kernel refused a descriptor.
func exhausted(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// failureOf names what went wrong with a dial.
func failureOf(err error) proxy.RelayFailure {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return proxy.FailedRefused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return proxy.FailedUnreachable
	case errors.Is(err, syscall.ETIMEDOUT), errors.As(err, &timeout) && timeout.Timeout():
		return proxy.FailedTimeout
	}
	return proxy.FailedOther
}
