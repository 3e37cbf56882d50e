package path

import (
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// Config is what a Joiner needs. The functions are called from whoever calls the
// Joiner.
type Config struct {
	// Rules finds the rule of a report; nil finds none.
	Rules func(h *trace.RuleHit) Found
	// Hook tells the hook of a built-in chain by its name where that is not one
	// of iptables': "prerouting". Empty is a chain that others jump to.
	Hook func(family uint8, table, chain string) string
	// IPVS reports whether Services are IPVS' here: then where a packet changed
	// tells that IPVS did it. Nil is no.
	IPVS func() bool
	// Device names an interface.
	Device func(index uint32) string
	// Names puts addresses into words; nil leaves them as they are.
	Names *Names
	// Own reports whether a chain is the tracer's own, which is left out.
	Own func(table, chain string) bool
	// Emit gets each path when nothing more was seen of its packet for Quiet.
	Emit func(Joined)
	// Quiet is 150 ms if zero; a packet that has not come to an end waits for
	// three times as long. Patience is how long a path waits for a rule that
	// Rules promises to know later; 3 s if zero.
	Quiet, Patience time.Duration
	// MaxPackets bounds the packets under way; 65,536 if zero. Beyond, the oldest
	// is emitted as it is.
	MaxPackets int
}

// Joined is a path with the packet as it was first seen.
type Joined struct {
	Path   trace.Path
	Packet trace.PacketHeader
	// At is when it was last seen, in nanoseconds since 1970.
	At int64
}

// Stats counts a Joiner's work.
type Stats struct {
	// Paths were emitted, Incomplete of them with a note that hops may be
	// missing. Orphans are reports whose packet is not known, because the one
	// that told it was lost.
	Paths, Incomplete, Orphans uint64
}

// Joiner joins reports. Its methods have one caller at a time.
type Joiner struct {
	cfg     Config
	byID    map[trace.PacketID]*packet
	byTrace map[uint32]*packet
	// order holds the packets under way, oldest first.
	order []*packet
	// resent are segments that this node sent again, oldest first.
	resent []trace.Resend
	stats  Stats
}

// pass is a packet's way through one built-in chain.
type pass struct {
	family             uint8
	table, chain, hook string
}

// seen is a report with the hook it belongs to.
type seen struct {
	trace.RuleHit
	hook string
	// base says that it is of the built-in chain itself.
	base bool
}

// named is the hook's name as in a trace.Hop.
func (s *seen) named() string {
	if s.Family == nfnl.FamilyBridge {
		return trace.BridgeHook + s.hook
	}
	return s.hook
}

// packet is a packet under way.
type packet struct {
	id      trace.PacketID
	traceID uint32
	first   trace.PacketHeader
	hits    []seen
	passes  []pass
	wire    []trace.Sighting
	drop    *trace.DropNotice
	begun   int64
	last    int64
	lost    bool
	over    bool
}

// New makes a Joiner.
func New(cfg Config) *Joiner {
	if cfg.Quiet == 0 {
		cfg.Quiet = 150 * time.Millisecond
	}
	if cfg.Patience == 0 {
		cfg.Patience = 3 * time.Second
	}
	if cfg.MaxPackets == 0 {
		cfg.MaxPackets = 1 << 16
	}
	if cfg.Rules == nil {
		cfg.Rules = func(*trace.RuleHit) Found { return Found{} }
	}
	if cfg.IPVS == nil {
		cfg.IPVS = func() bool { return false }
	}
	if cfg.Hook == nil {
		cfg.Hook = func(uint8, string, string) string { return "" }
	}
	if cfg.Device == nil {
		cfg.Device = func(uint32) string { return "" }
	}
	if cfg.Own == nil {
		cfg.Own = func(string, string) bool { return false }
	}
	if cfg.Emit == nil {
		cfg.Emit = func(Joined) {}
	}
	return &Joiner{cfg: cfg, byID: make(map[trace.PacketID]*packet), byTrace: make(map[uint32]*packet)}
}

// Stats returns the counts so far.
func (j *Joiner) Stats() Stats { return j.stats }

// Hit takes one report. Those of one source come in that source's order; now is
// when it was read.
func (j *Joiner) Hit(h *trace.RuleHit, now int64) {
	var p *packet
	at := pass{family: h.Family, table: h.Table, chain: h.Chain}
	at.hook = j.hook(h)
	base := at.hook != ""
	if h.HasHook {
		at.hook = hookNames[h.Hook%uint8(len(hookNames))]
		at.chain = strings.ToUpper(at.hook)
	}
	switch {
	case h.HasPacket:
		if at.hook == "" { // the first report is of a chain that was jumped to unseen
			at.hook = "output"
			if h.InDev != 0 {
				at.hook = "prerouting"
			}
			at.chain = strings.ToUpper(at.hook)
		}
		p = j.enter(h, at, now)
		if h.TraceID != 0 {
			p.traceID = h.TraceID
			j.byTrace[h.TraceID] = p
		}
	default:
		p = j.byTrace[h.TraceID]
		if p == nil || p.over {
			j.stats.Orphans++
			return
		}
		at = p.passes[len(p.passes)-1]
	}
	p.last = now
	if j.cfg.Own(h.Table, h.Chain) {
		return
	}
	p.hits = append(p.hits, seen{RuleHit: *h, hook: at.hook, base: base})
}

// hookNames are the names of netfilter's hooks.
var hookNames = [...]string{"prerouting", "input", "forward", "output", "postrouting"} //nolint:gochecknoglobals // a table

// hook names the hook of a built-in chain, "" for another chain.
func (j *Joiner) hook(h *trace.RuleHit) string {
	if s := j.cfg.Hook(h.Family, h.Table, h.Chain); s != "" {
		return s
	}
	if s := strings.ToLower(h.Chain); slices.Contains(hookNames[:], s) && strings.ToUpper(s) == h.Chain {
		return s
	}
	return ""
}

// enter finds the packet of a report that tells it, or begins one.
func (j *Joiner) enter(h *trace.RuleHit, at pass, now int64) *packet {
	id := h.Packet.ID()
	p := j.byID[id]
	if p != nil && len(p.passes) > 0 && p.passes[len(p.passes)-1] == at && h.HasHook {
		return p // legacy tells the packet with each rule
	}
	if p != nil && slices.Contains(p.passes, at) && !p.again(at, h) {
		j.finish(p, now) // an exact copy of it: the one before has left
		p = nil
	}
	if p == nil {
		p = j.begin(id, now)
	}
	if len(p.passes) == 0 {
		p.first = h.Packet
	}
	p.passes = append(p.passes, at)
	return p
}

// again reports whether a packet meets the rules of output a second time, as what
// the node sends does when IPVS has given it another destination.
func (p *packet) again(at pass, h *trace.RuleHit) bool {
	return at.hook == "output" && p.passes[len(p.passes)-1].hook == "output" && h.Packet.Tuple.Dst() != p.first.Tuple.Dst()
}

func (j *Joiner) begin(id trace.PacketID, now int64) *packet {
	if len(j.byID) >= j.cfg.MaxPackets {
		for _, old := range j.order {
			if !old.over {
				old.lost = true
				j.finish(old, now)
				break
			}
		}
	}
	p := &packet{id: id, begun: now, last: now}
	j.byID[id] = p
	j.order = append(j.order, p)
	return p
}

// Sighting takes a packet seen on a device.
func (j *Joiner) Sighting(s *trace.Sighting, now int64) {
	id := s.Packet.ID()
	p := j.byID[id]
	if p == nil {
		p = j.begin(id, now)
	}
	if len(p.wire) < 16 {
		p.wire = append(p.wire, *s)
	}
	p.last = now
}

// Dropped takes the kernel's word that it gave up a packet.
func (j *Joiner) Dropped(d *trace.DropNotice, now int64) {
	id := d.Packet.ID()
	p := j.byID[id]
	if p == nil {
		p = j.begin(id, now) // its rules may be read later
	}
	if p.drop == nil {
		d := *d
		p.drop = &d
	}
	p.last = now
}

// Resends are kept for resentFor, which reports of their packets are read within, and
// no more than maxResent of them.
const (
	resentFor = int64(5 * time.Second)
	maxResent = 4096
)

// Resent takes the word of this node's TCP that it sent a segment again. The kernel
// says so once the segment has passed the rules.
func (j *Joiner) Resent(r *trace.Resend) {
	if len(j.resent) >= maxResent {
		j.resent = j.resent[1:]
	}
	j.resent = append(j.resent, *r)
}

// isResent reports whether a packet is one that was sent again, not the one before it:
// the two are at least as far apart as TCP waits, 200 ms.
func (j *Joiner) isResent(p *packet) bool {
	const after, before = int64(100 * time.Millisecond), int64(2 * time.Second)
	for i := range j.resent {
		if r := &j.resent[i]; r.Tuple == p.first.Tuple && r.Seq == p.first.Seq && r.Time <= p.begun+after && r.Time >= p.begun-before {
			j.resent = slices.Delete(j.resent, i, i+1)
			return true
		}
	}
	return false
}

// Lost says that reports between two times were lost.
func (j *Joiner) Lost(l trace.Loss) {
	for _, p := range j.order {
		if p.begun <= l.To && p.last >= l.From-int64(j.cfg.Quiet) {
			p.lost = true
		}
	}
}

// Advance emits the paths of packets of which nothing was seen lately.
func (j *Joiner) Advance(now time.Time) {
	t := now.UnixNano()
	keep := j.order[:0]
	for _, p := range j.order {
		quiet := int64(j.cfg.Quiet)
		if !j.ended(p) {
			quiet *= 3 // whoever reads may have been kept from it
		}
		if !p.over && t-p.last >= quiet && (j.known(p) || t-p.last >= int64(j.cfg.Patience)) {
			j.finish(p, t)
		}
		if !p.over {
			keep = append(keep, p)
		}
	}
	clear(j.order[len(keep):])
	j.order = keep
	for len(j.resent) > 0 && t-j.resent[0].Time > resentFor {
		j.resent = j.resent[1:]
	}
}

// Oldest is when the first report was read of the oldest packet that is under way, in
// nanoseconds since 1970; 0 if there is none.
func (j *Joiner) Oldest() int64 {
	for _, p := range j.order {
		if !p.over {
			return p.begun
		}
	}
	return 0
}

// Flush emits everything.
func (j *Joiner) Flush(now time.Time) {
	for _, p := range j.order {
		if !p.over {
			j.finish(p, now.UnixNano())
		}
	}
	j.order = nil
}

// ended reports whether the last report is one that nothing follows.
func (j *Joiner) ended(p *packet) bool {
	if len(p.hits) == 0 {
		return false
	}
	h := &p.hits[len(p.hits)-1]
	switch h.hook {
	case "postrouting":
		if h.Table == "nat" || h.Kind == trace.HopPolicy {
			return true
		}
		if h.Kind == trace.HopRule && h.Verdict == "accept" { // a masquerade in a table of another name
			effect := j.cfg.Rules(&h.RuleHit).Effect
			return effect == "masquerade" || effect == "snat"
		}
	case "input":
		if h.Kind == trace.HopPolicy {
			return true
		}
	}
	return h.Verdict == "drop"
}

// known reports whether all rules of a packet are known, as far as they will be.
func (j *Joiner) known(p *packet) bool {
	for i := range p.hits {
		if h := &p.hits[i]; h.Kind == trace.HopRule && j.cfg.Rules(&h.RuleHit).Later {
			return false
		}
	}
	return true
}

// finish forgets a packet and emits its path, if it met a rule.
func (j *Joiner) finish(p *packet, _ int64) {
	p.over = true
	if j.byID[p.id] == p {
		delete(j.byID, p.id)
	}
	if j.byTrace[p.traceID] == p {
		delete(j.byTrace, p.traceID)
	}
	if len(p.hits) == 0 {
		return
	}
	path := j.path(p)
	j.stats.Paths++
	if path.Incomplete {
		j.stats.Incomplete++
	}
	j.cfg.Emit(Joined{Path: path, Packet: p.first, At: p.last})
}
