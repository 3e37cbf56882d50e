package proxytest

import (
	"slices"

	"github.com/kptrace/kptrace/proxy"
)

// Relayed is a table for a mode that relays connections itself: whoever dials,
// endpoints see the node as their client, for the reason given.
func Relayed(cases []Case, why string) []Case {
	cases = slices.Clone(cases)
	for i := range cases {
		cases[i].Rows = slices.Clone(cases[i].Rows)
		for j := range cases[i].Rows {
			if w := &cases[i].Rows[j].Want; w.Verdict == proxy.Forward {
				w.Masquerade = why
			}
		}
	}
	return cases
}
