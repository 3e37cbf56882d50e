package userspace

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// maxDatagram is the most that a UDP datagram can carry, header included.
const maxDatagram = 65535

// keepDatagram is the largest first datagram that is kept to be sent to another
// endpoint where the first one refuses it.
const keepDatagram = 1500

// udpServer serves one UDP port: each client has a session with an upstream
// socket of its own.
type udpServer struct {
	l    *listener
	conn *net.UDPConn
	raw  syscall.RawConn
	// lost is the kernel's count of datagrams it had no room for.
	lost uint32

	mu       sync.Mutex // protects what follows
	sessions map[sessionKey]*session
	closed   bool
}

// sessionKey is a client and the address at which its datagrams arrive.
type sessionKey struct {
	client netip.AddrPort
	local  netip.Addr
}

// datagram is one that a client sent.
type datagram struct {
	sessionKey
	n int
	// lost counts those that were dropped before it.
	lost uint32
}

// buffers are for datagrams on their way; sockets that wait need none.
type buffers struct{ pool sync.Pool }

func (b *buffers) get() *[maxDatagram]byte {
	if x, ok := b.pool.Get().(*[maxDatagram]byte); ok {
		return x
	}
	return new([maxDatagram]byte)
}

func (b *buffers) put(x *[maxDatagram]byte) { b.pool.Put(x) }

func (u *udpServer) port() uint16 { return addrOf(u.conn.LocalAddr()).Port() }

// serve passes datagrams on until the socket is closed.
func (u *udpServer) serve() {
	b := u.l.b
	for {
		d, buf, err := u.next()
		if err != nil {
			u.mu.Lock()
			closed := u.closed
			u.mu.Unlock()
			if closed || errors.Is(err, net.ErrClosed) {
				return
			}
			b.say("reading datagrams", "service", u.l.key.name, "err", err)
			select {
			case <-time.After(pauseLeast):
			case <-b.ctx.Done():
				return
			}
			continue
		}
		b.stats.datagrams.Add(1)
		if d.lost != u.lost {
			b.stats.dropped.Add(uint64(d.lost - u.lost))
			u.lost = d.lost
		}
		u.pass(d.sessionKey, buf[:d.n])
		b.datagrams.put(buf)
	}
}

// pass hands a datagram to its session, which it makes if there is none.
func (u *udpServer) pass(k sessionKey, payload []byte) {
	b := u.l.b
	u.mu.Lock()
	s := u.sessions[k]
	closed := u.closed
	u.mu.Unlock()
	if closed {
		return
	}
	if s != nil && s.forward(payload) {
		return
	}
	// Datagrams cost their senders nothing: at least half of the descriptors
	// are for those who shake hands.
	if 2*int(b.stats.sessions.Load()) >= b.cfg.MaxDescriptors || !b.tryTake(1) {
		b.stats.dropped.Add(1)
		b.say("datagrams are dropped: no file descriptor is left for more UDP clients", "limit", b.cfg.MaxDescriptors)
		return
	}
	s = u.newSession(k)
	if !s.try(payload) {
		b.give(1)
		s.tell(&proxy.RelayEvent{Kind: proxy.RelayClosed, End: s.end})
		return
	}
	u.mu.Lock()
	if u.closed {
		s.stopLocked(proxy.EndedShutdown)
	}
	u.sessions[k] = s
	u.mu.Unlock()
	b.stats.sessionsMade.Add(1)
	b.stats.sessions.Add(1)
	b.wg.Go(s.serve)
}

