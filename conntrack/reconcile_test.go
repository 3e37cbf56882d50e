package conntrack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"testing"
)

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func backends(list ...string) Backends {
	b := make(Backends)
	for _, s := range list {
		b[addr(s)] = struct{}{}
	}
	return b
}

// entry is a flow from a client to dst that from answers.
func entry(p Proto, dst, from string) Flow {
	client := addr("10.0.0.9:4000")
	if addr(dst).Addr().Is6() {
		client = addr("[fd00::9]:4000")
	}
	return Flow{Orig: NewTuple(p, client, addr(dst)), Reply: NewTuple(p, addr(from), client)}
}

func TestStale(t *testing.T) {
	f := Frontends{
		addr("10.96.0.1:53"):   backends("10.1.0.1:53", "10.1.0.2:53"),
		addr("10.96.0.2:53"):   nil,
		addr("0.0.0.0:30053"):  backends("10.1.0.1:53"),
		addr("[fd00::1]:53"):   backends("[fd01::1]:53"),
		addr("[::]:30053"):     backends("[fd01::1]:53"),
		addr("0.0.0.0:30054"):  nil,
		addr("192.0.2.1:5353"): backends("10.1.0.2:53"), // an external IP that is local as well
	}
	local := func(a netip.Addr) bool {
		return a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("fd02::1")
	}
	for _, tc := range []struct {
		proto     Proto
		dst, from string
		stale     bool
	}{
		{UDP, "10.96.0.1:53", "10.1.0.1:53", false},
		{UDP, "10.96.0.1:53", "10.1.0.3:53", true},
		{UDP, "10.96.0.1:53", "10.1.0.1:54", true},
		{UDP, "10.96.0.1:53", "10.96.0.1:53", true}, // made before there were rules
		{TCP, "10.96.0.1:53", "10.1.0.3:53", false},
		{SCTP, "10.96.0.1:53", "10.1.0.3:53", false},
		{UDP, "10.96.0.1:54", "10.1.0.3:53", false},
		{UDP, "10.96.0.2:53", "10.1.0.1:53", true},
		{UDP, "10.96.0.2:53", "10.96.0.2:53", false}, // nowhere else to go
		{UDP, "192.0.2.1:30053", "10.1.0.1:53", false},
		{UDP, "192.0.2.1:30053", "10.1.0.2:53", true},
		{UDP, "192.0.2.1:30054", "10.1.0.2:53", true},
		{UDP, "8.8.8.8:30053", "8.8.8.8:30053", false}, // somebody else's port
		{UDP, "192.0.2.1:5353", "10.1.0.2:53", false},
		{UDP, "[fd00::1]:53", "[fd01::1]:53", false},
		{UDP, "[fd00::1]:53", "[fd01::2]:53", true},
		{UDP, "[fd02::1]:30053", "[fd01::1]:53", false},
		{UDP, "[fd02::1]:30053", "[fd01::2]:53", true},
	} {
		e := entry(tc.proto, tc.dst, tc.from)
		if got := f.Stale(&e, local); got != tc.stale {
			t.Errorf("%s %s answered by %s: stale %t", tc.proto, tc.dst, tc.from, got)
		}
	}
}

// fakeTable is a table that fails on demand.
type fakeTable struct {
	flows   []Flow
	fail    error
	missing bool
	deleted []Flow
	dumps   int
}

func (f *fakeTable) Dump(_ context.Context, fn func(Flow) error) error {
	f.dumps++
	for _, e := range f.flows {
		if err := fn(e); err != nil {
			return err
		}
	}
	return f.fail
}

func (f *fakeTable) Delete(e Flow) error {
	if f.missing {
		return fmt.Errorf("no: %w", fs.ErrNotExist)
	}
	f.deleted = append(f.deleted, e)
	return nil
}

func TestReconciler(t *testing.T) {
	table := &fakeTable{flows: []Flow{entry(UDP, "10.96.0.1:53", "10.1.0.1:53")}}
	var seen []Reconciled
	r := NewReconciler(ReconcilerConfig{Table: table, Observe: func(x Reconciled) { seen = append(seen, x) }})
	step := func(name string, f Frontends, dumps, deleted int, fails bool) {
		t.Helper()
		table.dumps, table.deleted = 0, nil
		if err := r.Reconcile(t.Context(), f); (err != nil) != fails {
			t.Errorf("%s: %v", name, err)
		}
		if table.dumps != dumps || len(table.deleted) != deleted {
			t.Errorf("%s: %d dumps, %d deleted, want %d and %d", name, table.dumps, len(table.deleted), dumps, deleted)
		}
	}
	one := Frontends{addr("10.96.0.1:53"): backends("10.1.0.1:53")}
	two := Frontends{addr("10.96.0.1:53"): backends("10.1.0.2:53")}
	step("start", one, 1, 0, false)
	step("no change", one, 0, 0, false)
	r.Doubt()
	step("doubt", one, 1, 0, false)
	step("endpoint replaced", two, 1, 1, false)
	step("endpoint back", one, 1, 0, false)
	table.fail = errors.New("no")
	step("Service deleted, failing", Frontends{}, 1, 1, true)
	table.fail, table.missing = nil, true
	step("again", Frontends{}, 1, 0, false)
	step("forgotten", Frontends{}, 0, 0, false)
	if n := len(seen); n != 6 || seen[n-2].Err == nil || seen[n-3].Seen != 1 || seen[2].Deleted != 1 {
		t.Errorf("observed %+v", seen)
	}
}
