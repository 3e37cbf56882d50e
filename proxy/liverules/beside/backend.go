package beside

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// Backend watches what another kube-proxy programs. It implements
// proxy.Backend and proxy.Follower.
type Backend struct {
	cfg Config
	// seen is what was read last, never nil after Preflight.
	seen atomic.Pointer[sight]
	// flavour is settled by Preflight.
	flavour xtables.Flavour

	apply sync.Mutex // protects what follows
	// held are the members that our sets are known to have, nil if nothing is
	// known.
	held map[member]bool
	// mangle has the families whose table mangle was there before our rules.
	mangle map[xtables.Family]bool
	// wrote says in which mode our chains were written for each family.
	wrote map[xtables.Family]proxy.Mode
	// intact is when nobody had changed any rule, in nanoseconds since 1970.
	intact atomic.Int64
}

var (
	_ proxy.Backend   = (*Backend)(nil)
	_ proxy.Follower  = (*Backend)(nil)
	_ proxy.Forgetter = (*Backend)(nil)
)

// sight is one look at what is live.
type sight struct {
	mode proxy.Mode
	// found says in a few words what was found.
	found    string
	families []xtables.Family
	rulesets []*xtables.Ruleset
	// mangle has the families that have a table mangle.
	mangle map[xtables.Family]bool
}

// New returns a Backend that has not looked.
func New(cfg Config) *Backend { return &Backend{cfg: cfg.withDefaults()} }

// Mode returns the mode of the kube-proxy that was found, proxy.IPTables before
// Preflight and where none was.
func (b *Backend) Mode() proxy.Mode {
	if s := b.seen.Load(); s != nil && s.mode != "" {
		return s.mode
	}
	return proxy.IPTables
}

// IPv6 reports whether the node has IPv6, as Preflight found.
func (b *Backend) IPv6() bool {
	s := b.seen.Load()
	return s != nil && len(s.families) > 1
}

// Preflight looks for a kube-proxy, and says in which flavour of iptables our own
// rules are, and beside what. It writes nothing.
func (b *Backend) Preflight(ctx context.Context) (flavour, reason string, err error) {
	fl, err := b.choose(ctx)
	if err != nil {
		return "", "", fmt.Errorf("proxy/beside: choosing a flavour: %w", err)
	}
	b.flavour = fl
	s, err := b.look(ctx)
	if err != nil {
		return "", "", fmt.Errorf("proxy/beside: %w", err)
	}
	b.seen.Store(s)
	b.mangle = s.mangle
	return fl.String(), s.found, nil
}

// choose takes the flavour in which a kube-proxy's chains are live, else the one
// that the node uses.
func (b *Backend) choose(ctx context.Context) (xtables.Flavour, error) {
	if b.cfg.Flavour != "auto" {
		fl, err := xtables.ParseFlavour(b.cfg.Flavour)
		if err != nil {
			return 0, err
		}
		_, err = b.cfg.Tools.Version(ctx, fl, xtables.IPv4)
		return fl, err
	}
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			s, err := b.cfg.Tools.Survey(ctx, fl, fa)
			if err != nil {
				return 0, err
			}
			if len(s.Live) > 0 {
				return fl, nil
			}
		}
	}
	fl, _, err := b.cfg.Tools.Detect(ctx)
	return fl, err
}

// look reads the rules of both families.
func (b *Backend) look(ctx context.Context) (*sight, error) {
	s := &sight{mangle: map[xtables.Family]bool{}}
	var failed []error
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		rs, err := b.cfg.Tools.Save(ctx, b.flavour, fa, "", false)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			failed = append(failed, err)
			continue
		}
		s.families = append(s.families, fa)
		s.mangle[fa] = rs.Table("mangle") != nil
		if len(xtables.LiveKube(rs)) > 0 {
			s.rulesets = append(s.rulesets, rs)
		}
	}
	if len(s.families) == 0 {
		return nil, errors.Join(failed...)
	}
	if len(s.rulesets) > 0 {
		s.mode = liverules.New(liverules.Config{}, s.rulesets...).Mode()
	}
	switch {
	case s.mode == proxy.IPTables:
		s.found = "beside a kube-proxy in iptables mode"
	case s.mode != "":
		s.found = "beside a kube-proxy in " + string(s.mode) + " mode"
	case hasNFTables():
		s.mode, s.found = proxy.NFTables, "beside a kube-proxy in nftables mode"
	default:
		s.found = "no rules of a kube-proxy were found here"
		if other := elsewhere(); other != "" {
			s.found += "; Services seem to be handled by " + other + ", which these rules do not show"
		}
	}
	return s, nil
}

// Found says beside what this watches.
func (b *Backend) Found() string {
	if s := b.seen.Load(); s != nil {
		return s.found
	}
	return ""
}

// Blind lists what this cannot see here.
func (b *Backend) Blind() []string {
	s := b.seen.Load()
	if s == nil {
		return nil
	}
	var out []string
	if s.mode == "" {
		out = append(out, "connections to Services: "+s.found)
	}
	if b.cfg.ReadOnly {
		out = append(out, "connections that were refused or dropped before they were tracked, time to establish, resets, and whether affinity held: this is read-only")
	}
	switch s.mode {
	case proxy.NFTables:
		out = append(out, "the odds of connections as the rules have them: of a proxy in nftables mode they are what they should be; explain and paths read its rules")
	case proxy.IPVS:
		out = append(out, "the weights and schedulers of another's virtual servers: odds are what they should be")
	case proxy.IPTables, proxy.Userspace, "":
	}
	return out
}

// Render says what the rules that were read last mean for a state.
func (b *Backend) Render(snap *proxy.Snapshot, o proxy.Overlay) proxy.Program {
	s := b.seen.Load()
	if s == nil {
		s = &sight{families: []xtables.Family{xtables.IPv4, xtables.IPv6}}
	}
	local := b.cfg.LocalAddrs()
	p := &program{index: proxy.Index{}, members: members(snap, local)}
	if s.mode == proxy.IPTables {
		p.live = liverules.New(liverules.Config{Addrs: local, Snapshot: snap, Overlay: o}, s.rulesets...)
	} else if other := b.cfg.Predict(b.Mode()); other != nil {
		p.wanted, p.nft = other.Render(snap, o), s.mode == proxy.NFTables
	}
	if b.cfg.ReadOnly {
		p.members = nil
		return p
	}
	p.mode = s.mode
	for _, fa := range s.families {
		l, tagged := layout(fa, s.mode, b.cfg.NFLogGroup)
		p.layouts = append(p.layouts, l)
		for _, r := range tagged {
			if err := p.index.Add(r); err != nil {
				panic(err) // tags are constants
			}
		}
	}
	return p
}

// Forget makes the next Apply read its sets anew.
func (b *Backend) Forget() {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.held = nil
}
