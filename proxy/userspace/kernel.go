package userspace

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// kernel is the rules of one family as the kernel has them.
type kernel struct {
	family xtables.Family
	runner *xtables.Runner
	// known says that has is what the kernel took; else it is to be read.
	known bool
	has   map[key][]placed
	jumps []jumpRule
	watch *xtables.Watch // nil while nobody watches
	// lastFull is how long the last reading and comparing of all took.
	lastFull time.Duration
}

// placed is one rule in its chain.
type placed struct {
	chainKey
	text string
}

func (b *Backend) newKernel(f xtables.Family) *kernel {
	return &kernel{family: f, runner: xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: b.flavour, Family: f})}
}

// change is what has to be written for one Service.
type change struct {
	owner  string
	key    key
	del    []placed
	add    []placed
	wanted []placed
}

// apply writes what is wanted. A Service whose rules the kernel refuses keeps
// what it had, and is named in failed.
func (k *kernel) apply(ctx context.Context, p *program, want map[key][]placed, rep *proxy.Report) (failed []error, err error) {
	var plan xtables.Plan
	jumps, before := p.jumps[k.family], rep.Commits
	full := !k.known || !slices.Equal(jumps, k.jumps)
	if k.watch != nil {
		k.watch.Pause(full)
		defer func() { k.watch.Settle(rep.Commits - before) }()
	}
	if full {
		rep.Full = true
		start := time.Now()
		have, err := k.runner.Save(ctx, "")
		if err != nil {
			return nil, err
		}
		plan = k.read(have, jumps, want)
		k.lastFull = time.Since(start)
	}
	k.known = false
	changes := k.changes(want)
	refuse, lead, admit := xtables.Phase{Name: "refuse"}, xtables.Phase{Name: "lead"}, xtables.Phase{Name: "admit"}
	for i := range changes {
		changes[i].units(&refuse, &lead, &admit)
	}
	// Jumps come last, so that nothing half-made is reachable at the start.
	plan = append(xtables.Plan{{Name: "chains", Units: k.missing(plan)}, refuse, lead, admit}, plan...)
	if empty(plan) {
		k.known = true
		return nil, nil
	}
	done, err := k.runner.Apply(ctx, plan)
	rep.Commits += done.Commits
	rep.Rules += done.Rules
	rep.Bytes += done.Bytes
	for table, n := range done.Tables {
		if rep.Tables == nil {
			rep.Tables = map[proxy.Table]int{}
		}
		rep.Tables[proxy.Table{IP6: k.family == xtables.IPv6, Name: table}] += n
	}
	if err != nil {
		return nil, err
	}
	refused := map[string]bool{}
	for i := range done.Failed {
		f := &done.Failed[i]
		if !refused[f.Owner] {
			refused[f.Owner] = true
			failed = append(failed, fmt.Errorf("proxy/userspace: %s is not programmed: %w", f.Owner, f))
		}
	}
	if len(failed) > 0 {
		return failed, nil // read anew before the next write
	}
	for _, c := range changes {
		if c.wanted == nil {
			delete(k.has, c.key)
		} else {
			k.has[c.key] = c.wanted
		}
	}
	k.known, k.jumps = true, jumps
	return nil, nil
}

func empty(plan xtables.Plan) bool {
	return !slices.ContainsFunc(plan, func(ph xtables.Phase) bool { return len(ph.Units) > 0 })
}

// phaseChains holds the chains that are not there, for missing.
const phaseChains = "missing chains"

// missing takes the chains to make out of the plan of read.
func (k *kernel) missing(plan xtables.Plan) []xtables.Unit {
	for i := range plan {
		if plan[i].Name == phaseChains {
			units := plan[i].Units
			plan[i].Units = nil
			return units
		}
	}
	return nil
}

