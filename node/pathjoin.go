package node

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/path"
	"github.com/kptrace/kptrace/trace/record"
	"github.com/kptrace/kptrace/trace/selection"
	"github.com/kptrace/kptrace/trace/source/drop"
	"github.com/kptrace/kptrace/trace/source/wire"
)

// pathLate is how long a path waits for its flow.
const pathLate = 3 * time.Second

// pathJoin makes paths of what their sources read, live and in a replay.
type pathJoin struct {
	rules  path.Rules
	joiner *path.Joiner
	ready  []path.Joined // complete, not yet given to their flows

	hits    []trace.RuleHit
	seen    []trace.Sighting
	notices []trace.DropNotice
	resends []trace.Resend
}

// begin makes it ready: device names interfaces, endpoint what is at an address.
func (p *pathJoin) begin(device func(uint32) string, endpoint func(netip.AddrPort) string) {
	p.joiner = path.New(path.Config{
		Rules: p.rules.Find, Hook: p.rules.Hook, IPVS: p.rules.IPVS, Device: device, Own: selection.Owns,
		Names: &path.Names{Endpoint: endpoint},
		Emit:  func(j path.Joined) { p.ready = append(p.ready, j) },
	})
}

func (p *pathJoin) hit(d trace.HitDecoder, f trace.Frame) {
	p.hits = d.DecodeHits(f, p.hits[:0])
	for i := range p.hits {
		p.joiner.Hit(&p.hits[i], f.Time)
	}
}

func (p *pathJoin) sight(d *wire.Decoder, f trace.Frame) {
	p.seen = d.Decode(f, p.seen[:0])
	for i := range p.seen {
		p.joiner.Sighting(&p.seen[i], f.Time)
	}
}

func (p *pathJoin) drop(d *drop.Decoder, f trace.Frame) {
	p.notices, p.resends = d.Decode(f, p.notices[:0], p.resends[:0])
	for i := range p.notices {
		p.joiner.Dropped(&p.notices[i], f.Time)
	}
	for i := range p.resends {
		p.joiner.Resent(&p.resends[i])
	}
}

// give gives paths to their flows: left are those that wait for one, strays
// counts those that waited long enough, which with last are all, and that tell of no
// connection by themselves.
func (p *pathJoin) give(c *correlate.Correlator, now time.Time, last bool) (left []path.Joined, strays uint64) {
	for i := range p.ready {
		j := &p.ready[i]
		switch {
		case c.Path(&j.Path, &j.Packet):
		case !last && now.UnixNano()-j.At < int64(pathLate):
			left = append(left, *j)
		case c.Untracked(&j.Path, &j.Packet, j.At):
		default:
			strays++
		}
	}
	return left, strays
}

// rulesets reads recorded rules; families without any are left out.
func rulesets(v4, v6 string) (map[uint8]*xtables.Ruleset, []*xtables.Ruleset, error) {
	by := map[uint8]*xtables.Ruleset{}
	var all []*xtables.Ruleset
	for _, one := range []struct {
		number uint8
		family xtables.Family
		text   string
	}{{nfnl.FamilyIPv4, xtables.IPv4, v4}, {nfnl.FamilyIPv6, xtables.IPv6, v6}} {
		if one.text == "" {
			continue
		}
		rs, err := xtables.Parse(one.family, one.text)
		if err != nil {
			return nil, nil, err
		}
		by[one.number], all = rs, append(all, rs)
	}
	return by, all, nil
}

// recordable puts a generation into a recording's terms.
func recordable(g *path.Generation) record.Rules {
	out := record.Rules{Source: g.Source, From: g.From}
	if rs := g.Rules[nfnl.FamilyIPv4]; rs != nil {
		out.Rules4 = rs.String()
	}
	if rs := g.Rules[nfnl.FamilyIPv6]; rs != nil {
		out.Rules6 = rs.String()
	}
	places := map[path.ChainKey]int{}
	chain := func(k path.ChainKey) *record.Chain {
		i, ok := places[k]
		if !ok {
			i = len(out.Chains)
			places[k] = i
			out.Chains = append(out.Chains, record.Chain{Family: k.Family, Table: k.Table, Name: k.Chain})
		}
		return &out.Chains[i]
	}
	for k, i := range g.Index {
		c := chain(path.ChainKey{Family: k.Family, Table: k.Table, Chain: k.Chain})
		for len(c.Handles) <= i {
			c.Handles = append(c.Handles, 0)
		}
		c.Handles[i] = k.Handle
	}
	for k, hook := range g.Hooks {
		chain(k).Hook = hook
	}
	return out
}

// generation is the way back.
func generation(r *record.Rules) (*path.Generation, error) {
	g := &path.Generation{Source: r.Source, From: r.From, Index: map[path.HandleKey]int{}, Hooks: map[path.ChainKey]string{}}
	by, all, err := rulesets(r.Rules4, r.Rules6)
	if err != nil {
		return nil, err
	}
	g.Rules, g.Program = by, liverules.New(liverules.Config{}, all...)
	for _, c := range r.Chains {
		for i, h := range c.Handles {
			g.Index[path.HandleKey{Family: c.Family, Table: c.Table, Chain: c.Name, Handle: h}] = i
		}
		if c.Hook != "" {
			g.Hooks[path.ChainKey{Family: c.Family, Table: c.Table, Chain: c.Name}] = c.Hook
		}
	}
	return g, nil
}
