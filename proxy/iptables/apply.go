package iptables

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Apply brings the kernel to p. The first call, and the next one after an error
// or Forget, reads the live tables and compares chain by chain, so that a
// restart with right rules writes nothing; other calls compare with what the
// kernel took last. A Service whose rules the kernel refuses keeps what it had,
// and all others are programmed; the error then names it.
func (b *Backend) Apply(ctx context.Context, prog proxy.Program) (proxy.Report, error) {
	start := time.Now()
	p, ok := prog.(*program)
	if !ok {
		return proxy.Report{}, fmt.Errorf("proxy/iptables: applying: %T is a program of another mode", prog)
	}
	b.apply.Lock()
	defer b.apply.Unlock()
	var rep proxy.Report
	defer b.settle(&rep)
	changes, err := b.changes(ctx, p, &rep)
	if err != nil {
		return rep, fmt.Errorf("proxy/iptables: applying: %w", err)
	}
	b.applied = nil
	if err := b.leaveChains(ctx, p, &rep); err != nil {
		return rep, fmt.Errorf("proxy/iptables: applying: %w", err)
	}
	err = b.commit(ctx, changes, &rep)
	rep.Partial = rep.Partial && 2*rep.Refused <= len(p.units)
	if err == nil && b.reroute.left && b.cfg.Reroute {
		err = b.writeReroutes(ctx, p, &rep)
	}
	if err == nil {
		b.applied = p
	}
	rep.Took = time.Since(start)
	return rep, err
}

// settle lets the watch know what was written.
func (b *Backend) settle(rep *proxy.Report) {
	if b.watch != nil {
		b.watch.Settle(rep.Commits)
	}
}

// pause lets the watch know that we are about to write; all says that whole
// tables are compared before.
func (b *Backend) pause(all bool) {
	if b.watch != nil {
		b.watch.Pause(all)
	}
}

// Forget makes the next Apply read the live tables, for a caller who has reason
// to think that others wrote to them.
func (b *Backend) Forget() {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.applied = nil
}

// changes lists what turns the kernel's state into p.
func (b *Backend) changes(ctx context.Context, p *program, rep *proxy.Report) ([]Change, error) {
	if b.applied != nil && b.applied.fixed.same(p.fixed) {
		b.pause(false)
		return p.since(b.applied), nil
	}
	rep.Full = true
	if err := b.connect(ctx); err != nil {
		return nil, err
	}
	b.pause(true)
	defer func(start time.Time) { b.lastFull = time.Since(start) }(time.Now())
	have, err := b.runner.List(ctx)
	if err != nil {
		return nil, err
	}
	left, _ := have.Chain("nat", chainReroute)
	b.reroute.left = len(left) > 0 && len(b.reroute.moved) == 0
	return newLive(have).diff(p.fixed, p.units), nil
}

// commit writes changes. The error is partial where only some owners failed.
func (b *Backend) commit(ctx context.Context, changes []Change, rep *proxy.Report) error {
	first, second := plans(changes)
	failed, err := b.run(ctx, first, rep)
	if err == nil {
		var more []xtables.UnitError
		more, err = b.run(ctx, leaveOut(second, failed), rep)
		failed = append(failed, more...)
	}
	var errs []error
	refused := map[string]bool{}
	rep.Partial = err == nil
	for i := range failed {
		refused[failed[i].Owner] = true
		// Others are the owners of rules that all need.
		rep.Partial = rep.Partial && strings.HasPrefix(failed[i].Owner, "Service ")
		errs = append(errs, fmt.Errorf("proxy/iptables: %s is not programmed: %w", failed[i].Owner, &failed[i]))
		rep.Refusals = append(rep.Refusals, refusal(&failed[i]))
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("proxy/iptables: applying: %w", err))
	}
	rep.Refused = len(refused)
	return errors.Join(errs...)
}

// refusal says of a Service or of fixed rules that the kernel does not take them.
func refusal(e *xtables.UnitError) proxy.Problem {
	p := proxy.Problem{Object: e.Owner, Message: "the kernel does not take its rules, others are programmed: " + e.Error()}
	// "Service shop/foo:http TCP": the port is said in the message.
	if words := strings.Fields(e.Owner); len(words) == 3 && words[0] == "Service" {
		name, _, _ := strings.Cut(words[1], ":")
		p.Object = "Service " + name
	}
	return p
}

func (b *Backend) run(ctx context.Context, plan xtables.Plan, rep *proxy.Report) ([]xtables.UnitError, error) {
	if planEmpty(plan) {
		return nil, nil
	}
	done, err := b.runner.Apply(ctx, plan)
	rep.Commits += done.Commits
	rep.Rules += done.Rules
	rep.Bytes += done.Bytes
	for table, n := range done.Tables {
		if rep.Tables == nil {
			rep.Tables = map[proxy.Table]int{}
		}
		rep.Tables[proxy.Table{IP6: b.cfg.Family == xtables.IPv6, Name: table}] += n
	}
	return done.Failed, err
}

func planEmpty(plan xtables.Plan) bool {
	for _, ph := range plan {
		if len(ph.Units) > 0 {
			return false
		}
	}
	return true
}

// connect settles the flavour once.
func (b *Backend) connect(ctx context.Context) error {
	if b.runner != nil {
		return nil
	}
	_, _, err := b.preflight(ctx)
	return err
}
