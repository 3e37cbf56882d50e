package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/correlate"
)

const (
	// inquiries bounds the flows that wait to be looked into; what finds no room
	// keeps the reason it has.
	inquiries = 256
	// rulesFor is how long live rules that were read serve for further flows.
	rulesFor = 2 * time.Second
	// triesFor is how long rules are not read again for dials that failed.
	triesFor = time.Second
	// anyPort stands for a source port that the kernel chose.
	anyPort = 40000
)

// inquirer finds out why first packets did not leave the node, or went elsewhere:
// it walks them through the live rules and asks for routes, settings and entries.
// It runs beside the correlator and never delays it.
type inquirer struct {
	flows chan correlate.Inquiry
	views func() []*proxy.View
	do    func(context.Context, func(*correlate.Correlator)) error

	witness *witness

	state *check.State
	// rules are those of the flavour that serves, others the ones beside them.
	rules  *liverules.Program
	others []*liverules.Program
	read   time.Time
	// taken is what portsTaken found out since then.
	taken map[portsKey]string
}

// portsKey is an endpoint, and the range of source ports that a rule may use to it.
type portsKey struct {
	proto  conntrack.Proto
	to     netip.AddrPort
	lo, hi uint16
}

func newInquirer(views func() []*proxy.View, do func(context.Context, func(*correlate.Correlator)) error) *inquirer {
	return &inquirer{flows: make(chan correlate.Inquiry, inquiries), views: views, do: do, witness: newWitness(do)}
}

// ask takes a flow, if there is room.
func (q *inquirer) ask(in correlate.Inquiry) {
	if in.Flow.Reason == trace.SynUnanswered && !in.Elsewhere && in.Try == 0 {
		q.witness.ask(in)
		return
	}
	select {
	case q.flows <- in:
	default:
	}
}

// run looks into flows until ctx ends.
func (q *inquirer) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case in := <-q.flows:
			f, try := in.Flow, in.Try
			why := q.why
			if try > 0 {
				why = q.whyTry
			}
			reason, cause := why(ctx, in)
			if reason == trace.NoReason && cause == "" {
				continue
			}
			err := q.do(ctx, func(c *correlate.Correlator) {
				if try > 0 {
					c.ExplainTry(f.ID, f.Tuple, try, reason, cause)
					return
				}
				c.Explain(f.ID, f.Tuple, reason, cause)
			})
			if err != nil && ctx.Err() != nil {
				return nil
			}
		}
	}
}

// why finds out what became of a flow's first packet. An empty reason with a cause
// says why there is none.
func (q *inquirer) why(ctx context.Context, in correlate.Inquiry) (reason trace.Reason, cause string) {
	f := in.Flow
	if !in.Invalid.IsZero() {
		return q.invalid(ctx, in)
	}
	if f.Reason == trace.ReplyLost {
		return whyLost(in)
	}
	if cause := filteredBack(in.Device, f.Tuple.Src().Addr()); cause != "" {
		return trace.RPFilter, cause
	}
	if err := q.refresh(ctx, f.Start); err != nil {
		return trace.NoReason, "the live rules cannot be read"
	}
	if in.Elsewhere {
		return shadowed(q.rules.Ways(q.packet(f)), f.Backend.Addr)
	}
	ways := q.ways(f)
	fates := q.fates(f, ways)
	if cause := forwardsNot(f.Tuple); cause != "" && !q.balanced() && q.abroad(f, fates) {
		return trace.NotForwarded, cause
	}
	var sure []fate
	perhaps := ""
	for _, x := range fates {
		switch {
		case x.stop == nil && !x.lost:
		case x.passes && !x.lost && f.Reason != trace.DroppedByRule:
			perhaps = lastStep(x.stop)
		default:
			sure = append(sure, x)
		}
	}
	if reason, cause, ok := verdict(sure); ok {
		return reason, cause
	}
	switch {
	case perhaps != "":
		return trace.NoReason, "perhaps by " + perhaps + ", which could not be evaluated"
	case f.Reason == trace.Unreachable:
		return trace.NoReason, "" // said by the node: no neighbour
	case f.Reason == trace.DroppedByRule: // the node answered, by a rule that was not found
		return trace.NoReason, "the node itself refused it; no rule that is there now explains it"
	}
	if cause := q.portsTaken(ctx, f, ways); cause != "" {
		return trace.SourcePorts, cause
	}
	cause = "the live rules of iptables would have let it through"
	if t := foreignTables(q.state.NFTables); len(t) > 0 {
		cause += "; those of nf_tables in " + strings.Join(t, ", ") + " were not evaluated"
	}
	return trace.NoReason, cause
}

