package correlate

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// cause makes the reason of a failed flow as exact as the evidence allows. What
// packets and entries say comes first, then what the state says of the endpoint.
// It never replaces a reason by one that might be wrong.
func (c *Correlator) cause(r *rec) {
	f := r.f
	if r.tooLarge != "" {
		f.Reason, f.Cause = trace.TooLarge, r.tooLarge
		return
	}
	if r.unacked != "" {
		f.Reason, f.Cause = trace.LargeUnacknowledged, r.unacked
		return
	}
	if r.invalid.cause != "" {
		f.Reason, f.Cause = trace.InvalidDropped, r.invalid.cause
		if r.entryTaken() {
			f.Cause = "its entry had been removed; " + f.Cause
		}
		return
	}
	if !f.Outcome.Failed() || r.direct {
		if r.aside != nil && !r.direct && f.Reason == trace.NoReason {
			f.Reason, f.Cause = r.aside.reason, r.aside.cause
		}
		return
	}
	switch f.Reason {
	case trace.NoEndpoints:
		c.causeOfRefusal(f)
		return
	case trace.EndpointRefused, trace.Unreachable, trace.SynUnanswered, trace.NoReply, trace.ReplyLost, trace.ResetByEndpoint, trace.EntryLost:
	default:
		return
	}
	if r.relayed {
		return // the proxy itself tells
	}
	if r.fate != nil && unanswered(f.Reason) {
		f.Reason, f.Cause = r.fate.reason, r.fate.cause
		return
	}
	if r.settled { // by whoever was asked
		f.Reason = r.told
		return
	}
	if !r.untranslated {
		f.Cause = ""
	}
	switch {
	case f.Reason == trace.ReplyLost, r.lostReplies >= 2 && r.endAt == 0:
		f.Reason = trace.ReplyLost
	case r.resumed:
		f.Cause = "what was sent later was taken for a new connection"
		if f.Reason = trace.EntryLost; r.expired || r.older != nil && r.older.f.Reason == trace.IdleExpired {
			f.Reason = trace.IdleExpired
		}
	case r.untranslated:
		f.Reason = trace.Untranslated
	case f.Reason != trace.ResetByEndpoint && r.newSeen && c.selfCalled(f):
		f.Reason = trace.Hairpin
	case r.told != trace.NoReason:
		f.Reason = r.told
	case c.stayed(r):
		f.Reason = trace.DroppedOnNode
	default:
		c.causeOfEndpoint(r)
	}
	switch f.Reason {
	case trace.ReplyLost:
		c.inquire(r)
	case trace.SynUnanswered: // one that is masqueraded is answered to the node
		if r.isn != 0 && r.reply.Dst() == r.orig.Src() && !r.elsewhere {
			c.inquire(r)
		}
	}
	if (f.Reason == trace.DroppedOnNode || f.Reason == trace.DroppedByRule || r.told == trace.Unreachable) && f.Cause == "" || r.elsewhere {
		c.inquire(r)
	}
}

// unanswered reports whether a reason says no more than that nothing came back.
func unanswered(why trace.Reason) bool {
	return why == trace.SynUnanswered || why == trace.NoReply || why == trace.DroppedOnNode
}

// fate is the end of a packet's way.
type fate struct {
	reason trace.Reason
	cause  string
}

// fateOf says what ended the way of a packet on this node, as its path shows it: a
// rule or policy that drops, or the kernel's word. Rules of a kube-proxy have meanings
// of their own, and are left to those who know them.
func fateOf(p *trace.Path) *fate {
	n := len(p.Hops)
	if n == 0 || p.Incomplete {
		return nil
	}
	last := &p.Hops[n-1]
	given := ""
	if last.Kind == trace.HopDrop {
		given = last.Text
		if n > 1 {
			last = &p.Hops[n-2]
		}
	}
	switch given {
	case "IP_RPFILTER":
		return &fate{trace.RPFilter, p.Hops[n-1].Purpose}
	case "IP_INNOROUTES", "IP_OUTNOROUTES":
		return &fate{reason: trace.NoRoute}
	}
	if last.Verdict != "drop" || strings.HasPrefix(last.Chain, "KUBE-") {
		return nil
	}
	where := last.Table + "/" + last.Chain
	if last.Bridge() {
		where += " of a bridge"
	}
	switch {
	case last.Kind == trace.HopPolicy:
		return &fate{trace.PolicyDrop, "the policy of " + where}
	case last.Kind == trace.HopRule && last.Text != "":
		return &fate{trace.DroppedByRule, fmt.Sprintf("rule %d of %s: %s", last.Rule, where, last.Text)}
	}
	return nil
}

