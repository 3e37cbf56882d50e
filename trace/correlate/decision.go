package correlate

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	hookForward = 2
	hookOutput  = 3
	flagSYN     = 2
	flagACK     = 16
	notKept     = "the endpoint is in no generation of the rules that is kept"
)

// decide writes what a pick decided to the update of r being written, and reports
// whether the source address will be translated.
func (c *Correlator) decide(r *rec, e *trace.Event) (masqueraded bool) {
	f := r.f
	service, endpoint, anyService := e.Rule.Service, endpointOf(e), scheduled(e)
	w, ok := c.decider.at(e.Time, e.Tuple, e.Hook == hookOutput, func(w *walked) bool {
		return (w.service == service || anyService && w.effect == proxy.Forward) && w.find(endpoint) != nil
	})
	if anyService && w != nil {
		service = w.service
	}
	src, dst := e.Tuple.Src(), e.Tuple.Dst()
	f.Service = trace.ServiceRef{Name: service, Addr: dst}
	f.Client = trace.Peer{Addr: src}
	f.Backend = trace.Peer{Addr: endpoint}
	f.Decision = trace.Decision{Known: true}
	var x *choice
	if w != nil {
		f.Client = w.client
		f.Client.Addr = src
		if w.service == service {
			f.Service.Via = w.via
			f.Decision = w.decision
			x = w.find(endpoint)
		} else {
			f.Decision.Mode = w.view.Mode
			f.Decision.Affinity = trace.AffinityNone
		}
	}
	d := &f.Decision
	if w != nil && service == (proxy.PortName{}) {
		// The live rules themselves send it elsewhere, before any Service has it.
		f.Service.Name, f.Service.Via = c.decider.owner(w.view, e.Tuple)
		f.Decision = trace.Decision{Known: true, Mode: w.view.Mode, Affinity: trace.AffinityNone}
		ok, x = false, nil
	}
	if ok {
		f.Backend = x.peer
	} else {
		d.Note = notKept
		if w != nil {
			f.Backend = c.decider.backend(w.view, service, endpoint)
		}
	}

	if e.Relayed != nil {
		d.Affinity, d.AffinityAge, d.Masquerade = e.Relayed.Affinity, e.Relayed.Age, "relay"
		return true
	}
	if anyService {
		c.judgePersistence(r, e, w)
		c.ipvs.inputs(f, e)
	} else {
		c.judgeAffinity(r, e, w, c.misses.take(e))
	}
	if x != nil && d.Algorithm == "random" && d.Affinity != trace.AffinityHit {
		d.Probability = x.probability
	}

	masqueraded = e.Mark&c.cfg.MasqueradeMark != 0
	switch {
	case !masqueraded:
		d.Masquerade = "no"
	case x != nil && x.masquerade != "":
		d.Masquerade = x.masquerade
	default:
		d.Masquerade = "marked"
	}
	return masqueraded
}

// judgeAffinity sets the affinity word of a pick.
func (c *Correlator) judgeAffinity(r *rec, e *trace.Event, w *walked, missed bool) {
	d := &r.f.Decision
	if d.AffinityTimeout == 0 && !missed {
		return
	}
	if w == nil || w.service != e.Rule.Service {
		// Only a miss tells that there is affinity at all.
		d.Affinity = trace.AffinityNew
		return
	}
	k := affinityKey{e.Tuple.Src().Addr().As16(), w.handle}
	endpoint := e.Rule.Endpoint
	if c.affinity.entries[k].counted(e.Time) {
		d.Affinity, d.Note = "", countedNote
		return
	}
	if !missed && c.losses.of(trace.NFLog, e.Time, e.Time) {
		// The miss may be what was lost, unless our own table agrees.
		old := c.affinity.entries[k]
		if old == nil || old.endpoint != endpoint || e.Time-old.last >= int64(d.AffinityTimeout) {
			c.affinity.touch(k, endpoint, e.Time)
			d.Affinity, d.Note = "", "affinity unknown: events were lost"
			return
		}
	}
	d.Affinity, d.AffinityAge = c.affinity.judge(k, e.Time, d.AffinityTimeout, missed,
		func(ep netip.AddrPort) bool { return w.find(ep) != nil })
	c.moved(r, c.affinity.entries[k], endpoint)
	c.affinity.touch(k, endpoint, e.Time)
}

