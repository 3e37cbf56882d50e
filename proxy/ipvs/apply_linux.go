package ipvs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nlbatch"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// until is when a real server that leaves now is gone.
func (b *Backend) until() time.Time { return time.Now().Add(b.cfg.GracePeriod) }

// Apply brings the kernel to p. The first call, and the next one after an error
// or Forget, reads everything and writes what differs; other calls compare with
// what the kernel took last. A Service that the kernel refuses a part of keeps
// what it had, all others are programmed, and the error names it.
func (b *Backend) Apply(ctx context.Context, prog proxy.Program) (proxy.Report, error) {
	start := time.Now()
	p, ok := prog.(*program)
	if !ok {
		return proxy.Report{}, fmt.Errorf("proxy/ipvs: applying: %T is a program of another mode", prog)
	}
	b.apply.Lock()
	defer b.apply.Unlock()
	a := &applying{b: b, p: p, failed: map[*unit]error{}}
	err := b.connect(ctx)
	if err == nil {
		err = b.withKernel(func(k *kernel) error {
			a.k = k
			return a.run(ctx)
		})
	}
	a.rep.Took = time.Since(start)
	if err != nil {
		b.applied = nil
		return a.rep, fmt.Errorf("proxy/ipvs: applying: %w", err)
	}
	b.last = p
	err = a.refusals()
	return a.rep, err
}

// applying is one Apply under way.
type applying struct {
	b   *Backend
	p   *program
	k   *kernel
	rep proxy.Report
	// failed are units of which the kernel refused something, others what it
	// refused that belongs to none.
	failed map[*unit]error
	others []error
}

