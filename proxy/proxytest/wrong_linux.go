package proxytest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
)

// WrongRule is a mistake in live rules: what to look for in a chain whose name begins
// with Chain, and what stands there instead, "" being nothing. With Find empty Instead
// is a rule of somebody else at the head.
type WrongRule struct{ Name, Table, Chain, Find, Instead string }

// WrongRules are one for each thing that can go wrong with the rules of a kube-proxy
// in iptables mode, where the Service shop/web:p is at 10.96.3.10:80 with three
// endpoints.
func WrongRules() []WrongRule {
	return []WrongRule{
		{"DNAT to another port", "nat", "KUBE-SEP-", "--to-destination 10.244.1.2:8080", "--to-destination 10.244.1.2:8443"},
		{"DNAT to another endpoint", "nat", "KUBE-SEP-", "--to-destination 10.244.1.2:8080", "--to-destination 10.244.2.2:8080"},
		{"no DNAT", "nat", "KUBE-SEP-", "-j DNAT", ""},
		{"odds of the first pick", "nat", "KUBE-SVC-", "--probability 0.33333", "--probability 0.9"},
		{"odds of the second pick", "nat", "KUBE-SVC-", "--probability 0.50000", "--probability 0.9"},
		{"an endpoint is skipped", "nat", "KUBE-SVC-", "--probability 0.33333", ""},
		{"no masquerade of outside clients", "nat", "KUBE-SVC-", "-j KUBE-MARK-MASQ", ""},
		{"another mark", "nat", "KUBE-MARK-MASQ", "0x4000/0x4000", "0x8000/0x8000"},
		{"the mark is not looked for", "nat", "KUBE-POSTROUTING", "-j RETURN", ""},
		{"another service port", "nat", "KUBE-SERVICES", "--dport 80 -j", "--dport 81 -j"},
		{"another service address", "nat", "KUBE-SERVICES", "-d 10.96.3.10/32", "-d 10.96.3.99/32"},
		{"somebody accepts it before", "nat", "PREROUTING", "", "-j ACCEPT"},
		{"somebody drops it", "filter", "FORWARD", "", "-p tcp -m tcp --dport 8080 -j DROP"},
		{"not tracked", "raw", "PREROUTING", "", "-p tcp -m tcp --dport 80 -j CT --notrack"},
		{"the jump to the service chains is gone", "nat", "PREROUTING", "-j KUBE-SERVICES", ""},
	}
}

// Mutate changes the first rule that fits in the node's live rules. undo takes back a
// rule of somebody else, and nothing of the proxy's.
func (w *World) Mutate(t *testing.T, fl xtables.Flavour, m WrongRule) (undo func()) {
	t.Helper()
	tools := xtables.Tools{Netns: w.Node.Fd()}
	run := func(args ...string) {
		t.Helper()
		_, err := exec.Run(t.Context(), exec.Spec{
			Path: "sh", Args: append([]string{"-c", `exec "$0" "$@"`, xtables.Program(fl, xtables.IPv4, "")}, args...), Netns: w.Node.Fd(),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if m.Find == "" {
		rule := strings.Fields(m.Instead)
		run(slices.Concat([]string{"-w", "-t", m.Table, "-I", m.Chain}, rule)...)
		return func() { run(slices.Concat([]string{"-w", "-t", m.Table, "-D", m.Chain}, rule)...) }
	}
	have, err := tools.Save(t.Context(), fl, xtables.IPv4, m.Table, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range have.Table(m.Table).Chains {
		if !strings.HasPrefix(c.Name, m.Chain) {
			continue
		}
		// A chain of one Service is that of shop/web, where its rules say so.
		other := func(r *xtables.Rule) bool {
			s := r.Comment()
			return strings.HasPrefix(s, "shop/") && !strings.HasPrefix(s, "shop/web:p")
		}
		for i, r := range c.Rules {
			text := r.String()
			if !strings.Contains(text, m.Find) || other(r) {
				continue
			}
			at := strconv.Itoa(i + 1)
			if m.Instead == "" {
				run("-w", "-t", m.Table, "-D", c.Name, at)
				return func() {}
			}
			wrong := strings.Replace(text, m.Find, m.Instead, 1)
			if strings.Contains(m.Find, "--probability") { // the digits behind
				words := strings.Fields(wrong)
				for j := range words {
					if words[j] == "--probability" {
						words[j+1] = strings.Fields(m.Instead)[1]
					}
				}
				wrong = strings.Join(words, " ")
			}
			run("-w", "-t", m.Table, "-D", c.Name, at)
			// The shell takes the rule apart as iptables printed it.
			_, err := exec.Run(t.Context(), exec.Spec{Path: "sh", Args: []string{"-c", fmt.Sprintf("%s -w -t %s -I %s %s %s",
				xtables.Program(fl, xtables.IPv4, ""), m.Table, c.Name, at, wrong)}, Netns: w.Node.Fd()})
			if err != nil {
				t.Fatal(err)
			}
			return func() {}
		}
	}
	t.Fatalf("no rule with %q in %s %s", m.Find, m.Table, m.Chain)
	return nil
}