// whyTry finds out why a dial of the userspace proxy failed, which comes from this
// node: an empty reason leaves what the dial itself told.
func (q *inquirer) whyTry(ctx context.Context, in correlate.Inquiry) (reason trace.Reason, cause string) {
	a := &in.Flow.Attempts[in.Try-1]
	to := a.Endpoint.Addr
	from, err := sourceTo(to.Addr())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return trace.NoRoute, ""
	case err != nil:
		return trace.NoReason, ""
	}
	// Every dial of a node in trouble asks; rules are read for many at once.
	if wait := triesFor - time.Since(q.read); wait > 0 && !q.read.After(a.Start) {
		select {
		case <-ctx.Done():
			return trace.NoReason, ""
		case <-time.After(wait):
		}
	}
	if err := q.refresh(ctx, a.Start); err != nil {
		return trace.NoReason, ""
	}
	pkt := proxy.Packet{Proto: in.Flow.Tuple.Proto(), Src: netip.AddrPortFrom(from, anyPort), Dst: to, FromNode: true}
	all := [][]liverules.Way{q.rules.Ways(pkt)}
	for _, p := range q.others {
		all = append(all, p.Ways(pkt))
	}
	for _, ways := range all {
		// Nobody refuses a packet that was dropped.
		open := func(w liverules.Way) bool {
			return !stops(&w) || a.Reason == trace.EndpointRefused && w.Verdict == proxy.Drop
		}
		if n := len(ways); n > 0 && !slices.ContainsFunc(ways, open) {
			return trace.Reason(ways[n-1].Reason), lastStep(&ways[n-1])
		}
	}
	if a.Reason != trace.SynUnanswered && a.Reason != trace.NoReply {
		return trace.NoReason, ""
	}
	if cause := q.allTaken(ctx, pkt, slices.Concat(all...)); cause != "" {
		return trace.SourcePorts, cause
	}
	if t := foreignTables(q.state.NFTables); len(t) > 0 {
		return trace.NoReason, "the rules of nf_tables in " + strings.Join(t, ", ") + " were not evaluated"
	}
	return trace.NoReason, ""
}

// invalid says which rule or policy of FORWARD drops a segment that is INVALID on every
// way, no reason if none does.
func (q *inquirer) invalid(ctx context.Context, in correlate.Inquiry) (reason trace.Reason, cause string) {
	const ack = 16
	if err := q.refresh(ctx, in.Flow.Start); err != nil {
		return trace.NoReason, ""
	}
	src, dst := in.Invalid.Src(), in.Invalid.Dst()
	pkt := xtables.Packet{
		Proto: in.Invalid.Proto().String(), Src: src.Addr(), SPort: src.Port(), Dst: dst.Addr(), DPort: dst.Port(),
		In: deviceTo(src.Addr()), Out: deviceTo(dst.Addr()), State: xtables.StateInvalid, TCPFlags: ack,
	}
	for _, p := range append([]*liverules.Program{q.rules}, q.others...) {
		leaves := p.Station(pkt, xtables.Station{Hook: "forward", Table: "filter", Chain: "FORWARD", If: xtables.Unknown}, false)
		stays := func(l xtables.Leaf) bool { return l.Verdict != xtables.Drop && l.Verdict != xtables.Reject }
		if len(leaves) == 0 || slices.ContainsFunc(leaves, stays) || len(leaves[0].Steps) == 0 {
			continue
		}
		w := liverules.Way{Leaf: leaves[0]}
		last := &w.Steps[len(w.Steps)-1]
		w.Owner = liverules.Owner(last.Table, last.Chain, last.Rule)
		return trace.InvalidDropped, lastStep(&w)
	}
	return trace.NoReason, ""
}

// packet is a flow's first packet.
func (q *inquirer) packet(f *trace.Flow) proxy.Packet {
	src := f.Tuple.Src()
	pkt := proxy.Packet{Proto: f.Tuple.Proto(), Src: src, Dst: f.Tuple.Dst(), FromNode: slices.Contains(q.state.Addrs, src.Addr())}
	if !pkt.FromNode {
		pkt.In = deviceTo(src.Addr())
	}
	return pkt
}

