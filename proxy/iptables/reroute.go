package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

const (
	// maxReroutes bounds the connections with rules in our chain.
	maxReroutes = 64
	// rerouteRate is how many connections are moved in a second at most, after
	// a first burst of maxReroutes.
	rerouteRate = 128
	// rerouteLife is how long a connection's rules stay at most, for the SYNs
	// that a client sends 1, 3 and 7 s after the first (RFC 6298). They go as
	// soon as one of them has used them.
	rerouteLife = 8 * time.Second
)

// aboutReroute is the comment of the jumps to our chain.
const aboutReroute = "kptrace: connections that nobody answered"

// rerouting is what Reroute knows. Backend.apply protects it, but for stats.
type rerouting struct {
	moved []rerouted
	// left says that a process before left rules in our chain.
	left   bool
	table  *conntrack.Conn
	tokens float64
	filled time.Time

	mu    sync.Mutex // protects what follows
	stats proxy.RerouteStats
	// deleted are the entries removed lately, whose DESTROY tells whether they
	// were answered in between.
	deleted map[conntrack.Tuple]time.Time
}

// rerouted is a connection with rules in our chain.
type rerouted struct {
	tuple conntrack.Tuple
	tries int
	to    netip.AddrPort // the endpoint it leads to
	chain string         // and its chain
	rules []string
	until time.Time
}

var _ proxy.Rerouter = (*Backend)(nil)

func (b *Backend) countReroutes(f func(*proxy.RerouteStats)) {
	b.reroute.mu.Lock()
	defer b.reroute.mu.Unlock()
	f(&b.reroute.stats)
}

// RerouteStats may be called at any time.
func (b *Backend) RerouteStats() (s proxy.RerouteStats) {
	b.countReroutes(func(r *proxy.RerouteStats) { s = *r })
	return s
}

// Reroute writes a rule for exactly each connection, which leads to another
// endpoint's chain, then looks whether the connection is still unanswered and
// deletes its entry, so that its next SYN meets the rule.
func (b *Backend) Reroute(ctx context.Context, stuck []proxy.Stuck) (moved int, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	p := b.applied
	if p == nil || !b.cfg.Reroute {
		return 0, nil // what the kernel holds is not known
	}
	b.expireReroutes(time.Now())
	var fresh []rerouted
	for i := range stuck {
		if r, ok := b.plan(p, &stuck[i]); ok {
			fresh = append(fresh, r)
		}
	}
	if len(fresh) == 0 {
		return 0, nil
	}
	b.reroute.moved = append(b.reroute.moved, fresh...)
	if err := b.rewriteReroutes(ctx, p); err != nil {
		b.reroute.moved = nil
		b.countReroutes(func(s *proxy.RerouteStats) { s.Failed += uint64(len(fresh)); s.Rules = 0 })
		return 0, fmt.Errorf("proxy/iptables: rerouting: %w", err)
	}
	for i := range fresh {
		switch err := b.release(&fresh[i]); {
		case err == nil:
			moved++
			b.countReroutes(func(s *proxy.RerouteStats) { s.Moved++ })
		case errors.Is(err, errAnswered):
			b.countReroutes(func(s *proxy.RerouteStats) { s.Answered++ })
		case errors.Is(err, fs.ErrNotExist):
			b.countReroutes(func(s *proxy.RerouteStats) { s.Gone++ })
		default:
			b.countReroutes(func(s *proxy.RerouteStats) { s.Failed++ })
			return moved, fmt.Errorf("proxy/iptables: rerouting: %w", err)
		}
	}
	return moved, nil
}