// inquire asks once why a flow failed.
func (c *Correlator) inquire(r *rec) {
	if r.inquired || c.cfg.Inquire == nil {
		return
	}
	r.inquired = true
	c.cfg.Inquire(Inquiry{Flow: r.f, Device: r.device, AnswerDevice: r.answerDevice, ISN: r.isn, Elsewhere: r.elsewhere && (r.newSeen || r.newArrived != 0)})
}

// causeOfRefusal tells why a Service has no endpoints.
func (c *Correlator) causeOfRefusal(f *trace.Flow) {
	views := c.decider.refresh()
	if len(views) == 0 {
		return
	}
	s := c.decider.service(views[0], f.Service.Name, f.Service.Addr.Addr().Is6())
	if s == nil {
		return
	}
	switch {
	case len(s.Endpoints) == 0 && len(s.OtherPorts) > 0:
		f.Reason = trace.PortMismatch
		f.Cause = fmt.Sprintf("the slices have %q", s.OtherPorts)
	case len(s.Endpoints) > 0:
		for i := range s.Endpoints {
			if e := &s.Endpoints[i]; e.Ready || e.Serving {
				return // there are some by now
			}
		}
		f.Reason = trace.EndpointsNotReady
		f.Cause = fmt.Sprintf("%d of %d", len(s.Endpoints), len(s.Endpoints))
	}
}

// selfCalled reports whether a pod was sent to itself under its own address.
func (c *Correlator) selfCalled(f *trace.Flow) bool {
	seen := f.Decision.SourceSeen
	return f.Backend.Addr.IsValid() && f.Backend.Addr.Addr() == f.Client.Addr.Addr() &&
		seen.IsValid() && seen.Addr() == f.Client.Addr.Addr() && !c.decider.onNode(f.Client.Addr.Addr())
}

// stayed reports whether the first packet never left the node: its endpoint was
// picked, and connection tracking, which confirms a connection when its packet
// leaves, has no entry for it; through IPVS neither (net.ipv4.vs.conntrack is 1). A
// datagram or SYN that waits for a neighbour's address has been confirmed.
func (c *Correlator) stayed(r *rec) bool {
	if !r.picked || r.newSeen || r.newArrived != 0 || r.answered || r.existing || r.oldEntries > 0 || r.destroyed || r.relayed {
		return false
	}
	// A SYN sent again is decided about anew, for there is no entry to go by.
	if c.now-max(r.start, r.tryStart) < int64(c.cfg.UnansweredAfter) {
		return false // the entry's event may be on its way
	}
	return !c.losses.of(trace.Conntrack, r.start, c.now)
}

// rulesPick reports whether rules of the kernel pick endpoints, so that a picked
// packet has no entry before it leaves.
func rulesPick(m proxy.Mode) bool { return m == proxy.IPTables || m == proxy.NFTables }

// rulesLead reports whether rules of the kernel translate a Service's address: to an
// endpoint, or to the port of the userspace proxy.
func rulesLead(m proxy.Mode) bool { return rulesPick(m) || m == proxy.Userspace }

// causeOfEndpoint tells what the state knows of the endpoint.
func (c *Correlator) causeOfEndpoint(r *rec) {
	f := r.f
	ep, six := f.Backend.Addr, f.Service.Addr.Addr().Is6()
	views := c.decider.refresh()
	if len(views) == 0 || !ep.IsValid() || r.existing {
		return
	}
	e := stateOf(c.decider.service(views[0], f.Service.Name, six), ep)
	switch reason, cause := c.stateOfEndpoint(f, ep, r.pickTime); {
	case reason != trace.NoReason:
		f.Reason, f.Cause = reason, cause
	case e == nil:
	case f.Decision.Affinity == trace.AffinityHit && f.Reason != trace.ResetByEndpoint:
		f.Cause = string(f.Reason)
		f.Reason = trace.AffinityDead
	}
}

// stateOfEndpoint tells what the state has against an endpoint that was picked at a
// time, 0 if that is not known: it is terminating, or it left, before it was picked
// or after.
func (c *Correlator) stateOfEndpoint(f *trace.Flow, ep netip.AddrPort, picked int64) (reason trace.Reason, cause string) {
	views, six := c.decider.refresh(), f.Service.Addr.Addr().Is6()
	if len(views) == 0 || !ep.IsValid() {
		return trace.NoReason, ""
	}
	if e := stateOf(c.decider.service(views[0], f.Service.Name, six), ep); e != nil {
		if e.Terminating {
			return trace.EndpointTerminating, ""
		}
		return trace.NoReason, ""
	}
	for i := 1; i < len(views) && picked != 0; i++ {
		if stateOf(c.decider.service(views[i], f.Service.Name, six), ep) == nil {
			continue
		}
		left := views[i-1].From.UnixNano() // with this one it was gone
		if ago := time.Duration(picked - left); ago > 0 {
			return trace.RulesBehind, fmt.Sprintf("the endpoint left %v before", ago.Round(time.Millisecond))
		}
		return trace.EndpointGone, fmt.Sprintf("the endpoint left %v after the connection began", time.Duration(left-picked).Round(time.Millisecond))
	}
	return trace.NoReason, ""
}

