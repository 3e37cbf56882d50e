package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/internal/ipset"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube/apiserver"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/bundle"
)

// rulesFlags say where the rules of a node come from, for the verbs that look at
// rules.
type rulesFlags struct {
	files      []string
	ipsets     []string
	nodeIPs    []string
	manifests  string
	kubeconfig string
	node       string
	// both says that rules of iptables and of nft may be given together.
	both bool
}

func (f *rulesFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringArrayVar(&f.files, "rules", nil, "what iptables-save, ip6tables-save or nft list ruleset (with -j or without) printed, or a bug report: a file, or - for stdin; repeatable")
	fl.StringArrayVar(&f.nodeIPs, "node-ip", nil, "an address of the node whose rules these are; give all, where it matters")
	fl.StringVar(&f.manifests, "manifests", "", "folder of Kubernetes YAML with the Services and EndpointSlices")
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "file that says how to reach the API server with them, instead of a folder")
	fl.StringVar(&f.node, "node", "", "name of the node, with --manifests or --kubeconfig (default: the host's)")
	_ = cmd.MarkFlagFilename("rules")
	_ = cmd.MarkFlagFilename("kubeconfig")
	_ = cmd.MarkFlagDirname("manifests")
}

// wanted reports whether it is said where the desired state is.
func (f *rulesFlags) wanted() bool { return f.manifests != "" || f.kubeconfig != "" }

// rulesOf is a node's rules, and what is known around them.
type rulesOf struct {
	program  rulesProgram
	dumps    []xtables.Dump
	nft      *nftables.Program // the same as program, if that is it
	from     string
	addrs    []netip.Addr // nil if unknown
	snapshot *proxy.Snapshot
	notes    []string
	// others says that nftables of others are walked too.
	others bool
}

// rulesProgram is what rules mean, of either kind.
type rulesProgram interface {
	Services() []*liverules.Service
	Mode() proxy.Mode
	Walk(pkt proxy.Packet) proxy.Outcome
}

func (f *rulesFlags) addrs() ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range f.nodeIPs {
		for _, one := range strings.Split(s, ",") {
			a, err := netip.ParseAddr(strings.TrimSpace(one))
			if err != nil {
				return nil, usageErr(fmt.Errorf("--node-ip %q: use an address", one))
			}
			out = append(out, a)
		}
	}
	return out, nil
}

// fromFiles reads what iptables-save printed.
func (f *rulesFlags) fromFiles(ctx context.Context, stdin io.Reader) (*rulesOf, error) {
	r := &rulesOf{others: f.both}
	var err error
	if r.addrs, err = f.addrs(); err != nil {
		return nil, err
	}
	if f.wanted() {
		if r.snapshot, err = f.snapshot(ctx); err != nil {
			return nil, err
		}
		if r.addrs == nil && len(r.snapshot.Node.Addrs) > 0 {
			r.notes = append(r.notes, "the Node object's addresses are taken for all that the node has; --node-ip says otherwise")
			r.addrs = r.snapshot.Node.Addrs
		}
	}
	var names []string
	var nft strings.Builder
	sets := make(ipset.Sets)
	for _, name := range f.files {
		text, saved, err := readRules(name, stdin)
		if err != nil {
			return nil, err
		}
		if name == "-" {
			name = "stdin"
		}
		if err := sets.Read(saved); err != nil {
			return nil, fmt.Errorf("reading sets of %s: %w", name, err)
		}
		names = append(names, name)
		if isNFT(text) {
			nft.WriteString(text + "\n")
			continue
		}
		dumps, err := xtables.ParseDumps(text)
		if err != nil {
			return nil, fmt.Errorf("reading rules of %s: %w", name, err)
		}
		r.dumps = append(r.dumps, dumps...)
	}
	r.from = "the rules of " + strings.Join(names, ", ")
	if nft.Len() > 0 && len(f.ipsets) > 0 {
		return nil, usageErr(errors.New("--ipset goes with rules of iptables: those of nft have their sets in them"))
	}
	if nft.Len() > 0 && len(r.dumps) > 0 && !f.both {
		return nil, usageErr(errors.New("rules of iptables and of nft: which packet meets first is not told by texts; give one kind"))
	}
	rulesets, err := r.pick()
	if err != nil {
		return nil, err
	}
	if nft.Len() > 0 {
		return r, r.readNFT(nft.String(), rulesets)
	}
	for _, name := range f.ipsets {
		saved, err := readInput(name, stdin)
		if err == nil {
			err = sets.Read(string(saved))
		}
		if err != nil {
			return nil, fmt.Errorf("reading sets of %s: %w", name, err)
		}
	}
	cfg := liverules.Config{Addrs: r.addrs, Set: sets.Match}
	r.program = liverules.New(cfg, rulesets...)
	return r, nil
}

