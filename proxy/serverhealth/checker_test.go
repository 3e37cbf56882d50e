package serverhealth

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
)

// table is a table of connections that holds what it is given.
type table struct {
	flows   []conntrack.Flow
	deleted []conntrack.Tuple
}

func (t *table) Dump(_ context.Context, f func(conntrack.Flow) error) error {
	for _, flow := range t.flows {
		if err := f(flow); err != nil {
			return err
		}
	}
	return nil
}

func (t *table) Get(k conntrack.Tuple) (conntrack.Flow, error) {
	for _, f := range t.flows {
		if f.Orig == k {
			return f, nil
		}
	}
	return conntrack.Flow{}, errors.New("gone")
}

func (t *table) Delete(f conntrack.Flow) error {
	t.deleted = append(t.deleted, f.Orig)
	return nil
}

var vip = netip.MustParseAddrPort("10.96.0.10:80")

func client(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("10.9.0.2"), port)
}

// flow is a connection to the Service that the endpoint i has.
func flow(port uint16, i int, state conntrack.TCPState, status conntrack.Status, in uint64) conntrack.Flow {
	return conntrack.Flow{
		Orig: conntrack.NewTuple(conntrack.TCP, client(port), vip), Reply: conntrack.NewTuple(conntrack.TCP, addr(i), client(port)),
		State: state, Status: status, In: conntrack.Counters{Packets: in},
	}
}

func TestTableSigns(t *testing.T) {
	direct := flow(9, 1, conntrack.TCPSynSent, 0, 0)
	direct.Orig = conntrack.NewTuple(conntrack.TCP, client(9), addr(1)) // to no Service
	tab := &table{flows: []conntrack.Flow{
		flow(1, 1, conntrack.TCPSynSent, 0, 0),
		flow(2, 2, conntrack.TCPEstablished, conntrack.SeenReply|conntrack.Assured, 3),
		flow(3, 3, conntrack.TCPClose, conntrack.SeenReply, 1),
		flow(4, 4, conntrack.TCPClose, conntrack.SeenReply, 5), // reset later on
		direct,
	}}
	var signs tableSigns
	read := func() []tableSign {
		t.Helper()
		got, err := signs.read(t.Context(), tab)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := read(); !slices.Equal(got, []tableSign{{addr(3), ResetsSYN}, {addr(2), Served}}) {
		t.Errorf("first: %v", got)
	}
	// What was said is not said again; what waits longer than from one reading
	// to the next is stuck, and said once.
	tab.flows = append(tab.flows, flow(5, 1, conntrack.TCPSynSent, 0, 0))
	if got := read(); !slices.Equal(got, []tableSign{{addr(1), StuckSYN}}) {
		t.Errorf("second: %v", got)
	}
	if got := read(); !slices.Equal(got, []tableSign{{addr(1), StuckSYN}}) {
		t.Errorf("third: %v", got)
	}
	if got := read(); len(got) != 0 {
		t.Errorf("fourth: %v", got)
	}
}

// Only half-open connections of endpoints that are out are let go, and of these
// only such as were not answered meanwhile.
func TestFree(t *testing.T) {
	tab := &table{flows: []conntrack.Flow{
		flow(1, 1, conntrack.TCPSynSent, 0, 0),
		flow(2, 1, conntrack.TCPEstablished, conntrack.SeenReply|conntrack.Assured, 3),
		flow(3, 2, conntrack.TCPSynSent, 0, 0),
		flow(4, 1, conntrack.TCPSynSent, 0, 0),
	}}
	c := NewChecker(Config{Table: answers{tab, client(4).Port()}})
	c.free(t.Context(), map[netip.AddrPort]bool{addr(1): true})
	if want := []conntrack.Tuple{tab.flows[0].Orig}; !slices.Equal(tab.deleted, want) || c.Stats().Freed != 1 {
		t.Errorf("deleted %v, want %v", tab.deleted, want)
	}
}

// answers is a table in which one client is answered before anybody looks again.
type answers struct {
	*table
	port uint16
}

func (a answers) Get(k conntrack.Tuple) (conntrack.Flow, error) {
	f, err := a.table.Get(k)
	if k.Src().Port() == a.port {
		f.State, f.Status = conntrack.TCPEstablished, conntrack.SeenReply
	}
	return f, err
}