func stateOf(s *proxy.Service, a netip.AddrPort) *proxy.Endpoint {
	if s == nil {
		return nil
	}
	for i := range s.Endpoints {
		if s.Endpoints[i].Addr == a {
			return &s.Endpoints[i]
		}
	}
	return nil
}

// byNode notes that an answer which refuses was made by the node itself, and not
// by an endpoint elsewhere.
func (c *Correlator) byNode(r *rec, e *trace.Event, why trace.Reason) {
	if r.picked && e.Hook == hookOutput && !c.decider.onNode(r.f.Backend.Addr.Addr()) {
		r.told = why
	}
}

// retriedAfterAnswer notes a SYN after the SYN-ACK. One may have crossed it, two
// say that the client did not get it.
func (c *Correlator) retriedAfterAnswer(r *rec, e *trace.Event) {
	const crossed = int64(500 * time.Millisecond)
	if !r.tcp() || r.phase != open || r.answerAt == 0 || e.Time-r.answerAt < crossed {
		return
	}
	if r.lostReplies++; r.lostReplies < 2 {
		return
	}
	f := c.edit(r)
	f.Outcome, f.Reason = trace.Unanswered, trace.ReplyLost
	r.phase = pending
	r.stateDue = r.lastSyn + int64(c.cfg.GiveUpAfter)
}

// serves reports whether a tuple goes to the cluster IP of a Service that has
// endpoints, so that rules should have translated it.
func (d *decider) serves(t conntrack.Tuple) bool {
	views := d.refresh()
	if len(views) == 0 || !rulesLead(views[0].Mode) || views[0].Snapshot == nil {
		return false
	}
	if v := views[0]; d.of != v {
		d.of, d.clusterIPs = v, make(map[clusterIP]struct{}, len(v.Snapshot.Services))
		for i := range v.Snapshot.Services {
			if s := &v.Snapshot.Services[i]; len(s.Endpoints) > 0 {
				d.clusterIPs[clusterIP{netip.AddrPortFrom(s.ClusterIP, s.Port), s.Name.Proto}] = struct{}{}
			}
		}
	}
	_, ok := d.clusterIPs[clusterIP{t.Dst(), t.Proto()}]
	return ok
}

// untranslatedEntry shows a held entry to an address of a Service that leads to
// endpoints, and that was not translated to any. It reports whether it is one.
func (c *Correlator) untranslatedEntry(r *rec) bool {
	f := r.f
	if f.Reply != r.orig.Reverse() || r.goneStatus&conntrack.SeenReply != 0 {
		return false
	}
	w, _ := c.decider.at(r.seenTime, r.orig, c.decider.onNode(r.orig.Src().Addr()), func(w *walked) bool { return w.effect == proxy.Forward })
	if w == nil || w.effect != proxy.Forward || !rulesLead(w.decision.Mode) {
		return false
	}
	r.untranslated = true
	f.Client = w.client
	f.Client.Addr = r.orig.Src()
	f.Service = trace.ServiceRef{Name: w.service, Addr: r.orig.Dst(), Via: w.via}
	f.Decision = trace.Decision{Mode: w.decision.Mode, Note: "not translated", Masquerade: "no"}
	if began := w.view.From; !began.IsZero() && r.newTime != 0 && r.newTime < began.UnixNano() {
		f.Cause = fmt.Sprintf("its entry is %v older than the rules", time.Duration(began.UnixNano()-r.newTime).Round(time.Millisecond))
	}
	return true
}

// elsewhereEntry shows a held entry to an address of a Service that leads to
// endpoints, and that was translated to none of them. It reports whether it is one.
func (c *Correlator) elsewhereEntry(r *rec) bool {
	f := r.f
	if r.existing || r.newArrived == 0 || f.Reply.Src() == r.orig.Dst() {
		return false
	}
	fromNode := c.decider.onNode(r.orig.Src().Addr())
	w, ok := c.decider.at(r.seenTime, r.orig, fromNode, func(w *walked) bool { return w.effect == proxy.Forward })
	if !ok || w.decision.Mode == proxy.Userspace && c.decider.onNode(f.Reply.Src().Addr()) {
		return false // that is where the proxy listens
	}
	if _, known := c.decider.at(r.seenTime, r.orig, fromNode, func(w *walked) bool { return w.find(f.Reply.Src()) != nil }); known {
		return false
	}
	r.elsewhere = true
	f.Client = w.client
	f.Client.Addr = r.orig.Src()
	f.Service = trace.ServiceRef{Name: w.service, Addr: r.orig.Dst(), Via: w.via}
	f.Backend = c.decider.backend(w.view, w.service, f.Reply.Src())
	f.Decision = trace.Decision{Mode: w.decision.Mode, Masquerade: "no"}
	return true
}