// keep ends the sessions to endpoints that serve no more.
func (u *udpServer) keep(unit *unit) {
	serving := make(map[netip.AddrPort]bool, len(unit.svc.Endpoints))
	for i := range unit.svc.Endpoints {
		if ep := &unit.svc.Endpoints[i]; ep.Ready || ep.Serving {
			serving[ep.Addr] = true
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.sessions {
		s.mu.Lock()
		gone := !serving[s.endpoint]
		s.mu.Unlock()
		if gone {
			s.stopLocked(proxy.EndedShutdown)
		}
	}
}

func (u *udpServer) close(why proxy.RelayEnd) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	for _, s := range u.sessions {
		s.stopLocked(why)
	}
	_ = u.conn.Close()
}

// session is one client's exchange with one endpoint.
type session struct {
	u     *udpServer
	key   sessionKey
	event proxy.RelayEvent
	local bool // policy Local governs it

	mu       sync.Mutex // protects what follows
	up       *net.UDPConn
	raw      syscall.RawConn
	endpoint netip.AddrPort
	tried    []netip.AddrPort
	// first is what may have to be sent again, nil once that is over.
	first   []byte
	end     proxy.RelayEnd
	stopped bool

	out, in atomic.Uint64
	// used is when the last datagram went through, in nanoseconds.
	used atomic.Int64
}

func (u *udpServer) newSession(k sessionKey) *session {
	b, t := u.l.b, u.l.target.Load()
	local := netip.AddrPortFrom(k.local, u.l.port)
	dst := b.original(k.client, local)
	if !dst.IsValid() {
		dst = netip.AddrPortFrom(t.unit.svc.ClusterIP, t.unit.svc.Port)
	}
	s := &session{u: u, key: k}
	asLocal, fromNode := t.program.route(t.unit, k.client.Addr(), dst)
	s.local = asLocal
	s.event = proxy.RelayEvent{
		ID: b.lastID.Add(1), Tuple: tuple(conntrack.UDP, k.client, dst), Local: local, FromNode: fromNode,
	}
	return s
}

func (s *session) tell(e *proxy.RelayEvent) {
	e.ID, e.Tuple, e.Local, e.FromNode, e.Tag = s.event.ID, s.event.Tuple, s.event.Local, s.event.FromNode, s.event.Tag
	s.u.l.b.tell(e)
}

// try picks an endpoint, connects a socket to it and sends a datagram; on an
// error that comes at once, the next one. It reports false, with end set, when
// no more are left.
func (s *session) try(payload []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, b := s.u.l, s.u.l.b
	network := "udp4"
	if l.key.six {
		network = "udp6"
	}
	for len(s.tried) < len(b.cfg.DialLimits) {
		pick, ok := l.balance.pick(s.key.client.Addr(), s.local, s.tried, time.Now())
		u := l.target.Load().unit
		if !ok {
			s.event.Tag, s.end = u.gone(), proxy.EndedNoEndpoints
			b.stats.unserved.Add(1)
			return false
		}
		s.event.Tag, s.endpoint = proxy.Tag{Kind: proxy.TagPick, ID: endpointTag(u, pick.endpoint)}, pick.endpoint
		s.tell(&proxy.RelayEvent{Kind: proxy.RelayPick, Affinity: pick.affinity, Age: pick.age})
		err := s.connect(network, payload)
		if err == nil {
			if len(s.tried) == 0 && len(payload) <= keepDatagram {
				s.first = append([]byte{}, payload...)
			}
			if len(s.tried) == 1 {
				b.stats.retried.Add(1)
			}
			s.out.Add(uint64(len(payload)))
			return true
		}
		if exhausted(err) { // not the endpoint's fault
			b.stats.exhausted.Add(1)
			b.stats.dropped.Add(1)
			b.say("out of file descriptors: datagrams are dropped", "err", err)
			s.tell(&proxy.RelayEvent{Kind: proxy.RelayFailed, Failure: proxy.FailedOther})
			s.end = proxy.EndedShutdown
			return false
		}
		s.failedLocked(err)
	}
	b.stats.unserved.Add(1)
	s.end = proxy.EndedRefused
	return false
}

func (s *session) connect(network string, payload []byte) error {
	b := s.u.l.b
	c, err := b.dial(network, s.endpoint, b.cfg.DialLimits[0])
	if err != nil {
		return err
	}
	up, ok := c.(*net.UDPConn)
	if !ok {
		_ = c.Close()
		return errors.New("no UDP socket")
	}
	raw, err := up.SyscallConn()
	if err == nil {
		_, err = up.Write(payload)
	}
	if err != nil {
		_ = up.Close()
		return err
	}
	s.up, s.raw = up, raw
	s.alive()
	return nil
}

// failedLocked notes that the endpoint failed.
func (s *session) failedLocked(err error) {
	l, b := s.u.l, s.u.l.b
	f := failureOf(err)
	b.stats.failed(f)
	s.tell(&proxy.RelayEvent{Kind: proxy.RelayFailed, Failure: f})
	if l.balance.unpin(s.key.client.Addr(), s.endpoint) {
		b.stats.resets.Add(1)
	}
	s.tried = append(s.tried, s.endpoint)
}

// forward sends another datagram of the client. It reports false if the session
// is over.
func (s *session) forward(payload []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.first = nil
	s.alive()
	if _, err := s.up.Write(payload); errors.Is(err, syscall.ECONNREFUSED) {
		_, _ = s.up.Write(payload) // the error was of a datagram before
	}
	s.out.Add(uint64(len(payload)))
	return true
}

// stopLocked ends the session. The caller holds the server's lock.
func (s *session) stopLocked(why proxy.RelayEnd) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	if s.end == 0 {
		s.end = why
	}
	_ = s.up.Close()
}