// read takes over what the kernel has: rules that are wanted stay, by Service,
// all others in our chains go. It returns what else is to be done.
func (k *kernel) read(have *xtables.Ruleset, jumps []jumpRule, want map[key][]placed) xtables.Plan {
	made, stale, lead := xtables.Phase{Name: phaseChains}, xtables.Phase{Name: "stale"}, xtables.Phase{Name: "jumps"}
	there := make(map[placed]int)
	for _, ck := range chains() {
		c := have.Chain(ck.table, ck.chain)
		if c == nil {
			made.Units = append(made.Units, xtables.Unit{Table: ck.table, Owner: "chain " + ck.chain, Lines: []string{":" + ck.chain + " - [0:0]"}})
			continue
		}
		for _, r := range c.Rules {
			there[placed{ck, r.String()}]++
		}
	}
	k.has = make(map[key][]placed)
	for _, key := range sortedKeys(want) {
		var kept []placed
		for _, r := range want[key] {
			if there[r] > 0 {
				there[r]--
				kept = append(kept, r)
			}
		}
		k.has[key] = kept
	}
	for _, ck := range chains() {
		var lines []string
		for r, n := range there {
			if r.chainKey == ck {
				lines = append(lines, slices.Repeat([]string{"-D " + ck.chain + " " + r.text}, n)...)
			}
		}
		slices.Sort(lines)
		for part := range slices.Chunk(lines, bigUnit) {
			stale.Units = append(stale.Units, xtables.Unit{Table: ck.table, Owner: "stale rules in " + ck.chain, Lines: part})
		}
	}
	for _, table := range []string{"filter", "nat"} {
		if lines := jumpChanges(have.Table(table), table, jumps); len(lines) > 0 {
			lead.Units = append(lead.Units, xtables.Unit{Table: table, Owner: "jumps", Lines: lines})
		}
	}
	return xtables.Plan{made, stale, lead}
}

// bigUnit bounds the lines of one commit: iptables-nft in a user namespace takes
// about 300 rules at once.
const bigUnit = 150

// jumpChanges puts the jumps of a table right: each once, and no other one of
// ours.
func jumpChanges(t *xtables.Table, table string, jumps []jumpRule) (lines []string) {
	there := make(map[placed]int)
	if t != nil {
		for _, c := range t.Chains {
			if owned(table, c.Name) {
				continue
			}
			for _, r := range c.Rules {
				if ourJump(table, r) {
					there[placed{chainKey{table, c.Name}, r.String()}]++
				}
			}
		}
	}
	for i := range jumps {
		j := &jumps[i]
		if j.table != table {
			continue
		}
		if p := (placed{j.chainKey, j.text}); there[p] > 0 {
			there[p]--
		} else {
			lines = append(lines, j.insert())
		}
	}
	var gone []string
	for p, n := range there {
		gone = append(gone, slices.Repeat([]string{"-D " + p.chain + " " + p.text}, n)...)
	}
	slices.Sort(gone)
	return append(lines, gone...)
}

// changes lists what turns what the kernel has into what is wanted.
func (k *kernel) changes(want map[key][]placed) (out []change) {
	for _, key := range sortedKeys(want) {
		have, need := k.has[key], want[key]
		if slices.Equal(have, need) {
			continue
		}
		// Rules in filter have an order among themselves: a report before its
		// refusal. If those differ all are written anew.
		c := change{owner: "Service " + key.name.String(), key: key, wanted: need}
		if need == nil {
			c.wanted = []placed{}
		}
		refusalsStay := slices.Equal(refusals(have), refusals(need))
		for _, r := range have {
			if !slices.Contains(need, r) || !refusalsStay && r.chain == chainRefuse {
				c.del = append(c.del, r)
			}
		}
		for _, r := range need {
			if !slices.Contains(have, r) || !refusalsStay && r.chain == chainRefuse {
				c.add = append(c.add, r)
			}
		}
		out = append(out, c)
	}
	for _, key := range sortedKeys(k.has) {
		if _, ok := want[key]; !ok && len(k.has[key]) > 0 {
			out = append(out, change{owner: "Service " + key.name.String(), key: key, del: k.has[key]})
		}
	}
	return out
}

func refusals(rules []placed) (out []placed) {
	for _, r := range rules {
		if r.chain == chainRefuse {
			out = append(out, r)
		}
	}
	return out
}

// units are the commits for one Service: filter before nat where it is to be
// refused, and after it where it is not any more.
func (c *change) units(refuse, lead, admit *xtables.Phase) {
	lines := map[string][]string{}
	refuses := false
	for _, r := range c.del {
		lines[r.table] = append(lines[r.table], "-D "+r.chain+" "+r.text)
	}
	for _, r := range c.add {
		lines[r.table] = append(lines[r.table], "-A "+r.chain+" "+r.text)
		refuses = refuses || r.chain == chainRefuse
	}
	add := func(p *xtables.Phase, table string) {
		if len(lines[table]) > 0 {
			p.Units = append(p.Units, xtables.Unit{Table: table, Owner: c.owner, Lines: lines[table]})
		}
	}
	add(lead, "nat")
	if refuses {
		add(refuse, "filter")
	} else {
		add(admit, "filter")
	}
}