func (a *applying) run(ctx context.Context) error {
	h := a.b.applied
	if before := h; h == nil || a.b.doubt {
		a.rep.Full = true
		h = newHeld()
		names, err := a.k.readSets(h)
		if err != nil {
			return err
		}
		if err := a.k.readAddrs(h); err != nil {
			return err
		}
		if err := a.b.readServers(a.k, h, a.b.cfg.TakeOver); err != nil {
			return err
		}
		if before != nil {
			h.remember(before)
		}
		if err := a.k.ensureSets(a.b.withFamilies(), names, a.b.cfg.MaxElements); err != nil {
			return err
		}
	}
	a.b.applied = nil // until all is known to be done
	if err := a.k.ensureDevice(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	todo := h.compare(a.p, a.b.until())
	for u, err := range todo.problems {
		a.failed[u] = err
	}
	if err := a.do(h, todo.members); err != nil {
		return err
	}
	if err := a.rules(ctx, h); err != nil {
		return err
	}
	for _, ops := range [][]op{todo.servers, todo.addrs, todo.leave, todo.unbound, todo.stale} {
		if err := a.do(h, ops); err != nil {
			return err
		}
	}
	if a.rep.Full {
		if err := errors.Join(a.b.timeouts(a.k), keepSysctls()); err != nil {
			return err
		}
	}
	a.b.applied, a.b.doubt = h, len(a.failed) > 0 || len(a.others) > 0
	return nil
}

// withFamilies lists the families that are programmed: false is IPv4.
func (b *Backend) withFamilies() []bool {
	var out []bool
	for i := range b.runners {
		out = append(out, i == 1)
	}
	return out
}

// rules writes the chains where they are not known to stand.
func (a *applying) rules(ctx context.Context, h *held) error {
	for i, f := range a.p.families {
		if i >= len(a.b.runners) {
			break
		}
		if len(h.layouts) > i && sameLayout(&h.layouts[i], &f.layout) {
			continue
		}
		runner := a.b.runners[i]
		have, err := runner.Save(ctx, "")
		if err != nil {
			return err
		}
		plan := f.layout.Plan(have, staleChain)
		if len(plan) > 0 {
			rep, err := runner.Apply(ctx, plan)
			a.rep.Commits += rep.Commits
			a.rep.Rules += rep.Rules
			a.rep.Bytes += rep.Bytes
			for table, n := range rep.Tables {
				if a.rep.Tables == nil {
					a.rep.Tables = map[proxy.Table]int{}
				}
				a.rep.Tables[proxy.Table{IP6: f.ip6, Name: table}] += n
			}
			if err != nil {
				return err
			}
			for j := range rep.Failed {
				return &rep.Failed[j] // without its rules the mode is none
			}
		}
		if len(h.layouts) <= i {
			h.layouts = append(h.layouts, f.layout)
		} else {
			h.layouts[i] = f.layout
		}
	}
	return nil
}

func sameLayout(a, b *xtables.Layout) bool {
	return slices.Equal(a.Jumps, b.Jumps) && slices.EqualFunc(a.Chains, b.Chains, func(a, b xtables.LayoutChain) bool {
		return a.Table == b.Table && a.Name == b.Name && slices.Equal(a.Rules, b.Rules)
	})
}

// do writes ops in their order, as few system calls as it takes. Those of a unit
// of which something was refused are left out.
func (a *applying) do(h *held, ops []op) error {
	for from := 0; from < len(ops); {
		to := from
		for to < len(ops) && protocol(ops[to].kind) == protocol(ops[from].kind) {
			to++
		}
		if err := a.batch(h, ops[from:to]); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// protocol tells which socket an op goes to.
func protocol(k opKind) int {
	switch k {
	case addEntry, delEntry:
		return unix.NETLINK_NETFILTER
	case addAddr, delAddr:
		return unix.NETLINK_ROUTE
	}
	return unix.NETLINK_GENERIC
}

// batch writes ops of one protocol.
func (a *applying) batch(h *held, ops []op) error {
	var msgs []nlbatch.Message
	var sent []*op
	conn := a.k.genl
	for i := range ops {
		o := &ops[i]
		if o.owner != nil && a.failed[o.owner] != nil {
			h.refused(o)
			continue
		}
		var m nlbatch.Message
		switch protocol(o.kind) {
		case unix.NETLINK_NETFILTER:
			m, conn = setMessage(o), a.k.sets
		case unix.NETLINK_ROUTE:
			m, conn = addrMessage(a.k.device, o), a.k.routes
		default:
			m = ipvsMessage(a.k.family, o)
		}
		msgs, sent = append(msgs, m), append(sent, o)
		a.rep.Bytes += len(m.Body)
	}
	if len(msgs) == 0 {
		return nil
	}
	results, err := conn.Do(msgs)
	if err != nil {
		return err
	}
	a.rep.Commits += (len(msgs) + 199) / 200
	for i, err := range results {
		o := sent[i]
		if err == nil || harmless(o.kind, err) {
			h.took(o)
			a.rep.Rules++
			continue
		}
		h.refused(o)
		a.refuse(o, err)
	}
	return nil
}

// harmless reports whether an op had been done before.
func harmless(k opKind, err error) bool {
	switch k {
	case delVirtual, delReal, delEntry, delAddr:
		return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL)
	case addReal, addVirtual:
		return errors.Is(err, unix.EEXIST)
	default:
		return false
	}
}

// refuse notes what the kernel refused and why, in words.
func (a *applying) refuse(o *op, err error) {
	err = fmt.Errorf("%s: %w", o.words(), a.explain(o, err))
	if o.owner == nil {
		a.others = append(a.others, err)
		return
	}
	if a.failed[o.owner] == nil {
		a.failed[o.owner] = err
	}
}

func (a *applying) explain(o *op, err error) error {
	if o.kind == addEntry || o.kind == delEntry {
		if err = explainSet(err); errors.Is(err, errSetIsFull) {
			return fmt.Errorf("%w: it was made for %d members; after kptrace cleanup the next start makes a larger one", err, a.b.cfg.MaxElements)
		}
		return err
	}
	if (o.kind == addVirtual || o.kind == editVirtual) && errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the kernel has no scheduler %s: load the module ip_vs_%s, or choose one of rr, wrr, lc, wlc, sh, mh", o.settings.scheduler, o.settings.scheduler)
	}
	return err
}

// words says what an op does.
func (o *op) words() string {
	switch o.kind {
	case addEntry:
		return "adding " + o.entry.String() + " to the set " + o.entry.set.name(o.entry.ip6)
	case delEntry:
		return "removing " + o.entry.String() + " from the set " + o.entry.set.name(o.entry.ip6)
	case addVirtual:
		return "adding virtual server " + o.key.String()
	case editVirtual:
		return "changing virtual server " + o.key.String()
	case delVirtual:
		return "removing virtual server " + o.key.String()
	case addReal:
		return "adding " + o.real.addr.String() + " to virtual server " + o.key.String()
	case editReal:
		return "changing " + o.real.addr.String() + " of virtual server " + o.key.String()
	case delReal:
		return "removing " + o.real.addr.String() + " from virtual server " + o.key.String()
	case addAddr:
		return "adding " + o.addr.String() + " to " + Device
	}
	return "removing " + o.addr.String() + " from " + Device
}

// refusals is the error of a partial Apply, nil if all was taken.
func (a *applying) refusals() error {
	if len(a.failed) == 0 && len(a.others) == 0 {
		return nil
	}
	units := 0
	for _, f := range a.p.families {
		units += len(f.units)
	}
	a.rep.Refused = len(a.failed)
	a.rep.Partial = len(a.others) == 0 && 2*a.rep.Refused <= units
	errs := slices.Clone(a.others[:min(len(a.others), maxErrors)])
	failed := make([]*unit, 0, len(a.failed))
	for u := range a.failed {
		failed = append(failed, u)
	}
	slices.SortFunc(failed, func(x, y *unit) int {
		return cmp.Or(x.svc.Name.Compare(y.svc.Name), x.svc.ClusterIP.Compare(y.svc.ClusterIP))
	})
	for i, u := range failed {
		if i < maxErrors {
			errs = append(errs, fmt.Errorf("proxy/ipvs: %s is not programmed: %w", ownerName(u), a.failed[u]))
		}
		a.rep.Refusals = append(a.rep.Refusals, proxy.Problem{Object: "Service " + u.svc.Name.Namespace + "/" + u.svc.Name.Name,
			Message: "port " + u.svc.Name.Port + " is not programmed: " + a.failed[u].Error()})
	}
	if more := len(failed) - maxErrors; more > 0 {
		errs = append(errs, fmt.Errorf("proxy/ipvs: and %d more Services", more))
	}
	return errors.Join(errs...)
}

// maxErrors is how many Services an error names; Report.Refusals has all.
const maxErrors = 10
