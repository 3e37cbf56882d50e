package userspace

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// conn is one relayed TCP connection.
type conn struct {
	l      *listener
	event  proxy.RelayEvent // what all its events have in common
	client *net.TCPConn

	mu   sync.Mutex // protects what follows
	up   *net.TCPConn
	over bool // the proxy ended it
}

// relay serves one accepted connection until it is over.
func (l *listener) relay(client *net.TCPConn) {
	defer client.Close()
	b := l.b
	from := addrOf(client.RemoteAddr())
	dst, err := originalDst(client, l.key.six)
	local := addrOf(client.LocalAddr())
	if err != nil || dst == local || !from.IsValid() {
		b.stats.direct.Add(1) // nobody was led here
		return
	}
	t := l.target.Load()
	c := &conn{l: l, client: client}
	asLocal, fromNode := t.program.route(t.unit, from.Addr(), dst)
	c.event = proxy.RelayEvent{
		ID: b.lastID.Add(1), Tuple: tuple(conntrack.TCP, from, dst), Local: local, FromNode: fromNode,
	}
	b.connsMu.Lock()
	b.conns[c] = struct{}{}
	b.connsMu.Unlock()
	b.stats.open.Add(1)
	defer func() {
		b.connsMu.Lock()
		delete(b.conns, c)
		b.connsMu.Unlock()
		b.stats.open.Add(-1)
	}()
	if end := c.connect(from.Addr(), asLocal); end != 0 {
		_ = client.SetLinger(0) // an RST: this was no answer
		c.tell(&proxy.RelayEvent{Kind: proxy.RelayClosed, End: end})
		return
	}
	out, in, end := c.pump()
	b.stats.out.Add(out)
	b.stats.in.Add(in)
	c.tell(&proxy.RelayEvent{Kind: proxy.RelayClosed, End: end, Out: out, In: in})
}

// tell completes an event and passes it on.
func (c *conn) tell(e *proxy.RelayEvent) {
	e.ID, e.Tuple, e.Local, e.FromNode = c.event.ID, c.event.Tuple, c.event.Local, c.event.FromNode
	if e.Tag.Kind == proxy.TagNone {
		e.Tag = c.event.Tag
	}
	c.l.b.tell(e)
}

// connect dials endpoints until one answers, each within its limit, none twice
// as long as there are others. It returns how it ended if none did.
func (c *conn) connect(client netip.Addr, local bool) proxy.RelayEnd {
	b, l := c.l.b, c.l
	network := "tcp4"
	if l.key.six {
		network = "tcp6"
	}
	var tried []netip.AddrPort
	for try := 0; try < len(b.cfg.DialLimits); {
		pick, ok := l.balance.pick(client, local, tried, time.Now())
		u := l.target.Load().unit
		if !ok {
			c.event.Tag = u.gone()
			b.stats.unserved.Add(1)
			return proxy.EndedNoEndpoints
		}
		c.event.Tag = proxy.Tag{Kind: proxy.TagPick, ID: endpointTag(u, pick.endpoint)}
		c.tell(&proxy.RelayEvent{Kind: proxy.RelayPick, Affinity: pick.affinity, Age: pick.age})
		up, err := c.dial(network, pick.endpoint, b.cfg.DialLimits[try])
		if err == nil {
			b.stats.connected.Add(1)
			if len(tried) > 0 {
				b.stats.retried.Add(1)
			}
			c.mu.Lock()
			c.up = up
			over := c.over
			c.mu.Unlock()
			if over {
				_ = up.Close()
				return proxy.EndedShutdown
			}
			c.tell(&proxy.RelayEvent{Kind: proxy.RelayConnected, Upstream: addrOf(up.LocalAddr())})
			return 0
		}
		if b.ctx.Err() != nil {
			return proxy.EndedShutdown
		}
		f := failureOf(err)
		b.stats.failed(f)
		c.tell(&proxy.RelayEvent{Kind: proxy.RelayFailed, Failure: f})
		if l.balance.unpin(client, pick.endpoint) {
			b.stats.resets.Add(1)
		}
		tried = append(tried, pick.endpoint)
		try++
	}
	b.stats.unserved.Add(1)
	return proxy.EndedUnanswered
}

// endpointTag is the id of an endpoint's tag, whether the unit still has it or
// not.
func endpointTag(u *unit, ep netip.AddrPort) string {
	if t, ok := u.tags[ep]; ok {
		return t.ID
	}
	return endpointHash(u.svc.Name, ep)
}

// dial connects to an endpoint. Being short of descriptors is not the
// endpoint's fault: it waits until there is one.
func (c *conn) dial(network string, to netip.AddrPort, limit time.Duration) (*net.TCPConn, error) {
	b, pause := c.l.b, pauseLeast
	for {
		up, err := b.dial(network, to, limit)
		if err == nil {
			tcp, ok := up.(*net.TCPConn)
			if !ok {
				_ = up.Close()
				return nil, errors.New("no TCP connection")
			}
			_ = tcp.SetKeepAlivePeriod(keepAlive)
			return tcp, nil
		}
		if !exhausted(err) {
			return nil, err
		}
		b.stats.exhausted.Add(1)
		b.say("out of file descriptors: a connection waits for one", "err", err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, pauseMost)
		case <-b.ctx.Done():
			return nil, err
		}
	}
}

// shutdown ends the connection from outside.
func (c *conn) shutdown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	_ = c.client.Close()
	if c.up != nil {
		_ = c.up.Close()
	}
}

// pump carries bytes both ways until both directions are over, or one side
// reset. It needs one goroutine besides the caller's.
func (c *conn) pump() (out, in uint64, end proxy.RelayEnd) {
	defer c.up.Close()
	var first atomic.Uint32 // the RelayEnd that came first
	note := func(e proxy.RelayEnd) { first.CompareAndSwap(0, uint32(e)) }
	done := make(chan struct{})
	go func() {
		defer close(done)
		in = c.carry(c.client, c.up, note, proxy.EndedByEndpoint, proxy.EndedResetEndpoint, proxy.EndedResetClient)
	}()
	out = c.carry(c.up, c.client, note, proxy.EndedByClient, proxy.EndedResetClient, proxy.EndedResetEndpoint)
	<-done
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return out, in, proxy.EndedShutdown
	}
	return out, in, proxy.RelayEnd(first.Load())
}

// carry carries one direction. An end of src is passed on as an end of that
// direction only; an error of either side resets both.
func (c *conn) carry(dst, src *net.TCPConn, note func(proxy.RelayEnd), eof, srcReset, dstReset proxy.RelayEnd) uint64 {
	n, atSrc, err := c.l.b.pipes.carry(dst, src)
	switch {
	case err == nil:
		note(eof)
		_ = dst.CloseWrite()
		return n
	case atSrc:
		note(srcReset)
	default:
		note(dstReset)
	}
	_ = src.SetLinger(0)
	_ = dst.SetLinger(0)
	_ = src.Close()
	_ = dst.Close()
	return n
}

// addrOf is the address of a socket.
func addrOf(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
