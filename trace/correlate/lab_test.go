package correlate_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

var (
	epoch    = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	foo      = proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}
	sticky   = proxy.PortName{Namespace: "shop", Name: "sticky", Proto: conntrack.TCP}
	dns      = proxy.PortName{Namespace: "kube-system", Name: "dns", Proto: conntrack.UDP}
	sctp     = proxy.PortName{Namespace: "shop", Name: "sig", Proto: conntrack.SCTP}
	empty    = proxy.PortName{Namespace: "shop", Name: "empty", Proto: conntrack.TCP}
	vips     = map[proxy.PortName]string{foo: "10.96.0.10:80", sticky: "10.96.0.11:80", dns: "10.96.0.53:53", sctp: "10.96.0.12:9", empty: "10.96.0.99:80"}
	ep1      = ap("10.244.1.2:8080")
	ep2      = ap("10.244.2.7:8080")
	ep3      = ap("10.244.2.8:8080")
	nodeAddr = netip.MustParseAddr("10.1.0.1")
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// program answers walks from a table.
type program struct {
	proxy.Program
	endpoints map[proxy.PortName][]netip.AddrPort
	affinity  time.Duration
	walks     *int
}

func (p *program) Walk(x proxy.Packet) proxy.Outcome {
	*p.walks++
	for name, vip := range vips {
		if x.Dst != ap(vip) || x.Proto != name.Proto {
			continue
		}
		o := proxy.Outcome{
			Verdict: proxy.Forward, Service: name, Via: proxy.ViaClusterIP, Algorithm: "random",
			Policy: "Cluster", Excluded: proxy.Excluded{NotReady: 1},
		}
		if name == sticky {
			o.Affinity = p.affinity
		}
		eps := p.endpoints[name]
		for _, ep := range eps {
			ch := proxy.Choice{Endpoint: ep, Probability: 1 / float64(len(eps))}
			if ep.Addr() == x.Src.Addr() {
				ch.Masquerade = "hairpin"
			} else if x.FromNode || x.Src.Addr().As4()[1] != 244 {
				ch.Masquerade = "not-local"
			}
			o.Choices = append(o.Choices, ch)
		}
		if len(eps) == 1 {
			o.Algorithm = "single"
		}
		if len(eps) == 0 {
			o.Verdict, o.Reason, o.Algorithm = proxy.Reject, "no-endpoints", ""
		}
		return o
	}
	return proxy.Outcome{}
}

func view(from time.Time, walks *int, endpoints map[proxy.PortName][]netip.AddrPort) *proxy.View {
	s := &proxy.Snapshot{
		Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{nodeAddr}},
		Pods: map[netip.Addr]proxy.Pod{
			netip.MustParseAddr("10.244.1.5"): {Namespace: "shop", Name: "web-1", Node: "node1", Workload: "Deployment/web"},
			ep2.Addr():                        {Namespace: "shop", Name: "foo-b", Node: "node2", Workload: "Deployment/foo"},
		},
		Nodes: map[netip.Addr]string{nodeAddr: "node1"},
	}
	for name, eps := range endpoints {
		sv := proxy.Service{Name: name, ClusterIP: ap(vips[name]).Addr(), Port: ap(vips[name]).Port()}
		for _, ep := range eps {
			e := proxy.Endpoint{Addr: ep, Ready: true}
			if ep == ep1 {
				e.Namespace, e.Pod, e.Node = "shop", "foo-a", "node1"
			}
			sv.Endpoints = append(sv.Endpoints, e)
		}
		s.Services = append(s.Services, sv)
	}
	return &proxy.View{
		Mode: proxy.IPTables, Snapshot: s, From: from, Done: from,
		Program: &program{endpoints: endpoints, affinity: 10 * time.Second, walks: walks},
	}
}

