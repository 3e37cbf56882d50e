//go:build e2e

package e2e

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/xtables"
)

// mutation spoils rules that were identical before. It gets the lines of
// iptables-save and the first one that its pattern finds.
type mutation struct {
	name, pattern string
	spoil         func(lines []string, at int) []string
	// want is in what compare must say, beside the line itself.
	want string
}

func mutations() []mutation {
	replace := func(pattern, by string) func([]string, int) []string {
		return func(lines []string, at int) []string {
			lines[at] = regexp.MustCompile(pattern).ReplaceAllString(lines[at], by)
			return lines
		}
	}
	remove := func(lines []string, at int) []string { return slices.Delete(lines, at, at+1) }
	swap := func(lines []string, at int) []string {
		lines[at], lines[at+1] = lines[at+1], lines[at]
		return lines
	}
	insert := func(line string) func([]string, int) []string {
		return func(lines []string, at int) []string { return slices.Insert(lines, at, line) }
	}
	return []mutation{
		{"order of endpoints", `^-A KUBE-SVC-.*shop/many:http -> 10.244.2.11:`, swap, "another order"},
		{"order of affinity", `^-A KUBE-SVC-.*shop/affinity:http -> 10.244.2.10:.*recent`, swap, "another order"},
		{"balancing before affinity", `^-A KUBE-SVC-.*shop/affinity:http -> 10.244.2.10:.*statistic`, func(lines []string, at int) []string {
			line := lines[at]
			return slices.Insert(slices.Delete(lines, at, at+1), at-2, line)
		}, "another order"},
		{"probability", `--probability 0.25`, replace(`0\.25\d*`, "0.26000000000"), "upstream only"},
		{"mark", `^-A KUBE-MARK-MASQ .*0x4000/0x4000`, replace("0x4000/0x4000", "0x8000/0x8000"), "upstream only"},
		{"missing hairpin masquerade", `^-A KUBE-SEP-.*-j KUBE-MARK-MASQ`, remove, "upstream only"},
		{"missing masquerade of outside clients", `^-A KUBE-EXT-.*masquerade traffic for`, remove, "upstream only"},
		{"missing masquerade of clients that are no pods", `^-A KUBE-SVC-.*! -s 10.244.0.0/16|^-A KUBE-SVC-\S+ ! -s 10.244`, remove, "upstream only"},
		{"node ports not last", `^-A KUBE-SERVICES .*-j KUBE-NODEPORTS`, func(lines []string, at int) []string {
			line := lines[at]
			return slices.Insert(slices.Delete(lines, at, at+1), at-1, line)
		}, "another order"},
		{"dispatch to another Service", `^-A KUBE-SERVICES .*shop/one:http cluster IP`, replace(`-j KUBE-SVC-\w+`, "-j KUBE-SVC-AAAAAAAAAAAAAAAA"), "upstream only"},
		{"dispatch missing", `^-A KUBE-SERVICES .*shop/one:http cluster IP`, remove, "upstream only"},
		{"endpoint's port", `-j DNAT --to-destination`, replace(`(--to-destination [\d.]+:)\d+`, "${1}1"), "upstream only"},
		{"source range", `^-A KUBE-FW-.*-s 203.0.113.7/32`, replace("203.0.113.7/32", "203.0.113.0/24"), "upstream only"},
		{"source range missing its end", `^-A KUBE-PROXY-FIREWALL .*-j DROP`, remove, "upstream only"},
		{"affinity timeout", `--rcheck --seconds 600 `, replace("600", "601"), "upstream only"},
		{"affinity list", `--set --name KUBE-SEP-`, replace("--name KUBE-SEP-.", "--name KUBE-SEP-_"), "upstream only"},
		{"drop for reject", `has no endpoints.*-j REJECT`, replace("-j REJECT .*", "-j DROP"), "upstream only"},
		{"jump missing", `^-A OUTPUT .*-j KUBE-SERVICES`, remove, "upstream only"},
		{"jump to the wrong place", `^-A OUTPUT .*-j KUBE-SERVICES`, replace("^-A OUTPUT", "-A INPUT"), "ours only"},
		{"policy", `^:FORWARD ACCEPT`, replace("ACCEPT", "DROP"), "policy"},
		{"additional rule", `^-A KUBE-FORWARD`, insert("-A KUBE-FORWARD -p udp -j ACCEPT"), "ours only"},
		{"the same rule twice", `^-A KUBE-NODEPORTS`, func(lines []string, at int) []string {
			return slices.Insert(lines, at, lines[at])
		}, "ours only"},
		{"additional chain", `^:KUBE-MARK-MASQ`, insert(":KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]"), "upstream has no such chain"},
		{"canary missing", `^:KUBE-PROXY-CANARY`, remove, "ours has no such chain"},
		{"NFLOG that is not ours", `^-A KUBE-FORWARD`, insert("-A KUBE-FORWARD -j NFLOG --nflog-prefix kp2:x --nflog-group 100"), "ours only"},
		{"jump to a chain like ours", `^-A KUBE-FORWARD`, insert("-A KUBE-FORWARD -j KUBE-FIREWALL"), "ours only"},
		{"localnet guard", `block incoming localnet`, replace("127.0.0.0/8", "127.0.0.0/16"), "upstream only"},
		{"invalid packets pass", `^-A KUBE-FORWARD .*--ctstate INVALID`, replace("DROP", "ACCEPT"), "upstream only"},
		{"random ports", `-j MASQUERADE --random-fully`, replace(" --random-fully", ""), "upstream only"},
	}
}

// checkMutations spoils the text of identical IPv4 rules in each way and holds
// it against what it was; each must be found, and nothing else.
func checkMutations(t *testing.T, text string) {
	parse := func(lines []string) *xtables.Ruleset {
		rs, err := xtables.Parse(xtables.IPv4, strings.Join(lines, "\n"))
		if err != nil {
			t.Fatal(err)
		}
		return rs
	}
	lines := strings.Split(text, "\n")
	if c := compare(parse(lines), strip(parse(lines))); len(c.differences) > 0 {
		t.Fatalf("a difference to itself: %s", c)
	}
	all := mutations()
	for _, m := range all {
		at := slices.IndexFunc(lines, regexp.MustCompile(m.pattern).MatchString)
		if at < 0 {
			t.Errorf("%s: no rule to spoil", m.name)
			continue
		}
		spoiled := m.spoil(slices.Clone(lines), at)
		if slices.Equal(spoiled, lines) {
			t.Errorf("%s: nothing was spoiled", m.name)
			continue
		}
		c := compare(parse(spoiled), strip(parse(lines)))
		if len(c.differences) == 0 || len(c.differences) > 3 || !strings.Contains(c.String(), m.want) {
			t.Errorf("%s: %d differences, want one or a few with %q:\n%s", m.name, len(c.differences), m.want, c)
		}
	}
	if !t.Failed() {
		t.Logf("%d mutations, each reported", len(all))
	}
}
