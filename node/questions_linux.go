package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/ipset"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/explain"
	"github.com/kptrace/kptrace/trace/selection"
)

// fixPatience bounds the wait for a repair.
const fixPatience = 30 * time.Second

// check looks at the node, after a repair of its own rules if that is asked for.
func (n *node) check(ctx context.Context, req relay.CheckRequest) (relay.CheckResponse, error) {
	out := relay.CheckResponse{Node: n.cfg.Name, At: time.Now()}
	if err := req.Options.Validate(); err != nil {
		return out, err
	}
	if req.Fix {
		done, err := n.fix(ctx)
		if err != nil {
			return out, err
		}
		out.Fixed = done
	}
	s, err := n.inspect(ctx, nil)
	if err != nil {
		return out, err
	}
	out.Findings = check.Run(s, req.Options)
	if f := n.follows(); f != nil && n.cfg.Backend.Mode() != proxy.IPTables && s.NFT == nil {
		out.Notes = append(out.Notes, f.Found()+": the rules of this mode are not compared with the API")
	}
	return out, nil
}

// inspect is Inspect with what this node knows of itself, all of it or of some
// Services.
func (n *node) inspect(ctx context.Context, in func(service string) bool) (*check.State, error) {
	s, notes, err := inspectPart(ctx, in)
	if err != nil {
		return nil, err
	}
	for _, note := range notes {
		n.cfg.Logger.Warn("a check is incomplete", "because", note)
	}
	s.Node, s.PID = n.cfg.Name, os.Getpid()
	if v := n.view(); v != nil {
		s.Snapshot, s.Overlay = v.Snapshot, v.Overlay
		if in != nil {
			s.Part = func(name proxy.PortName) bool { return in(name.String()) }
			s.Snapshot = partOf(v.Snapshot, s.Part)
		}
		if n.follows() == nil {
			s.Program, s.Frontends = v.Program, n.udpFrontends(v.Snapshot)
		}
	}
	stats := n.syncer.Stats()
	s.Synced, s.Wanted = stats.LastEnd, stats.PendingSince
	if stats.LastError != nil {
		s.SyncError = stats.LastError.Error()
	}
	return s, nil
}

// partOf is a Snapshot of some Services.
func partOf(all *proxy.Snapshot, in func(proxy.PortName) bool) *proxy.Snapshot {
	part := *all
	part.Services = nil
	for i := range all.Services {
		if in(all.Services[i].Name) {
			part.Services = append(part.Services, all.Services[i])
		}
	}
	return &part
}