// isNFT reports whether a text is what nft prints.
func isNFT(text string) bool {
	text = strings.TrimSpace(text)
	return strings.HasPrefix(text, "table ") || strings.HasPrefix(text, "{")
}

// readNFT takes what nft list ruleset printed, and the rules of iptables beside it.
func (r *rulesOf) readNFT(text string, beside []*xtables.Ruleset) error {
	cfg := nftables.Config{Addrs: r.addrs, Others: r.others}
	if len(beside) > 0 {
		cfg.Beside = liverules.New(liverules.Config{Addrs: r.addrs}, beside...)
	}
	p, err := nftables.Parse(cfg, text)
	if err != nil {
		return err
	}
	r.program, r.nft = p, p
	if len(p.Services()) == 0 && len(beside) == 0 && strings.Contains(text, "KUBE-SERVICES") {
		return errors.New("these are tables of iptables-nft as nft prints them, and it leaves out much of what rules ask for: give what iptables-save prints")
	}
	if n := p.Others(); n > 0 && !r.others {
		r.notes = append(r.notes, fmt.Sprintf("%d tables of others are not walked", n))
	}
	if u := p.Unknown(); len(u) > 0 {
		r.notes = append(r.notes, fmt.Sprintf("%d rules could not be evaluated and are taken not to match, as: %s", len(u), u[0]))
	}
	return nil
}

// readRules reads a file of rules, or those in a bug report, and what ipset save
// printed beside them.
func readRules(name string, stdin io.Reader) (rules, sets string, err error) {
	b, err := readInput(name, stdin)
	if err != nil {
		return "", "", fmt.Errorf("reading rules: %w", err)
	}
	in := bufio.NewReader(bytes.NewReader(b))
	if !bundle.Is(in) {
		if bytes.IndexByte(b, 0) >= 0 {
			return "", "", fmt.Errorf("reading rules: %s is no text: give what iptables-save or nft list ruleset printed, or a bug report (recordings are for kptrace replay)", name)
		}
		rules, sets = ipset.Split(string(b))
		return rules, sets, nil
	}
	report, err := bundle.Read(in)
	if err == nil {
		b, err = report.Rules()
	}
	if err != nil {
		return "", "", fmt.Errorf("reading rules of %s: %w", name, err)
	}
	saved, err := report.File(bundle.IPSets)
	if err != nil {
		saved = nil // a node without ipset, as the report says
	}
	return string(b), string(saved), nil
}

func readInput(name string, stdin io.Reader) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(name)
}

// pick takes one ruleset of each family: of two flavours the one with Services.
// The other one's rules count too, but which packet meets them first is not told
// by a text; what is there is said.
func (r *rulesOf) pick() ([]*xtables.Ruleset, error) {
	var out []*xtables.Ruleset
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		var best *xtables.Dump
		for i := range r.dumps {
			d := &r.dumps[i]
			r.notes = append(r.notes, d.Warnings...)
			if d.Family != family {
				continue
			}
			switch {
			case best == nil:
				best = d
			case best.Flavour == d.Flavour:
				return nil, usageErr(fmt.Errorf("two rulesets of %v %v: give those of one node", family, d.Flavour))
			default:
				other := d
				if len(xtables.LiveKube(d.Rules)) > len(xtables.LiveKube(best.Rules)) {
					best, other = d, best
				}
				if len(xtables.LiveKube(other.Rules)) > 0 {
					r.notes = append(r.notes, fmt.Sprintf("both flavours have live rules of a kube-proxy (%v): those of %v are shown, kptrace check says more", family, best.Flavour))
				} else if other.Rules.Rules() > 0 {
					r.notes = append(r.notes, fmt.Sprintf("%v has %d rules too (%v), which are not walked here", other.Flavour, other.Rules.Rules(), family))
				}
			}
		}
		if best != nil {
			out = append(out, best.Rules)
		}
	}
	return out, nil
}

func (f *rulesFlags) snapshot(ctx context.Context) (*proxy.Snapshot, error) {
	name, err := nodeName(f.node)
	if err != nil {
		return nil, err
	}
	state, err := openState(f.manifests, apiserver.Config{Kubeconfig: f.kubeconfig, NodeName: name, Logger: newLogger(io.Discard, "text", slog.LevelError)})
	if err != nil {
		return nil, err
	}
	return state.load(ctx)
}