// whyLost finds out what became of an answer that passed the node and did not get to
// its client. IPVS takes the client's packets to be for the node itself; the answers
// are forwarded.
func whyLost(in correlate.Inquiry) (reason trace.Reason, cause string) {
	f := in.Flow
	if cause := filteredBack(in.AnswerDevice, f.Backend.Addr.Addr()); cause != "" {
		return trace.ReplyRPFilter, cause
	}
	cause = forwardsNot(f.Tuple)
	if cause != "" && f.Decision.Mode == proxy.IPVS && deviceTo(f.Backend.Addr.Addr()) != "" && deviceTo(f.Tuple.Src().Addr()) != "" {
		return trace.NotForwarded, cause
	}
	return trace.NoReason, ""
}

// forwardsNot says that the node does not forward packets of IPv4.
func forwardsNot(t conntrack.Tuple) string {
	if v, err := readSysctl("net/ipv4/ip_forward"); err == nil && v == "0" && t.Is4() {
		return "net.ipv4.ip_forward is 0"
	}
	return ""
}

// balanced reports whether IPVS picks endpoints, and the rules do not.
func (q *inquirer) balanced() bool { return q.rules.Mode() == proxy.IPVS }

// ways are those that the packet could have gone, to its endpoint if that is known.
func (q *inquirer) ways(f *trace.Flow) []liverules.Way {
	if q.balanced() {
		var ways []liverules.Way
		for _, ep := range q.candidates(f) {
			ways = append(ways, q.rules.Balanced(q.packet(f), ep)...)
		}
		return ways
	}
	return slices.DeleteFunc(q.rules.Ways(q.packet(f)), func(w liverules.Way) bool {
		return f.Backend.Addr.IsValid() && w.Endpoint != f.Backend.Addr
	})
}

// candidates are a flow's endpoint, or where that is not known all that it should have
// been led to.
func (q *inquirer) candidates(f *trace.Flow) (eps []netip.AddrPort) {
	if ep := f.Backend.Addr; ep.IsValid() {
		return []netip.AddrPort{ep}
	}
	if views := q.views(); len(views) > 0 && views[0].Program != nil {
		for _, x := range views[0].Program.Walk(q.packet(f)).Choices {
			eps = append(eps, x.Endpoint)
		}
	}
	return eps
}

// abroad reports whether the packet can only have been meant for other machines.
func (q *inquirer) abroad(f *trace.Flow, fates []fate) bool {
	return len(fates) > 0 && !slices.Contains(q.state.Addrs, f.Tuple.Src().Addr()) &&
		!slices.ContainsFunc(fates, func(x fate) bool { return !x.endpoint.IsValid() || deviceTo(x.endpoint.Addr()) == "" })
}

// fate is what became of packets to one endpoint: a way there ends at a rule, or
// passes, or there is no route.
type fate struct {
	endpoint netip.AddrPort
	stop     *liverules.Way
	passes   bool
	lost     bool
}

// fates looks at the endpoint of a flow, or where that is not known at all that
// the live rules lead to, or that should be led to where these are not read.
func (q *inquirer) fates(f *trace.Flow, ways []liverules.Way) []fate {
	var out []fate
	at := func(ep netip.AddrPort) *fate {
		i := slices.IndexFunc(out, func(x fate) bool { return x.endpoint == ep })
		if i < 0 {
			i = len(out)
			out = append(out, fate{
				endpoint: ep,
				lost:     ep.IsValid() && deviceTo(ep.Addr()) == "" && !slices.Contains(q.state.Addrs, ep.Addr()),
			})
		}
		return &out[i]
	}
	for i := range ways {
		w := &ways[i]
		x := at(w.Endpoint)
		if stops(w) {
			x.stop = w
		} else {
			x.passes = true
		}
	}
	if f.Backend.Addr.IsValid() || len(ways) == 0 { // also where no rule leads there
		for _, ep := range q.candidates(f) {
			at(ep)
		}
	}
	for i := range out {
		if x := &out[i]; x.stop == nil && x.endpoint.IsValid() {
			if x.stop = q.stopOfOthers(f, x.endpoint); x.stop != nil {
				x.passes = false
			}
		}
	}
	return out
}

func stops(w *liverules.Way) bool {
	return (w.Verdict == proxy.Drop || w.Verdict == proxy.Reject) && !w.Unsure
}

// stopOfOthers finds the rule that drops a packet to an endpoint on every way: of
// the other flavour of iptables, or of any where the proxy has none.
func (q *inquirer) stopOfOthers(f *trace.Flow, to netip.AddrPort) *liverules.Way {
	for _, ways := range q.waysOfOthers(f, to) {
		if n := len(ways); n > 0 && !slices.ContainsFunc(ways, func(w liverules.Way) bool { return !stops(&w) }) {
			return &ways[n-1]
		}
	}
	return nil
}