// fix has the syncer compare everything and write what differs.
func (n *node) fix(ctx context.Context) ([]string, error) {
	if n.follows() != nil {
		return nil, errors.New("the rules here are another proxy's: only its own can be repaired; restart that one")
	}
	before, err := n.inspect(ctx, nil)
	if err != nil {
		return nil, err
	}
	var ours []string
	for _, f := range check.Run(before, check.Options{}) {
		if f.Ours {
			ours = append(ours, f.Code+" "+f.Object)
		}
	}
	if len(ours) == 0 {
		return nil, nil
	}
	synced := n.syncer.Synced()
	n.syncer.Resync()
	select {
	case <-synced:
	case <-time.After(fixPatience):
		return nil, errors.New("the proxy has not come to it: kptrace status says what keeps it")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return ours, nil
}

// explain walks a packet through the live rules, or what the node's own mode
// says of it where rules do not tell all.
func (n *node) explain(ctx context.Context, req relay.ExplainRequest) ([]explain.Answer, error) {
	v := n.view()
	if v == nil {
		return nil, errors.New("the node has not programmed anything yet")
	}
	packets, err := packetsOf(v.Snapshot, &req)
	if err != nil {
		return nil, err
	}
	live := func(pkt proxy.Packet) (explain.Answer, error) {
		o := v.Program.Walk(pkt)
		a := explain.Outcome(&o, v.Mode, pkt)
		a.Rules = "what the proxy of " + n.cfg.Name + " wants, in " + string(v.Mode) + " mode"
		if f := n.follows(); f != nil {
			a.Rules = "what a proxy of " + n.cfg.Name + " should do in " + string(v.Mode) + " mode"
			a.Notes = append(a.Notes, f.Found()+": its rules are not read, this is what they should do")
		}
		return a, nil
	}
	if (v.Mode == proxy.IPTables || v.Mode == proxy.NFTables) && !req.Desired {
		s, _, err := look(ctx, nil)
		if err != nil {
			return nil, err
		}
		if v.Mode == proxy.IPTables {
			live = n.live(ctx, v, s)
		} else if live, err = n.liveNFT(ctx, s); err != nil {
			return nil, err
		}
	}
	var out []explain.Answer
	for _, pkt := range packets {
		a, err := live(pkt)
		if err != nil {
			return nil, err
		}
		untraced(&a)
		a.Name(v.Snapshot, v.Overlay)
		out = append(out, a)
	}
	return out, nil
}

// services reads what the live rules do with every Service.
func (n *node) services(ctx context.Context, req relay.ServicesRequest) (relay.ServicesResponse, error) {
	out := relay.ServicesResponse{Node: n.cfg.Name}
	v := n.view()
	if v == nil {
		return out, errors.New("the node has not programmed anything yet")
	}
	if v.Mode != proxy.IPTables && v.Mode != proxy.NFTables {
		return out, relay.NotFound("the rules of %s, in %s mode, do not say which endpoints a Service has: name one, kptrace explain svc/NAME", n.cfg.Name, v.Mode)
	}
	s, _, err := look(ctx, nil)
	if err != nil {
		return out, err
	}
	out.Mode = v.Mode
	if v.Mode == proxy.NFTables {
		p, notes, err := nftProgram(ctx, s, true)
		if err != nil {
			return out, err
		}
		out.Rules, out.Services, out.Notes = n.liveRules("nftables"), p.Services(), notes
	} else {
		rulesets, flavour := liveKube(s)
		out.Rules = n.liveRules("iptables-" + flavour)
		out.Services = liverules.New(liverules.Config{Addrs: s.Addrs, Snapshot: v.Snapshot, Overlay: v.Overlay}, rulesets...).Services()
	}
	asked := func(name proxy.PortName) bool { return req.Namespace == "" || name.Namespace == req.Namespace }
	out.Services = slices.DeleteFunc(out.Services, func(s *liverules.Service) bool { return !asked(s.Name) })
	out.Snapshot = partOf(v.Snapshot, asked)
	return out, nil
}

// liveRules says which rules an answer is of.
func (n *node) liveRules(kind string) string {
	return "the live rules of " + n.cfg.Name + " (" + kind + ")"
}

// untraced leaves out the rules by which paths are traced just now, as what is
// observed does.
func untraced(a *explain.Answer) {
	own := func(h trace.Hop) bool { return selection.Owns(h.Table, h.Chain) || selection.Owns(h.Table, h.Target) }
	clean := func(ways []explain.Way) {
		for i := range ways {
			ways[i].Path.Hops = slices.DeleteFunc(ways[i].Path.Hops, own)
		}
	}
	for i := range a.Cases {
		clean(a.Cases[i].Ways)
		for j := range a.Cases[i].Choices {
			clean(a.Cases[i].Choices[j].Ways)
		}
	}
}

// live walks the rules of the flavour that serves.
func (n *node) live(ctx context.Context, v *proxy.View, s *check.State) func(proxy.Packet) (explain.Answer, error) {
	rulesets, flavour := liveKube(s)
	clients := newHeld(liverules.New(liverules.Config{}, rulesets...).AffinityLists())
	p, notes := programOf(ctx, liverules.Config{
		Addrs: s.Addrs, Route: route, Recent: clients.recent, Snapshot: v.Snapshot, Overlay: v.Overlay,
	}, rulesets)
	return func(pkt proxy.Packet) (explain.Answer, error) {
		if pkt.In == "" && !pkt.FromNode {
			pkt.In = deviceTo(pkt.Src.Addr())
		}
		clients.found = nil
		a := explain.Live(p, pkt)
		a.Notes = append(a.Notes, notes...)
		for _, h := range clients.found {
			a.Held(h.list.Endpoint, h.age, h.list.Timeout)
		}
		a.Rules = n.liveRules("iptables-" + flavour)
		return a, nil
	}
}

// liveKube returns the rules of the flavour that serves, one for each family.
func liveKube(s *check.State) (rulesets []*xtables.Ruleset, flavour string) {
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		i := slices.IndexFunc(s.Dumps, func(d xtables.Dump) bool { return d.Family == fa && len(xtables.LiveKube(d.Rules)) > 0 })
		if i >= 0 {
			rulesets = append(rulesets, s.Dumps[i].Rules)
			flavour = s.Dumps[i].Flavour.String()
		}
	}
	return rulesets, flavour
}

