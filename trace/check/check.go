// Package check compares what a node should have in its kernel with what it has,
// and says what is wrong: Services and endpoints missing from the rules or left in
// them, odds that are not what they should be, rules of others in the way, two
// proxies at once, settings and tables that break Services.
//
// It is pure: [Run] looks at a [State] that others have read, all of it or the
// part that is known, such as the text of an iptables-save and nothing else. It
// reports nothing on a healthy node.
package check

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/dataplane"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
)

// Severity says how bad a Finding is.
type Severity string

// The severities.
const (
	// Breaks: connections fail because of it, now.
	Breaks Severity = "breaks"
	// Risk: connections will fail if something else happens, or some do.
	Risk Severity = "risk"
	// Note: worth knowing, and perhaps intended.
	Note Severity = "note"
)

func (s Severity) rank() int { return slices.Index([]Severity{Breaks, Risk, Note}, s) }

// Finding is one thing that is not as it should be.
type Finding struct {
	// Code is stable; Codes lists all.
	Code     string   `json:"code"`
	Severity Severity `json:"severity"`
	// Object is what it is about: "shop/foo:http", "filter/FORWARD",
	// "net.ipv4.ip_forward".
	Object string `json:"object"`
	// Message says in one sentence what is wrong, and Fix what to do.
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
	// Owner is whose rule is in the way, if it is that.
	Owner string `json:"owner,omitempty"`
	// Evidence is what shows it: rules, entries, values.
	Evidence []string `json:"evidence,omitempty"`
	// Ours says that it is about what our own proxy wrote, so that its repair is
	// ours too.
	Ours bool `json:"ours,omitempty"`
}

// State is what is known of a node. Every field may be zero, which leaves out
// what depends on it.
type State struct {
	Node string
	// Dumps are the live rules of all families and flavours.
	Dumps []xtables.Dump
	// NFT is what the tables of a kube-proxy in nftables mode mean, nil if they were
	// not read. It must not have another user meanwhile.
	NFT *nftables.Program
	// Part, if set, says of which Services Dumps and Snapshot are: what is of others
	// was left out.
	Part func(proxy.PortName) bool
	// Snapshot is what the API says, and Overlay what is out for a time.
	Snapshot *proxy.Snapshot
	Overlay  proxy.Overlay
	// Program is what our own proxy wants in the kernel, nil if another proxy
	// runs here or none.
	Program proxy.Program
	// Addrs are the node's own addresses; nil if they are not known.
	Addrs []netip.Addr
	// Synced is when our own proxy last wrote to the kernel, Wanted when the
	// oldest change came that is not there yet, and SyncError what went wrong.
	Synced, Wanted time.Time
	SyncError      string
	// Now is the time of the look.
	Now time.Time
	// Entries are connection tracking's, and Counters its counters.
	Entries  []conntrack.Flow
	Counters *conntrack.Stats
	// Frontends says where UDP clients are led: to the endpoints of the Snapshot if
	// it is nil, and to the proxy's own ports in userspace mode, where only the
	// proxy itself knows them.
	Frontends conntrack.Frontends
	// Sysctls are settings below /proc/sys by name, as "net/ipv4/ip_forward".
	Sysctls map[string]string
	// Links are the names of the node's interfaces, Bridges those that are
	// bridges.
	Links, Bridges []string
	// Lists says for each list of xt_recent how many clients it holds; ListMax is
	// how many it can hold.
	Lists   map[string]int
	ListMax int
	// NFTables are the tables of nf_tables, as "ip kube-proxy", and VirtualServers
	// how many IPVS has.
	NFTables       []string
	VirtualServers int
	// Balanced are their servers.
	Balanced []Balanced
	// Planes tell of others that may handle Services, Flowtables carry established
	// connections past all rules.
	Planes     []dataplane.Sign
	Flowtables []string
	// Listeners hold NFLOG groups. PID is the kptrace that runs here, 0 if none
	// does.
	Listeners []Listener
	PID       int
}

// Options choose among findings.
type Options struct {
	// Ignore are patterns CODE or CODE:OBJECT, with * for any text, of findings
	// that are known and accepted.
	Ignore []string
}

// Run looks at a State. The Findings are ordered: the worst first, then by code
// and object.
func Run(s *State, o Options) []Finding {
	c := &checker{State: s}
	c.rulesets()
	c.tablesOfNFT()
	c.services()
	c.exact()
	c.settings()
	c.forwarding()
	c.tables()
	c.neighbours()
	c.findings = slices.DeleteFunc(c.findings, func(f Finding) bool { return o.ignores(&f) })
	slices.SortStableFunc(c.findings, func(a, b Finding) int {
		return cmp.Or(a.Severity.rank()-b.Severity.rank(), strings.Compare(a.Code, b.Code), strings.Compare(a.Object, b.Object))
	})
	return c.findings
}

// Broken reports whether any finding breaks traffic.
func Broken(fs []Finding) bool {
	return slices.ContainsFunc(fs, func(f Finding) bool { return f.Severity == Breaks })
}

// Validate reports an Ignore pattern that no code can match.
func (o *Options) Validate() error {
	for _, p := range o.Ignore {
		code, _, _ := strings.Cut(p, ":")
		if _, err := path.Match(code, ""); err != nil {
			return fmt.Errorf("check: bad pattern %q", p)
		}
		if !slices.ContainsFunc(Codes(), func(c Code) bool { ok, _ := path.Match(code, c.Name); return ok }) {
			return fmt.Errorf("check: no finding is called %q: kptrace check --list-codes names them", code)
		}
	}
	return nil
}

func (o *Options) ignores(f *Finding) bool {
	for _, p := range o.Ignore {
		code, object, has := strings.Cut(p, ":")
		if ok, _ := path.Match(code, f.Code); !ok {
			continue
		}
		if !has || glob(object, f.Object) {
			return true
		}
	}
	return false
}

// glob matches * with any text, slashes too.
func glob(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	if !strings.HasPrefix(s, parts[0]) {
		return false
	}
	s = s[len(parts[0]):]
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(s, p)
		if i < 0 {
			return false
		}
		s = s[i+len(p):]
	}
	return strings.HasSuffix(s, parts[len(parts)-1])
}

type checker struct {
	*State
	findings []Finding
	// live are the rules of the flavour that serves, of both families, and picked
	// the dumps they are from.
	live   *liverules.Program
	picked []*xtables.Dump
	// assumed is live for a node whose addresses are not known, with one that
	// stands for all.
	assumed *liverules.Program
}

func (c *checker) add(code, object, fix, format string, args ...any) *Finding {
	if c.Program != nil && strings.HasPrefix(fix, "restart kube-proxy") {
		fix = "kptrace check --fix writes the rules again; kptrace status says what keeps the proxy from it"
	}
	c.findings = append(c.findings, Finding{Code: code, Severity: severity(code), Object: object, Fix: fix, Message: fmt.Sprintf(format, args...)})
	return &c.findings[len(c.findings)-1]
}
