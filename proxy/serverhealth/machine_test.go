package serverhealth

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

var start = time.Unix(1000, 0)

func addr(i int) netip.AddrPort {
	return netip.MustParseAddrPort(fmt.Sprintf("10.244.1.%d:8080", i))
}

func group(name string, eps ...int) Group {
	g := Group{Name: proxy.PortName{Namespace: "shop", Name: name}}
	for _, i := range eps {
		g.Endpoints = append(g.Endpoints, addr(i))
	}
	return g
}

// script runs lines "second sign endpoint..." through a Machine, and after each
// line a Tick, whose changes are returned as "second out|in|kept endpoint".
func script(m *Machine, text string) (changes []string) {
	signs := map[string]Sign{"answered": Answered, "refused": Refused, "silent": Silent, "served": Served, "stuck": StuckSYN, "resets": ResetsSYN}
	for l := range strings.Lines(text) {
		f := strings.Fields(l)
		if len(f) == 0 {
			continue
		}
		var second float64
		fmt.Sscan(f[0], &second)
		now := start.Add(time.Duration(second * float64(time.Second)))
		if len(f) > 1 {
			for _, ep := range f[2:] {
				var i int
				fmt.Sscan(ep, &i)
				m.Note(addr(i), signs[f[1]], now)
			}
		}
		_, list := m.Tick(now)
		for _, c := range list {
			word := "in"
			if c.Out {
				word = "out"
			}
			if c.Kept {
				word = "kept"
			}
			ip := c.Endpoint.Addr().As4()
			changes = append(changes, fmt.Sprintf("%s %s %d", f[0], word, ip[3]))
		}
	}
	return changes
}

func TestMachine(t *testing.T) {
	for _, tt := range []struct {
		name   string
		groups []Group
		script string
		want   string
	}{
		{"two probes in a row", []Group{group("a", 1, 2, 3)}, `
			0 silent 1
			1 answered 1
			2 silent 1
			3 silent 1`, "3 out 1"},
		{"refusals count as well", []Group{group("a", 1, 2, 3)}, `
			0 refused 1 2 3
			1 refused 1`, "1 out 1"},
		{"three signs of clients", []Group{group("a", 1, 2, 3)}, `
			0 stuck 1 1
			1 served 1
			2 stuck 1
			3 resets 1
			4 stuck 1`, "4 out 1"},
		{"it comes back when its time is up and it answers", []Group{group("a", 1, 2, 3)}, `
			0 silent 1 1
			5 answered 1
			9
			10
			11 silent 1
			12 silent 1`, "0 out 1,10 in 1,12 out 1"},
		{"while it fails its time doubles", []Group{group("a", 1, 2, 3)}, `
			0 silent 1 1
			10 silent 1
			29 answered 1
			30`, "0 out 1,30 in 1"},
		{"clients try one that is not probed", []Group{group("a", 1, 2, 3)}, `
			0 stuck 1 1 1
			9
			10
			11 stuck 1 1 1
			30
			31`, "0 out 1,10 in 1,11 out 1,31 in 1"},
		{"half of them stay", []Group{group("a", 1, 2, 3)}, `
			0 silent 1 2 3
			1 silent 1 2 3
			2 silent 1 2 3`, "1 out 1,1 kept 2,1 kept 3"},
		{"the last one stays", []Group{group("a", 1)}, `
			0 silent 1 1`, "0 kept 1"},
		{"no Service loses its last", []Group{group("a", 1, 2, 3, 4), group("b", 1)}, `
			0 silent 1 1 2 2`, "0 kept 1,0 out 2"},
		{"one that was kept goes when another is back", []Group{group("a", 1, 2)}, `
			0 silent 1 1
			1 silent 2 2
			10 answered 1`, "0 out 1,1 kept 2,10 in 1,10 out 2"},
		{"nobody knows it", []Group{group("a", 1, 2)}, `0 silent 9 9 9`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := NewMachine(Policy{})
			m.SetGroups(tt.groups)
			if got := strings.Join(script(m, tt.script), ","); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// What is known of an endpoint outlives a change of the others, and ends with it.
func TestGroups(t *testing.T) {
	m := NewMachine(Policy{})
	m.SetGroups([]Group{group("a", 1, 2, 3)})
	script(m, "0 silent 1 1")
	m.SetGroups([]Group{group("a", 1, 2, 3, 4), group("b", 1, 2, 3)})
	o, changes := m.Tick(start.Add(time.Second))
	if len(changes) != 0 || len(o.Out) != 1 || o.Out[addr(1)].Until != start.Add(10*time.Second) || o.Out[addr(1)].Reason == "" {
		t.Errorf("%v %v", o, changes)
	}
	m.SetGroups([]Group{group("a", 2, 3)})
	if o, changes := m.Tick(start.Add(2 * time.Second)); len(o.Out) != 0 || len(changes) != 0 {
		t.Errorf("%v %v", o, changes)
	}
	if s := m.Stats(); s.Out != 0 || s.Outs != 1 {
		t.Errorf("%+v", s)
	}
}

// FuzzMachine holds that no script of signs takes out more than may be, and that
// every endpoint that is out is back some time after it answers.
func FuzzMachine(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 250, 13, 26})
	f.Fuzz(func(t *testing.T, script []byte) {
		groups := []Group{group("a", 1, 2, 3, 4), group("b", 3, 4, 5), group("c", 6)}
		m := NewMachine(Policy{})
		m.SetGroups(groups)
		now := start
		check := func() map[netip.AddrPort]proxy.Outage {
			o, _ := m.Tick(now)
			for _, g := range groups {
				in := slices.DeleteFunc(slices.Clone(g.Endpoints), func(a netip.AddrPort) bool { _, out := o.Out[a]; return out })
				if 2*len(in) < len(g.Endpoints) {
					t.Fatalf("only %v of %v are left", in, g.Endpoints)
				}
			}
			return o.Out
		}
		for _, b := range script {
			m.Note(addr(int(b)%7), Sign(b/7%6), now)
			now = now.Add(time.Duration(b/42) * time.Second)
			check()
		}
		for range 40 {
			now = now.Add(10 * time.Second)
			for i := range 7 {
				m.Note(addr(i), Answered, now)
			}
			check()
		}
		if out := check(); len(out) != 0 {
			t.Errorf("still out: %v", out)
		}
	})
}