// decideRefusal writes to f which Service refused and what its rules say.
func (c *Correlator) decideRefusal(f *trace.Flow, e *trace.Event) {
	src, dst := e.Tuple.Src(), e.Tuple.Dst()
	service, anyService := e.Rule.Service, e.Rule.Service == proxy.PortName{}
	w, _ := c.decider.at(e.Time, e.Tuple, e.Hook == hookOutput, func(w *walked) bool {
		return (w.service == service || anyService) && w.effect >= proxy.Reject
	})
	if anyService && w != nil {
		service = w.service
	}
	f.Client = trace.Peer{Addr: src}
	f.Service = trace.ServiceRef{Name: service, Addr: dst}
	f.Decision = trace.Decision{Known: true, Affinity: trace.AffinityNone, Masquerade: "no"}
	if w == nil {
		return
	}
	f.Client = w.client
	f.Client.Addr = src
	if w.service != service {
		f.Decision.Mode = w.view.Mode
		return
	}
	f.Service.Via = w.via
	mode, policy, excluded := w.decision.Mode, w.decision.Policy, w.decision.Excluded
	f.Decision.Mode, f.Decision.Policy, f.Decision.Excluded = mode, policy, excluded
}

// recognise writes to f which Service an entry belongs to, by its tuples
// alone, and reports whether it belongs to any.
func (c *Correlator) recognise(f *trace.Flow, time int64, reply conntrack.Tuple, translated bool) bool {
	t := f.Tuple
	fromNode := c.decider.onNode(t.Src().Addr())
	endpoint := reply.Src()
	w, _ := c.decider.at(time, t, fromNode, func(w *walked) bool {
		return w.effect == proxy.Forward && w.find(endpoint) != nil
	})
	if w == nil || w.effect == proxy.Pass || w.view.Mode == proxy.Userspace {
		return false // in userspace mode the proxy tells, however late
	}
	f.Client = w.client
	f.Client.Addr = t.Src()
	f.Service = trace.ServiceRef{Name: w.service, Addr: t.Dst(), Via: w.via}
	f.Backend = c.decider.backend(w.view, w.service, endpoint)
	f.Decision = trace.Decision{Mode: w.decision.Mode, Masquerade: "no"}
	if translated {
		f.Decision.Masquerade = "marked"
		if x := w.find(endpoint); x != nil && x.masquerade != "" {
			f.Decision.Masquerade = x.masquerade
		}
	}
	return true
}

// decideByEntry writes to a flow that was recognised what the rules say of its
// pick, which nothing but the entry tells of.
func (c *Correlator) decideByEntry(f *trace.Flow, time int64) {
	w, ok := c.decider.at(time, f.Tuple, c.decider.onNode(f.Tuple.Src().Addr()), func(w *walked) bool {
		return w.service == f.Service.Name && w.find(f.Backend.Addr) != nil
	})
	if !ok {
		return
	}
	masquerade := f.Decision.Masquerade
	f.Decision = w.decision
	d := &f.Decision
	d.Masquerade = masquerade
	if d.AffinityTimeout > 0 {
		d.Affinity, d.Note = "", "affinity unknown: no rule reports it"
	} else if d.Algorithm == "random" {
		d.Probability = w.find(f.Backend.Addr).probability
	}
}

// rename writes to f that the kernel's entry leads to another endpoint than
// the one picked.
func (c *Correlator) rename(f *trace.Flow, endpoint netip.AddrPort) {
	f.Backend = trace.Peer{Addr: endpoint}
	if views := c.views(); len(views) > 0 {
		f.Backend = c.decider.backend(views[0], f.Service.Name, endpoint)
	}
	if n := len(f.Attempts); n > 0 {
		f.Attempts[n-1].Endpoint = f.Backend
	}
	f.Decision.Probability = 0
	f.Decision.Note = "another packet of the connection decided at the same time"
}