// programOf reads rulesets, and the kernel's sets if rules ask for any.
func programOf(ctx context.Context, cfg liverules.Config, rulesets []*xtables.Ruleset) (p *liverules.Program, notes []string) {
	if slices.ContainsFunc(rulesets, asksSets) {
		if sets, err := readSets(ctx); err != nil {
			notes = append(notes, "the kernel's sets could not be read, so what rules ask of them is not evaluated: "+err.Error())
		} else {
			cfg.Set = sets.Match
		}
	}
	return liverules.New(cfg, rulesets...), notes
}

// nftProgram reads the tables of a kube-proxy in nftables mode, and takes those of
// iptables beside them from s. With clients it is as they are for a packet now, else
// with the tables of others for a check.
func nftProgram(ctx context.Context, s *check.State, clients bool) (p *nftables.Program, notes []string, err error) {
	text, err := (&xtables.Tools{}).NFTAll(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("the rules of the nftables mode cannot be read: %w", err)
	}
	var rulesets []*xtables.Ruleset
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		for _, d := range s.Dumps { // of two flavours the one that has more rules
			if d.Family != fa || rules(d.Rules) == 0 {
				continue
			}
			if k := len(rulesets) - 1; k >= 0 && rulesets[k].Family == fa {
				if rules(d.Rules) > rules(rulesets[k]) {
					rulesets[k] = d.Rules
				}
				continue
			}
			rulesets = append(rulesets, d.Rules)
		}
	}
	beside, notes := programOf(ctx, liverules.Config{Addrs: s.Addrs, Route: route}, rulesets)
	p, err = nftables.Parse(nftables.Config{Addrs: s.Addrs, Beside: beside, Others: !clients, Clients: clients}, text)
	return p, notes, err
}

// liveNFT walks the tables of a kube-proxy in nftables mode, and those of iptables
// beside them.
func (n *node) liveNFT(ctx context.Context, s *check.State) (func(proxy.Packet) (explain.Answer, error), error) {
	p, notes, err := nftProgram(ctx, s, true)
	if err != nil {
		return nil, err
	}
	return func(pkt proxy.Packet) (explain.Answer, error) {
		if pkt.In == "" && !pkt.FromNode {
			pkt.In = deviceTo(pkt.Src.Addr())
		}
		o := p.Walk(pkt)
		a := explain.Outcome(&o, proxy.NFTables, pkt)
		a.Rules = n.liveRules("nftables")
		a.Notes = append(a.Notes, notes...)
		for _, text := range p.Unknown() {
			a.Notes = append(a.Notes, "not evaluated, and taken not to match: "+text)
		}
		return a, nil
	}, nil
}

// rules counts them.
func rules(rs *xtables.Ruleset) (n int) {
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			n += len(c.Rules)
		}
	}
	return n
}

// asksSets reports whether rules ask for sets.
func asksSets(rs *xtables.Ruleset) bool {
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				if slices.ContainsFunc(r.Matches, func(m xtables.Match) bool {
					return m.Opt("match-set") != nil
				}) {
					return true
				}
			}
		}
	}
	return false
}

// readSets reads the kernel's ipsets.
func readSets(ctx context.Context) (ipset.Sets, error) {
	res, err := exec.Run(ctx, exec.Spec{Path: "ipset", Args: []string{"save"}, Grace: -1})
	if err != nil {
		return nil, err
	}
	return ipset.Parse(string(res.Stdout))
}
