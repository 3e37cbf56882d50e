package iptables

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/proxy"
)

// TestRequestRules switches the search for requests on and off: the kernel
// prints the rules back as we write them, a restart writes nothing, and they
// go with the switch and with Cleanup.
func TestRequestRules(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		on := cfg
		on.RequestGroup = 101
		s := overall()
		mustApply(t, New(on), s)
		if rep := mustApply(t, New(on), s); rep.Commits != 0 {
			t.Errorf("a restart writes %+v", rep)
		}
		find := func(text string) (lines []string) {
			for l := range strings.Lines(text) {
				if strings.Contains(l, requestText) || strings.Contains(l, "kp1:request") {
					lines = append(lines, strings.TrimSpace(strings.NewReplacer("-I PREROUTING", "-A PREROUTING", "-I OUTPUT", "-A OUTPUT").Replace(l)))
				}
			}
			slices.Sort(lines)
			return lines
		}
		want, got := find(New(on).Render(s, proxy.Overlay{}).Text()), find(save(t, cfg))
		if d := cmp.Diff(want, got); d != "" || len(got) != 3 {
			t.Errorf("rules (-rendered +saved):\n%s", d)
		}
		mustApply(t, New(cfg), s)
		if left := find(save(t, cfg)); len(left) != 0 {
			t.Errorf("switched off, there are still %q", left)
		}
		b := New(on)
		mustApply(t, b, s)
		if err := b.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := find(save(t, cfg)); len(left) != 0 {
			t.Errorf("cleaned up, there are still %q", left)
		}
	})
}