func endpoints() map[proxy.PortName][]netip.AddrPort {
	return map[proxy.PortName][]netip.AddrPort{
		foo: {ep1, ep2}, sticky: {ep1, ep2}, dns: {ep1, ep2}, sctp: {ep1, ep2}, empty: nil,
	}
}

// lab is a correlator, a clock and what came out.
type lab struct {
	t       testing.TB
	c       *correlate.Correlator
	now     int64
	views   []*proxy.View
	walks   int
	updates []*trace.Flow
	flows   map[trace.FlowID]*trace.Flow
	canAsk  bool
	asked   []conntrack.Tuple
}

func newLab(t testing.TB, change func(*correlate.Config)) *lab {
	l := &lab{t: t, now: epoch.UnixNano(), flows: map[trace.FlowID]*trace.Flow{}}
	l.views = []*proxy.View{view(epoch.Add(-time.Hour), &l.walks, endpoints())}
	cfg := correlate.Config{
		Node:  "node1",
		Views: func() []*proxy.View { return l.views },
		Emit:  l.emit,
		Ask: func(t conntrack.Tuple) bool {
			if l.canAsk {
				l.asked = append(l.asked, t)
			}
			return l.canAsk
		},
	}
	if change != nil {
		change(&cfg)
	}
	l.c = correlate.New(cfg)
	l.c.Advance(time.Unix(0, l.now))
	return l
}

func (l *lab) emit(f *trace.Flow) {
	old := l.flows[f.ID]
	switch {
	case f.ID == 0:
		l.t.Errorf("flow without id: %+v", f)
	case old == nil && f.Revision != 1:
		l.t.Errorf("%v: first revision is %d", f.Tuple, f.Revision)
	case old != nil && f.Revision != old.Revision+1:
		l.t.Errorf("%v: revision %d after %d", f.Tuple, f.Revision, old.Revision)
	case f.Completed != (f.Ended && (old == nil || !old.Ended)):
		l.t.Errorf("%v: completed is %v", f.Tuple, f.Completed)
	case old != nil && old.Ended && !f.Ended:
		l.t.Errorf("%v: ended and not ended any more", f.Tuple)
	case old == f:
		l.t.Errorf("%v: the same Flow twice", f.Tuple)
	}
	l.flows[f.ID] = f
	l.updates = append(l.updates, f)
}

// wait lets time pass as a node would.
func (l *lab) wait(d time.Duration) {
	for end := l.now + int64(d); l.now < end; {
		l.now = min(end, l.now+int64(50*time.Millisecond))
		l.c.Advance(time.Unix(0, l.now))
	}
}

// pass lets time pass without running timers.
func (l *lab) pass(d time.Duration) { l.now += int64(d) }

// only returns the only flow there is.
func (l *lab) only() *trace.Flow {
	l.t.Helper()
	if len(l.flows) != 1 {
		for _, f := range l.flows {
			l.t.Logf("%v %s", f.Tuple, f.Outcome)
		}
		l.t.Fatalf("%d flows, want 1", len(l.flows))
	}
	for _, f := range l.flows {
		return f
	}
	return nil
}

// conn makes the events of one connection.
type conn struct {
	l           *lab
	service     proxy.PortName
	src         netip.AddrPort
	ep          netip.AddrPort
	isn         uint32
	ctid        uint32
	masq, local bool
	started     int64
	send        func(*trace.Event)
}

func (l *lab) conn(service proxy.PortName, src string, ep netip.AddrPort) *conn {
	return &conn{l: l, service: service, src: ap(src), ep: ep, isn: 1000, ctid: 7, send: l.c.Handle}
}

func (k *conn) orig() conntrack.Tuple {
	return conntrack.NewTuple(k.service.Proto, k.src, ap(vips[k.service]))
}

func (k *conn) reply() conntrack.Tuple {
	dst := k.src
	if k.masq {
		dst = netip.AddrPortFrom(nodeAddr, k.src.Port())
	}
	return conntrack.NewTuple(k.service.Proto, k.ep, dst)
}