// serve passes answers to the client until the session is over.
func (s *session) serve() {
	u, b := s.u, s.u.l.b
	for {
		end := s.answers()
		if end == proxy.EndedRefused && s.again() {
			continue
		}
		s.mu.Lock()
		s.stopped = true
		if s.end == 0 {
			s.end = end
		}
		_ = s.up.Close()
		s.mu.Unlock()
		break
	}
	u.mu.Lock()
	if u.sessions[s.key] == s {
		delete(u.sessions, s.key)
	}
	u.mu.Unlock()
	b.stats.sessions.Add(-1)
	b.stats.out.Add(s.out.Load())
	b.stats.in.Add(s.in.Load())
	b.give(1)
	s.tell(&proxy.RelayEvent{
		Kind: proxy.RelayClosed, End: s.end, Out: s.out.Load(), In: s.in.Load(),
		Age: time.Since(time.Unix(0, s.used.Load())),
	})
}

// alive puts the end of the session off.
func (s *session) alive() {
	now := time.Now()
	s.used.Store(now.UnixNano())
	_ = s.up.SetReadDeadline(now.Add(s.u.l.b.cfg.UDPTimeout))
}

// answers passes answers to the client until there is an error, and says what
// that means.
func (s *session) answers() proxy.RelayEnd {
	u, b := s.u, s.u.l.b
	for {
		n, buf, err := s.next()
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			return proxy.EndedIdle
		case errors.Is(err, syscall.ECONNREFUSED):
			if s.in.Load() > 0 {
				u.l.balance.unpin(s.key.client.Addr(), s.endpoint)
			}
			return proxy.EndedRefused
		default:
			return proxy.EndedShutdown
		}
		if s.in.Add(uint64(n)) == uint64(n) {
			b.stats.connected.Add(1)
			s.mu.Lock()
			s.first = nil
			upstream := addrOf(s.up.LocalAddr())
			s.mu.Unlock()
			s.tell(&proxy.RelayEvent{Kind: proxy.RelayConnected, Upstream: upstream})
		}
		s.alive()
		if err := u.send(buf[:n], s.key.client, s.key.local); err != nil {
			b.stats.dropped.Add(1)
		}
		b.datagrams.put(buf)
	}
}

// again sends the first datagram to another endpoint, if it may.
func (s *session) again() bool {
	s.mu.Lock()
	first := s.first
	if s.stopped || s.in.Load() > 0 {
		s.mu.Unlock()
		return false
	}
	s.failedLocked(syscall.ECONNREFUSED)
	if first == nil {
		s.mu.Unlock()
		return false
	}
	_ = s.up.Close()
	s.out.Store(0)
	s.mu.Unlock()
	return s.try(first)
}

// original asks connection tracking for the address that a UDP client sent to
// before our rules led the datagram to local.
func (b *Backend) original(client, local netip.AddrPort) netip.AddrPort {
	b.entries.Lock()
	defer b.entries.Unlock()
	if b.entries.table == nil && b.entries.err == nil {
		b.entries.err = b.inNetns(func() (err error) {
			b.entries.table, err = conntrack.Open(conntrack.Config{})
			return err
		})
		if b.entries.err != nil {
			b.say("UDP clients are taken for ones of cluster IPs: connection tracking cannot be asked", "err", b.entries.err)
		}
	}
	if b.entries.table == nil {
		return netip.AddrPort{}
	}
	f, err := b.entries.table.Get(conntrack.NewTuple(conntrack.UDP, local, client))
	if err != nil {
		return netip.AddrPort{}
	}
	return f.Orig.Dst()
}