// waysOfOthers are the ways to an endpoint through each set of rules that no
// kube-proxy has part in.
func (q *inquirer) waysOfOthers(f *trace.Flow, to netip.AddrPort) [][]liverules.Way {
	pkt := q.packet(f)
	var out [][]liverules.Way
	for _, p := range q.others {
		if q.balanced() {
			out = append(out, p.Balanced(pkt, to))
			continue
		}
		there := pkt
		there.Dst = to
		out = append(out, p.Ways(there))
	}
	return out
}

// verdict is what endpoints that get no packets have in common. Where it is not
// known which was picked, the packet went to one of these: to others it would have
// passed.
func verdict(sure []fate) (reason trace.Reason, cause string, ok bool) {
	for i := range sure {
		x := &sure[i]
		r, c := trace.NoRoute, ""
		if x.stop != nil && !x.lost {
			r, c = trace.Reason(x.stop.Reason), lastStep(x.stop)
		}
		if ok && r != reason {
			return trace.NoReason, "", false
		}
		if ok && c != cause {
			c = "one of several"
		}
		reason, cause, ok = r, c, true
	}
	return reason, cause, ok
}

// filteredBack says that strict reverse path filtering drops what comes from an
// address by a device, empty if it does not. The kernel must have dropped some.
func filteredBack(device uint32, src netip.Addr) string {
	if device == 0 || !src.Is4() || netstat("IPReversePathFilter") == 0 {
		return ""
	}
	link, err := netlink.LinkByIndex(int(device))
	if err != nil {
		return ""
	}
	name := link.Attrs().Name
	mode := ""
	for _, conf := range []string{"all", name} {
		v, err := readSysctl("net/ipv4/conf/" + strings.ReplaceAll(conf, ".", "/") + "/rp_filter")
		if err != nil {
			return ""
		}
		mode = max(mode, v) // the stricter number is not the higher one, but the higher one rules
	}
	back := deviceTo(src)
	switch {
	case mode != "1" || back == name:
		return ""
	case back == "":
		return "it came by " + name + ", and there is no route to " + src.String()
	}
	return "it came by " + name + ", and the route to " + src.String() + " leads by " + back
}

// netstat reads one of the kernel's counters of IP and TCP extensions in this
// network namespace, zero where there is none.
func netstat(name string) uint64 {
	b, err := os.ReadFile("/proc/thread-self/net/netstat")
	if err != nil {
		return 0
	}
	lines := strings.Split(string(b), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if j := slices.Index(names, name); j >= 0 && j < len(values) {
			n, _ := strconv.ParseUint(values[j], 10, 64)
			return n
		}
	}
	return 0
}

// shadowed looks for a rule that is not the proxy's and leads where a flow went.
func shadowed(ways []liverules.Way, to netip.AddrPort) (trace.Reason, string) {
	for i := range ways {
		w := &ways[i]
		for j := range w.Steps {
			s := &w.Steps[j]
			if s.Rule == nil || s.DstAfter != to || s.Effect != xtables.EffectDNAT && s.Effect != xtables.EffectRedirect {
				continue
			}
			if strings.HasPrefix(s.Chain, "KUBE-") {
				return trace.NoReason, "" // an endpoint after all
			}
			return trace.NodePortShadowed, stepText(s, liverules.Owner(s.Table, s.Chain, s.Rule))
		}
	}
	return trace.NoReason, ""
}

// portsTaken says that all source ports are taken with which the rules would have
// masqueraded a flow, empty if they are not.
func (q *inquirer) portsTaken(ctx context.Context, f *trace.Flow, ways []liverules.Way) string {
	ep := f.Backend.Addr
	if !ep.IsValid() {
		return ""
	}
	pkt := proxy.Packet{Proto: f.Tuple.Proto(), Src: f.Tuple.Src(), Dst: ep}
	return q.allTaken(ctx, pkt, slices.Concat(append(q.waysOfOthers(f, ep), ways)...))
}

// allTaken says the same of a packet that goes to its destination by one of ways.
func (q *inquirer) allTaken(ctx context.Context, pkt proxy.Packet, ways []liverules.Way) string {
	for _, w := range ways {
		for i := range w.Steps {
			s := &w.Steps[i]
			if s.Effect != xtables.EffectMasquerade && s.Effect != xtables.EffectSNAT {
				continue
			}
			lo, hi := sourcePorts(s.Rule, pkt.Src.Port())
			key := portsKey{pkt.Proto, pkt.Dst, lo, hi}
			cause, known := q.taken[key]
			if !known {
				cause = q.countPorts(ctx, key)
				q.taken[key] = cause
			}
			if cause != "" {
				return cause
			}
		}
	}
	return ""
}