func (k *conn) event(kind trace.EventKind, t conntrack.Tuple) *trace.Event {
	return &trace.Event{Kind: kind, Source: trace.NFLog, Time: k.l.now, KernelTime: true, Tuple: t, TCPSeq: k.isn}
}

func (k *conn) pick() *conn {
	e := k.event(trace.KindPick, k.orig())
	e.Rule = &proxy.Rule{Service: k.service, Endpoint: k.ep}
	if k.masq {
		e.Mark = 0x4000
	}
	if k.local {
		e.Hook, e.KernelTime = 3, false
	}
	k.send(e)
	return k
}

func (k *conn) miss() *conn {
	e := k.event(trace.KindMiss, k.orig())
	e.Rule = &proxy.Rule{Service: k.service}
	k.send(e)
	return k
}

func (k *conn) refuse(kind trace.EventKind, reason string) *conn {
	e := k.event(kind, k.orig())
	e.Rule = &proxy.Rule{Service: k.service, Reason: reason}
	k.send(e)
	return k
}

func (k *conn) syn() *conn    { k.send(k.event(trace.KindSyn, k.orig())); return k }
func (k *conn) synack() *conn { k.send(k.event(trace.KindSynAck, k.reply())); return k }
func (k *conn) answer() *conn { k.send(k.event(trace.KindReply, k.reply())); return k }
func (k *conn) finOut() *conn { k.send(k.event(trace.KindFin, k.orig())); return k }
func (k *conn) finIn() *conn  { k.send(k.event(trace.KindFin, k.reply())); return k }
func (k *conn) rstOut() *conn { k.send(k.event(trace.KindRst, k.orig())); return k }

func (k *conn) rstIn() *conn {
	e := k.event(trace.KindRst, k.reply())
	e.TCPSeq, e.TCPAck = 0, k.isn+1
	k.send(e)
	return k
}

func (k *conn) icmp(kind, code uint8) *conn {
	e := k.event(trace.KindICMP, k.reply().Reverse())
	e.ICMPType, e.ICMPCode = kind, code
	e.ICMPFrom = netip.MustParseAddr("10.0.0.1").As16()
	k.send(e)
	return k
}

func (k *conn) ct(kind trace.EventKind) *trace.Event {
	e := &trace.Event{
		Kind: kind, Source: trace.Conntrack, Time: k.l.now, Tuple: k.orig(), Reply: k.reply(),
		CTID: k.ctid, Status: conntrack.Confirmed | conntrack.DstNAT,
	}
	if k.masq {
		e.Status |= conntrack.SrcNAT
	}
	return e
}

func (k *conn) new() *conn {
	e := k.ct(trace.KindNew)
	e.Start = k.started
	k.send(e)
	return k
}

func answered(e *trace.Event) { e.Status |= conntrack.SeenReply }

func state(s conntrack.TCPState) func(*trace.Event) {
	return func(e *trace.Event) { e.TCPState = s }
}

func early(e *trace.Event) { e.Timeout = 10 }

func packets(out, in uint64) func(*trace.Event) {
	return func(e *trace.Event) {
		e.Out, e.In = conntrack.Counters{Packets: out, Bytes: out * 100}, conntrack.Counters{Packets: in, Bytes: in * 100}
	}
}

func (k *conn) destroy(with ...func(*trace.Event)) *conn { return k.ctWith(trace.KindDestroy, with) }
func (k *conn) entry(with ...func(*trace.Event)) *conn   { return k.ctWith(trace.KindEntry, with) }
func (k *conn) gone() *conn                              { return k.ctWith(trace.KindGone, nil) }

func (k *conn) ctWith(kind trace.EventKind, with []func(*trace.Event)) *conn {
	e := k.ct(kind)
	for _, f := range with {
		f(e)
	}
	k.send(e)
	return k
}

type viewT = proxy.View

func addrPort(a netip.AddrPort, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr(), port)
}