// tooBig notes the word of a router, or of the node, that a packet of the
// connection is too large for the next link. The first is how senders learn of it;
// later ones mean that this one does not.
func (c *Correlator) tooBig(r *rec, e *trace.Event) {
	const heeded = int64(150 * time.Millisecond)
	switch {
	case r.endAt != 0 || r.tooLarge != "":
		return
	case r.tooBigAt == 0:
		r.tooBigAt = e.Time
		return
	case e.Time-r.tooBigAt < heeded:
		return
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	r.tooLarge = fmt.Sprintf("packets from %s do not fit into the MTU", e.Tuple.Src())
	if e.ICMPMTU != 0 {
		r.tooLarge += fmt.Sprintf(" of %d", e.ICMPMTU)
	}
	if from := netip.AddrFrom16(e.ICMPFrom).Unmap(); !from.IsUnspecified() {
		r.tooLarge += ", says " + from.String()
	}
	c.publish(r)
}

// stale tells of a UDP flow whose client goes on sending to an endpoint that has
// left the Service and answers no more. e is its entry now, before it is counted.
func (c *Correlator) stale(r *rec, e *trace.Event) {
	f, views := r.f, c.decider.refresh()
	if f.Reason == trace.StaleEntry && e.In.Packets > f.In.Packets {
		f = c.edit(r)
		f.Outcome, f.Reason, f.Cause = trace.Open, trace.NoReason, ""
	}
	quiet := f.Counted && e.Out.Packets > f.Out.Packets && e.In.Packets == f.In.Packets
	if !quiet || len(views) < 2 || !rulesPick(views[0].Mode) {
		return
	}
	ep, six := f.Backend.Addr, f.Service.Addr.Addr().Is6()
	if s := c.decider.service(views[0], f.Service.Name, six); s == nil || stateOf(s, ep) != nil {
		return
	}
	for i := 1; i < len(views); i++ {
		if stateOf(c.decider.service(views[i], f.Service.Name, six), ep) != nil {
			f = c.edit(r)
			f.Outcome, f.Reason = trace.Unanswered, trace.StaleEntry
			f.Cause = fmt.Sprintf("the endpoint left %v ago; %d datagrams since were not answered",
				time.Duration(c.now-views[i-1].From.UnixNano()).Round(time.Millisecond), e.Out.Packets-f.Out.Packets)
			return
		}
	}
}

// explainable returns a flow's record if what it failed for can be made more exact
// by who was asked: an answer that was not seen or got lost by what became of it,
// INVALID segments that it was asked about, and anything else as long as there is no
// entry in connection tracking, or one that leads elsewhere. Nil if not, or if the flow
// is not known any more.
func (c *Correlator) explainable(id trace.FlowID, t conntrack.Tuple, reason trace.Reason) *rec {
	for r := c.find(t); r != nil; r = r.older {
		if r.f.ID != id {
			continue
		}
		had, ok := r.f.Reason, false
		switch reason {
		case trace.ReplyBypassed:
			ok = had == trace.SynUnanswered
		case trace.ReplyRPFilter:
			ok = had == trace.ReplyLost
		case trace.InvalidDropped:
			ok = r.invalid.asked
		default:
			ok = r.elsewhere || !r.newSeen && r.newArrived == 0 &&
				(had == trace.DroppedOnNode || had == trace.DroppedByRule || r.told == trace.Unreachable)
		}
		if ok || reason == trace.NotForwarded && had == trace.ReplyLost {
			return r
		}
		return nil
	}
	return nil
}

// Explain makes the reason of a failed flow more exact, for whoever Config.Inquire
// told of it and has found out more. Reason is empty to leave it as it is. A flow
// whose entry or answer was seen after all is left alone.
func (c *Correlator) Explain(id trace.FlowID, t conntrack.Tuple, reason trace.Reason, cause string) {
	r := c.explainable(id, t, reason)
	if r == nil {
		return
	}
	f := c.edit(r)
	if reason == trace.InvalidDropped {
		r.invalid.cause = cause
		c.emit(r)
		return
	}
	if r.settled, r.told = true, reason; reason == trace.NoReason {
		r.told = f.Reason
	}
	f.Reason, f.Cause = r.told, cause
	c.emit(r)
}