// countPorts looks at all entries for those to an endpoint. The kernel does not try
// all ports, so nearly all are enough.
func (q *inquirer) countPorts(ctx context.Context, k portsKey) string {
	conn, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		return ""
	}
	defer conn.Close()
	taken := map[netip.Addr]map[uint16]bool{}
	err = conn.Dump(ctx, func(e conntrack.Flow) error {
		if at := e.Reply.Dst(); e.Reply.Proto() == k.proto && e.Reply.Src() == k.to && at.Port() >= k.lo && at.Port() <= k.hi {
			if taken[at.Addr()] == nil {
				taken[at.Addr()] = map[uint16]bool{}
			}
			taken[at.Addr()][at.Port()] = true
		}
		return nil
	})
	if err != nil {
		return ""
	}
	all := int(k.hi-k.lo) + 1
	for addr, ports := range taken {
		if slices.Contains(q.state.Addrs, addr) && 100*len(ports) >= 99*all {
			return fmt.Sprintf("%d of %d source ports of %s to %s are taken", len(ports), all, addr, k.to)
		}
	}
	return ""
}

// sourcePorts are the ports that a rule may give to a source: those it names, or
// those of the port's class (nf_nat_l4proto_unique_tuple).
func sourcePorts(r *xtables.Rule, was uint16) (lo, hi uint16) {
	if r != nil {
		words := strings.Fields(r.String())
		if i := slices.Index(words, "--to-ports"); i >= 0 && i+1 < len(words) {
			from, to, ok := strings.Cut(words[i+1], "-")
			if !ok {
				to = from
			}
			a, err := strconv.ParseUint(from, 10, 16)
			b, err2 := strconv.ParseUint(to, 10, 16)
			if err == nil && err2 == nil && a <= b {
				return uint16(a), uint16(b)
			}
		}
	}
	switch {
	case was < 512:
		return 1, 511
	case was < 1024:
		return 600, 1023
	}
	return 1024, 65535
}

// foreignTables are tables of nf_tables that are neither of iptables nor of
// kube-proxy.
func foreignTables(all []string) []string {
	var out []string
	for _, t := range all {
		family, name, _ := strings.Cut(t, " ")
		ofIPTables := (family == "ip" || family == "ip6") && slices.Contains([]string{"raw", "mangle", "nat", "filter", "security"}, name)
		if !ofIPTables && name != "kube-proxy" {
			out = append(out, t)
		}
	}
	return out
}

// lastStep names the rule or policy at which a way ends, and whose it is.
func lastStep(w *liverules.Way) string {
	s := &w.Steps[len(w.Steps)-1]
	if s.Rule == nil {
		text := fmt.Sprintf("the policy of %s/%s", s.Table, s.Chain)
		if w.Owner != "" {
			text += " (" + w.Owner + ")"
		}
		return text
	}
	return stepText(s, w.Owner)
}

func stepText(s *xtables.Step, owner string) string {
	text := fmt.Sprintf("rule %d of %s/%s", s.Index, s.Table, s.Chain)
	if owner != "" {
		text += " (" + owner + ")"
	}
	return text + ": " + s.Rule.String()
}

// refresh reads the live rules, unless it has just done so, and since the flow
// began.
func (q *inquirer) refresh(ctx context.Context, began time.Time) error {
	if q.rules != nil && time.Since(q.read) < rulesFor && q.read.After(began) {
		return nil
	}
	s, _, err := Inspect(ctx)
	if err != nil {
		return err
	}
	cfg := liverules.Config{Addrs: s.Addrs, Route: route}
	if slices.ContainsFunc(s.Dumps, func(d xtables.Dump) bool { return asksSets(d.Rules) }) {
		if sets, err := readSets(ctx); err == nil {
			cfg.Set = sets.Match
		}
	}
	var serving []*xtables.Ruleset
	var others []*liverules.Program
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		found := false
		for _, d := range s.Dumps {
			if d.Family != fa {
				continue
			}
			if !found && len(xtables.LiveKube(d.Rules)) > 0 {
				found = true
				serving = append(serving, d.Rules)
				continue
			}
			others = append(others, liverules.New(cfg, d.Rules))
		}
	}
	q.state, q.rules, q.others, q.read = s, liverules.New(cfg, serving...), others, s.Now
	q.taken = make(map[portsKey]string)
	return nil
}