// plan chooses where a connection goes, and writes its rules.
func (b *Backend) plan(p *program, s *proxy.Stuck) (r rerouted, ok bool) {
	t := s.Tuple
	src, dst := t.Src(), t.Dst()
	if t.Proto() != conntrack.TCP || !b.cfg.ours(src.Addr()) || len(s.Tried) == 0 {
		return r, false
	}
	for i := range b.reroute.moved {
		if m := &b.reroute.moved[i]; m.tuple == t {
			if m.tries >= len(s.Tried) {
				return r, false // it has not sent another SYN since
			}
			b.reroute.moved = slices.Delete(b.reroute.moved, i, i+1)
			break
		}
	}
	out := p.Walk(proxy.Packet{Proto: t.Proto(), Src: src, Dst: dst, FromNode: p.local(src.Addr())})
	others := slices.DeleteFunc(slices.Clone(out.Choices), func(c proxy.Choice) bool { return slices.Contains(s.Tried, c.Endpoint) })
	if len(others) == 0 {
		b.countReroutes(func(s *proxy.RerouteStats) { s.Alone++ })
		return r, false
	}
	if len(b.reroute.moved) >= maxReroutes || !b.rerouteToken() {
		b.countReroutes(func(s *proxy.RerouteStats) { s.Limited++ })
		return r, false
	}
	to := others[rand.IntN(len(others))]
	r = rerouted{
		tuple: t, tries: len(s.Tried), until: time.Now().Add(rerouteLife),
		to: to.Endpoint, chain: prefixEndpoint + endpointHash(out.Service, to.Endpoint),
	}
	match := line(from(host(src.Addr())), "-d "+host(dst.Addr()).String(), "-p tcp -m tcp --sport "+strconv.Itoa(int(src.Port()))+
		" --dport "+strconv.Itoa(int(dst.Port())))
	if out.Affinity > 0 {
		// Or the client would be sent to the dead endpoint again next time.
		for _, ep := range s.Tried {
			if p.hasChain(prefixEndpoint+endpointHash(out.Service, ep), ep) {
				r.rules = append(r.rules, line(match, recent(b.cfg.Family, prefixEndpoint+endpointHash(out.Service, ep), "--remove")))
			}
		}
	}
	if to.Masquerade != "" && to.Masquerade != "hairpin" {
		r.rules = append(r.rules, line(match, jump(chainMarkMasq)))
	}
	r.rules = append(r.rules, line(match, jump(r.chain)))
	return r, true
}

func (b *Backend) rerouteToken() bool {
	now := time.Now()
	if b.reroute.filled.IsZero() {
		b.reroute.tokens = maxReroutes
	} else {
		b.reroute.tokens = min(maxReroutes, b.reroute.tokens+rerouteRate*now.Sub(b.reroute.filled).Seconds())
	}
	b.reroute.filled = now
	if b.reroute.tokens < 1 {
		return false
	}
	b.reroute.tokens--
	return true
}

// errAnswered says that a connection was answered after all.
var errAnswered = errors.New("answered")

// release deletes a connection's entry if it is still unanswered.
func (b *Backend) release(r *rerouted) error {
	f, err := b.stillUnanswered(r.tuple)
	if err != nil {
		return err
	}
	return b.removeEntry(f)
}

// stillUnanswered looks up a connection's entry. The error is errAnswered where
// something has come back.
func (b *Backend) stillUnanswered(t conntrack.Tuple) (f conntrack.Flow, err error) {
	if b.reroute.table == nil {
		err := b.inNetns(func() (err error) {
			b.reroute.table, err = conntrack.Open(conntrack.Config{})
			return err
		})
		if err != nil {
			return f, err
		}
	}
	f, err = b.reroute.table.Get(t)
	if err == nil && (f.Orig != t || f.Status&conntrack.SeenReply != 0 || f.State != conntrack.TCPSynSent) {
		err = errAnswered
	}
	return f, err
}

// removeEntry deletes an entry, and remembers it for RerouteDestroyed.
func (b *Backend) removeEntry(f conntrack.Flow) error {
	b.reroute.mu.Lock()
	if b.reroute.deleted == nil {
		b.reroute.deleted = make(map[conntrack.Tuple]time.Time)
	}
	b.reroute.deleted[f.Orig] = time.Now()
	b.reroute.mu.Unlock()
	return b.reroute.table.Delete(f)
}

// RerouteDestroyed counts the entries that were answered between the look at
// them and their removal.
func (b *Backend) RerouteDestroyed(t conntrack.Tuple, s conntrack.Status) {
	b.reroute.mu.Lock()
	defer b.reroute.mu.Unlock()
	if _, ok := b.reroute.deleted[t]; ok {
		delete(b.reroute.deleted, t)
		if s&conntrack.SeenReply != 0 {
			b.reroute.stats.Raced++
		}
	}
}

// ReapReroutes removes the rules of connections that had their time.
func (b *Backend) ReapReroutes(ctx context.Context, now time.Time) error {
	b.apply.Lock()
	defer b.apply.Unlock()
	if b.applied == nil || !b.expireReroutes(now) {
		return nil
	}
	if err := b.rewriteReroutes(ctx, b.applied); err != nil {
		return fmt.Errorf("proxy/iptables: removing old reroutes: %w", err)
	}
	return nil
}

