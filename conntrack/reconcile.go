package conntrack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"time"
)

// Frontends are the UDP addresses that lead to endpoints, and the endpoints
// that serve each. A node port, which is on all local addresses of a family, has
// the unspecified address of that family.
type Frontends map[netip.AddrPort]Backends

// Backends is a set of endpoints.
type Backends map[netip.AddrPort]struct{}

// Equal reports whether both have the same frontends and endpoints.
func (f Frontends) Equal(o Frontends) bool {
	return maps.EqualFunc(f, o, func(a, b Backends) bool { return maps.Equal(a, b) })
}

// Gone returns the frontends of f that o has not, without endpoints.
func (f Frontends) Gone(o Frontends) Frontends {
	gone := make(Frontends)
	for addr := range f {
		if _, ok := o[addr]; !ok {
			gone[addr] = nil
		}
	}
	return gone
}

// NodePort returns the frontend of a node port in the family of a cluster IP.
func NodePort(ip netip.Addr, port uint16) netip.AddrPort {
	if ip.Is6() {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
}

// Stale reports whether an entry keeps a UDP client from the endpoints that
// serve the address it sends to: the kernel looks at rules only for the first
// packet of an entry, and a client that keeps sending keeps it alive. That is an
// entry translated to what is no endpoint any more, and one not translated at
// all though the address has endpoints by now. Node ports are looked at on
// addresses that local accepts. Entries of other protocols are never stale, for
// their endpoints answer with a reset.
func (f Frontends) Stale(e *Flow, local func(netip.Addr) bool) bool {
	if e.Orig.Proto() != UDP {
		return false
	}
	dst, from := e.Orig.Dst(), e.Reply.Src()
	backends, ok := f[dst]
	if !ok && local(dst.Addr()) {
		backends, ok = f[NodePort(dst.Addr(), dst.Port())]
	}
	if !ok {
		return false
	}
	if len(backends) == 0 {
		return from != dst
	}
	_, serves := backends[from]
	return !serves
}

// Table is what a Reconciler needs of a Conn.
type Table interface {
	Dump(ctx context.Context, f func(Flow) error) error
	Delete(f Flow) error
}

// ReconcilerConfig says what a Reconciler works on.
type ReconcilerConfig struct {
	Table Table
	// Local returns a function that tells the node's own addresses. Nil takes
	// every address for local.
	Local func() (func(netip.Addr) bool, error)
	// Observe is called after each reconciliation. Nil means nobody looks.
	Observe func(Reconciled)
}

// Reconciled is what one reconciliation did.
type Reconciled struct {
	// At is when it began, Took how long it took.
	At   time.Time
	Took time.Duration
	// Seen counts the entries looked at, Deleted those removed.
	Seen, Deleted int
	Err           error
}

// Reconciler deletes UDP entries that rules have left behind. It has one
// caller at a time.
type Reconciler struct {
	cfg ReconcilerConfig
	// done is what the table agrees with, unsure what it may disagree with
	// because a reconciliation failed; gone are frontends that were ours and
	// have not been reconciled since.
	done   Frontends
	unsure bool
	gone   Frontends
}

// NewReconciler returns a Reconciler that knows nothing.
func NewReconciler(cfg ReconcilerConfig) *Reconciler {
	return &Reconciler{cfg: cfg, unsure: true, gone: make(Frontends)}
}

// Reconcile deletes the entries that are stale, given the frontends that rules
// have now. Frontends that were there in an earlier call and are no more count
// as being without endpoints until a call succeeds. Where nothing changed since
// then the table is not looked at. After an error it can be called again.
func (r *Reconciler) Reconcile(ctx context.Context, now Frontends) error {
	if !r.unsure && r.done.Equal(now) {
		return nil
	}
	maps.Copy(r.gone, r.done.Gone(now))
	all := maps.Clone(r.gone)
	maps.Copy(all, now)
	r.done, r.unsure = now, true
	res := Reconciled{At: time.Now()}
	res.Err = r.reconcile(ctx, all, &res)
	res.Took = time.Since(res.At)
	if res.Err == nil {
		r.unsure = false
		clear(r.gone)
	}
	if r.cfg.Observe != nil {
		r.cfg.Observe(res)
	}
	return res.Err
}

// Doubt makes the next Reconcile look whatever changed, for a caller who knows
// that not all rules are as they should be yet.
func (r *Reconciler) Doubt() { r.unsure = true }

func (r *Reconciler) reconcile(ctx context.Context, all Frontends, res *Reconciled) error {
	if len(all) == 0 {
		return nil
	}
	local := func(netip.Addr) bool { return true }
	if r.cfg.Local != nil {
		var err error
		if local, err = r.cfg.Local(); err != nil {
			return fmt.Errorf("conntrack: reconciling: finding the node's addresses: %w", err)
		}
	}
	var errs []error
	err := r.cfg.Table.Dump(ctx, func(e Flow) error {
		res.Seen++
		if !all.Stale(&e, local) {
			return nil
		}
		switch err := r.cfg.Table.Delete(e); {
		case err == nil:
			res.Deleted++
		case !errors.Is(err, fs.ErrNotExist): // else it is gone by itself
			errs = append(errs, err)
		}
		return nil
	})
	if err := errors.Join(append(errs, err)...); err != nil {
		return fmt.Errorf("conntrack: reconciling: %w", err)
	}
	return nil
}
