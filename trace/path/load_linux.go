package path

import (
	"context"
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

// LoadConfig says what to read.
type LoadConfig struct {
	Tools   xtables.Tools
	Flavour xtables.Flavour
	// IPv6 reads ip6tables too.
	IPv6 bool
}

// loadTries is how often reading begins anew where the rules change meanwhile.
const loadTries = 4

// Load reads the rules that are live now, in the calling thread's network
// namespace. Of nf_tables it reads handles besides, and again where somebody
// commits in between.
func Load(ctx context.Context, cfg LoadConfig) (*Generation, error) {
	for try := 1; ; try++ {
		var before, after uint32
		var err error
		if cfg.Flavour == xtables.NFT {
			if before, err = xtables.NFTGeneration(); err != nil {
				return nil, fmt.Errorf("path: %w", err)
			}
		}
		g, err := load(ctx, cfg)
		if err != nil {
			return nil, err
		}
		if cfg.Flavour == xtables.NFT {
			if after, err = xtables.NFTGeneration(); err != nil {
				return nil, fmt.Errorf("path: %w", err)
			}
		}
		if before == after || try == loadTries {
			return g, nil
		}
	}
}

func load(ctx context.Context, cfg LoadConfig) (*Generation, error) {
	g := &Generation{
		Source: trace.NFTrace, From: time.Now().UnixNano(),
		Rules: map[uint8]*xtables.Ruleset{}, Index: map[HandleKey]int{}, Hooks: map[ChainKey]string{},
	}
	if cfg.Flavour == xtables.Legacy {
		g.Source = trace.LegacyTrace
	}
	versions := []xtables.Family{xtables.IPv4}
	if cfg.IPv6 {
		versions = append(versions, xtables.IPv6)
	}
	var all []*xtables.Ruleset
	for _, fa := range versions {
		rs, err := cfg.Tools.Save(ctx, cfg.Flavour, fa, "", false)
		if err != nil {
			return nil, fmt.Errorf("path: reading the live rules: %w", err)
		}
		family := uint8(nfnl.FamilyIPv4)
		if fa == xtables.IPv6 {
			family = nfnl.FamilyIPv6
		}
		g.Rules[family] = rs
		all = append(all, rs)
	}
	g.Program = liverules.New(liverules.Config{}, all...)
	if cfg.Flavour == xtables.Legacy {
		return g, nil
	}
	rules, hooks, err := xtables.NFTRules(nfnl.FamilyUnspec)
	if err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	g.handles(rules)
	g.list(ctx, &cfg.Tools, rules)
	for _, h := range hooks {
		if int(h.Hook) < len(hookNames) {
			g.Hooks[ChainKey{h.Family, h.Table, h.Chain}] = hookNames[h.Hook]
		}
	}
	return g, nil
}

// maxNative bounds how many tables are listed by nft.
const maxNative = 32

// list reads the tables that have rules and that iptables does not show.
func (g *Generation) list(ctx context.Context, tools *xtables.Tools, rules []xtables.NFTRule) {
	seen := map[ChainKey]bool{}
	for _, r := range rules {
		t := ChainKey{Family: r.Family, Table: r.Table}
		if r.Table == xtables.EarlyTable || seen[t] || len(seen) == maxNative || families[r.Family] == "" || g.Rules[r.Family].Table(r.Table) != nil {
			continue
		}
		seen[t] = true
		text, err := tools.NFTText(ctx, families[r.Family], r.Table)
		if err != nil {
			g.Unlisted = fmt.Sprintf("table %s %s could not be listed: %v", families[r.Family], r.Table, err)
			continue
		}
		g.native(text)
	}
}

// handles pairs handles with the rules that iptables-save prints, by their place
// in the chain. A chain of which the two have different lengths is left out.
func (g *Generation) handles(rules []xtables.NFTRule) {
	places := map[ChainKey]int{}
	for _, r := range rules {
		c := ChainKey{r.Family, r.Table, r.Chain}
		if g.Rules[r.Family].Table(r.Table) != nil {
			g.Index[HandleKey{r.Family, r.Table, r.Chain, r.Handle}] = places[c]
		}
		places[c]++
	}
	for _, r := range rules {
		c := ChainKey{r.Family, r.Table, r.Chain}
		saved := g.Rules[r.Family].Table(r.Table).Chain(r.Chain)
		if saved == nil || len(saved.Rules) != places[c] {
			delete(g.Index, HandleKey{r.Family, r.Table, r.Chain, r.Handle})
		}
	}
}