func (b *Backend) expireReroutes(now time.Time) (some bool) {
	before := len(b.reroute.moved)
	b.reroute.moved = slices.DeleteFunc(b.reroute.moved, func(r rerouted) bool { return now.After(r.until) || b.followed(&r) })
	b.reroute.mu.Lock()
	defer b.reroute.mu.Unlock()
	for t, at := range b.reroute.deleted {
		if now.Sub(at) > rerouteLife {
			delete(b.reroute.deleted, t)
		}
	}
	return len(b.reroute.moved) < before
}

// followed reports whether a connection went where its rules lead, after which
// it needs them no more: its entry says so.
func (b *Backend) followed(r *rerouted) bool {
	if b.reroute.table == nil {
		return false
	}
	f, err := b.reroute.table.Get(r.tuple)
	return err == nil && f.Orig == r.tuple && f.Reply.Src() == r.to
}

// leaveChains takes the rules away that lead to chains which p has not, so that
// those can be removed.
func (b *Backend) leaveChains(ctx context.Context, p *program, rep *proxy.Report) error {
	if len(b.reroute.moved) == 0 {
		return nil
	}
	before := len(b.reroute.moved)
	b.reroute.moved = slices.DeleteFunc(b.reroute.moved, func(r rerouted) bool { return !p.hasChain(r.chain, r.to) })
	if len(b.reroute.moved) == before {
		return nil
	}
	return b.writeReroutes(ctx, p, rep)
}

// hasChain reports whether p has a chain, of an endpoint.
func (p *program) hasChain(name string, ep netip.AddrPort) bool {
	return slices.ContainsFunc(p.units, func(u *unit) bool {
		return u.reaches(ep) && name == prefixEndpoint+endpointHash(u.svc.Name, ep)
	})
}

// rewriteReroutes writes our chain outside of an Apply.
func (b *Backend) rewriteReroutes(ctx context.Context, p *program) error {
	var rep proxy.Report
	b.pause(false)
	defer b.settle(&rep)
	return b.writeReroutes(ctx, p, &rep)
}

// writeReroutes writes our chain as a whole, in one commit.
func (b *Backend) writeReroutes(ctx context.Context, p *program, rep *proxy.Report) error {
	lines := []string{":" + chainReroute + " - [0:0]"}
	for i := range b.reroute.moved {
		r := &b.reroute.moved[i]
		if !p.hasChain(r.chain, r.to) {
			continue
		}
		for _, rule := range r.rules {
			lines = append(lines, "-A "+chainReroute+" "+rule)
		}
	}
	failed, err := b.run(ctx, xtables.Plan{{Name: "reroutes", Units: []xtables.Unit{{Table: "nat", Owner: "reroutes", Lines: lines}}}}, rep)
	if err == nil && len(failed) > 0 {
		err = &failed[0]
	}
	if err == nil {
		b.reroute.left = false
	}
	b.countReroutes(func(s *proxy.RerouteStats) { s.Rules = len(b.reroute.moved) })
	return err
}

// Reroute has each family move what is of it.
func (d *Dual) Reroute(ctx context.Context, stuck []proxy.Stuck) (int, error) {
	n, err := d.v4.Reroute(ctx, stuck)
	if d.off.Load() {
		return n, err
	}
	m, err6 := d.v6.Reroute(ctx, stuck)
	return n + m, errors.Join(err, err6)
}

// ReapReroutes removes what is over in both families.
func (d *Dual) ReapReroutes(ctx context.Context, now time.Time) error {
	err := d.v4.ReapReroutes(ctx, now)
	if d.off.Load() {
		return err
	}
	return errors.Join(err, d.v6.ReapReroutes(ctx, now))
}

// RerouteDestroyed is told of entries of both families.
func (d *Dual) RerouteDestroyed(t conntrack.Tuple, s conntrack.Status) {
	if t.Is4() {
		d.v4.RerouteDestroyed(t, s)
	} else {
		d.v6.RerouteDestroyed(t, s)
	}
}

// RerouteStats adds up both families.
func (d *Dual) RerouteStats() proxy.RerouteStats {
	a, b := d.v4.RerouteStats(), d.v6.RerouteStats()
	a.Moved, a.Answered, a.Gone, a.Alone = a.Moved+b.Moved, a.Answered+b.Answered, a.Gone+b.Gone, a.Alone+b.Alone
	a.Limited, a.Failed, a.Raced, a.Rules = a.Limited+b.Limited, a.Failed+b.Failed, a.Raced+b.Raced, a.Rules+b.Rules
	return a
}

var _ proxy.Rerouter = (*Dual)(nil)