// desired renders what kptrace would write.
func (f *rulesFlags) desired(ctx context.Context) (*rulesOf, error) {
	s, err := f.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	r := &rulesOf{snapshot: s, from: "the rules that kptrace would write for " + cmp.Or(f.manifests, "the API server")}
	if r.addrs, err = f.addrs(); err != nil {
		return nil, err
	}
	if r.addrs == nil {
		r.addrs = s.Node.Addrs
	}
	var rulesets []*xtables.Ruleset
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		program := iptables.New(iptables.Config{Family: family, LocalhostNodePorts: true}).Render(s, proxy.Overlay{})
		rs, err := xtables.Parse(family, program.Text())
		if err != nil {
			return nil, fmt.Errorf("reading our own rules: %w", err)
		}
		rulesets = append(rulesets, rs)
	}
	r.program = liverules.New(liverules.Config{Addrs: r.addrs}, rulesets...)
	return r, nil
}

// clients reads --from: an address, pod/x, or node. A pod or node may have several
// addresses.
func (r *rulesOf) clients(from, namespace string) (a []netip.Addr, node bool, err error) {
	if from == "node" {
		if len(r.addrs) == 0 {
			return nil, false, errors.New("--from node: say by --node-ip which address the node has")
		}
		return r.addrs, true, nil
	}
	if a, err := netip.ParseAddr(from); err == nil {
		return []netip.Addr{a}, false, nil
	}
	sel, err := trace.ParseSelector(from, namespace)
	if err != nil || sel.Kind != trace.SelectPod {
		return nil, false, fmt.Errorf("--from %q: use an address, pod/NAME, or node", from)
	}
	if r.snapshot == nil {
		return nil, false, fmt.Errorf("--from %s: rules know addresses only: give the pod's, or --manifests with the Pod in it, or --kubeconfig", from)
	}
	if addrs := r.snapshot.PodAddrs(sel.Namespace, sel.Name); len(addrs) > 0 {
		return addrs, false, nil
	}
	return nil, false, fmt.Errorf("--from %s: there is no such pod in namespace %s", from, sel.Namespace)
}

// talk says on stderr what a reader of the table has to know.
func (r *rulesOf) talk(w io.Writer) {
	for _, n := range r.notes {
		fmt.Fprintln(w, "note:", n)
	}
}

// nothing says why a table is empty.
func (r *rulesOf) nothing() error {
	switch r.program.Mode() {
	case proxy.IPVS:
		return errors.New("these are the rules of a kube-proxy in ipvs mode: which endpoints a Service has is not in them but in IPVS (ipvsadm -Ln)")
	case proxy.Userspace:
		return errors.New("these are the rules of a kube-proxy in userspace mode: which endpoints a Service has only that process knows")
	case proxy.IPTables, proxy.NFTables:
		return errors.New("there are chains of a kube-proxy, and no Service in them")
	}
	return errors.New("there are no rules of a kube-proxy in iptables mode here: is it the other flavour (iptables-legacy-save, iptables-nft-save), nftables mode (nft list ruleset), or does something else handle Services (Cilium, Calico eBPF)?")
}

// unknown says which Services there are, or which ports one has.
func (r *rulesOf) unknown(ns, name string, ports []string) error {
	var names, has []string
	for _, s := range r.program.Services() {
		names = append(names, s.Name.Namespace+"/"+s.Name.Name)
		if s.Name.Name == name && (ns == "" || s.Name.Namespace == ns) {
			has = append(has, cmp.Or(s.Name.Port, "one without a name"))
		}
	}
	full := name
	if ns != "" {
		full = ns + "/" + name
	}
	switch near := trace.Similar(full, names); {
	case len(names) == 0:
		return r.nothing()
	case name == "":
		return noneOf(ns, ports)
	case len(has) > 0:
		return fmt.Errorf("no port %s of Service %s in these rules: it has %s", strings.Join(ports, " or "), full, strings.Join(slices.Compact(has), ", "))
	case len(near) > 0:
		return fmt.Errorf("no Service %s in these rules: did you mean %s?", full, strings.Join(near, ", "))
	}
	return fmt.Errorf("no Service %s in these rules; without svc/NAME they are all listed", full)
}

// noneOf says that rules know no Service of a namespace, empty for all, and with ports.
func noneOf(ns string, ports []string) error {
	which := ""
	if ns != "" {
		which = " of namespace " + ns
	}
	if len(ports) > 0 {
		which += " with port " + strings.Join(ports, " or ")
	}
	return fmt.Errorf("there is no Service%s in these rules; without -n and --port all are listed", which)
}
