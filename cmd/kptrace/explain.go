package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// explainFlags are the flags of kptrace explain.
type explainFlags struct {
	rules         rulesFlags
	packet, from  string
	namespace     string
	allNamespaces bool
	ports         []string
	in            string
	all           bool
	output        string
	sockets       []string
}

func newExplainCmd() *cobra.Command {
	var f explainFlags
	cmd := &cobra.Command{
		Use:   "explain [svc/NAME]",
		Short: "Predict the way of a packet: endpoints, odds, rules, verdict",
		Long: `Predict the way of a packet through the rules of a node: which Service it is
for, which endpoints it can reach and with what odds, whether its source is
replaced, what becomes of it, and by which rules.

Rules come from what iptables-save printed (--rules FILE, or - for stdin): any
kube-proxy in iptables mode, either flavour, with whatever else is in the
tables; or from what nft list ruleset printed: a kube-proxy in nftables mode,
whose own tables are walked. That needs no root, no cluster, and works on any OS.
With --manifests or --kubeconfig, and no --rules, they are those that kptrace would
write for a folder of YAML or for what an API server says; with both, that gives
names and says of each endpoint that is no candidate why. With neither, the nodes
that run here are asked, each for its live rules and sets.

Without a packet, a Service or a client: a table of every Service, its endpoints and
odds; of the live rules of the nodes that run here where nothing else is said.

Nothing is guessed. What a text cannot tell (sets, sockets, which addresses are
the node's) is reported as not evaluated, and if it matters the answer is given
for both cases. --ipset gives the sets, as ipset save printed them; --node-ip says
which addresses are the node's own.

Odds are those of a client without a session affinity entry, unless a kptrace that
runs on the node is asked: that looks into the kernel's lists of clients.

Exit codes: 0, 1 for an error, 2 for wrong usage, 3 if rules lead nowhere.`,
		Example: `  # Every Service of a node, its endpoints and their odds
  ssh node iptables-save | kptrace explain --rules -

  # The same of a kube-proxy in nftables mode
  ssh node nft list ruleset | kptrace explain --rules -

  # One packet through those rules
  ssh node iptables-save | kptrace explain --rules - --packet tcp:10.244.1.2:40000-10.96.0.10:80

  # With the sets that NetworkPolicies ask for
  ssh node 'iptables-save; ipset save' | kptrace explain --rules - --packet tcp:10.244.1.2:40000-10.96.0.10:80

  # A Service by name, from one client, as JSON with path and odds
  kptrace explain svc/foo -n shop --from 10.244.1.2 --rules node1.rules -o json

  # The table by the live rules of the nodes that run here
  kptrace explain

  # One Service by them
  kptrace explain svc/foo -n shop --from pod/web

  # What kptrace would do with it, with the names of pods and who is excluded and why
  kptrace explain svc/foo -n shop --from pod/web --manifests ./state --node node1`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErr(fmt.Errorf("one Service at a time: %q is one too many", args[1]))
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"svc/"}, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	fl := cmd.Flags()
	fl.SortFlags = false
	f.rules.add(cmd)
	fl.StringArrayVar(&f.rules.ipsets, "ipset", nil, "what ipset save printed on that node: a file, or - for stdin; repeatable")
	_ = cmd.MarkFlagFilename("ipset")
	fl.StringVar(&f.packet, "packet", "", "packet to walk, as tcp:10.244.1.2:40000-10.96.0.10:80")
	fl.StringVar(&f.from, "from", "", "client of svc/NAME: an address, pod/x, or node for the node itself")
	fl.StringArrayVar(&f.ports, "port", nil, "only this Service port, by number or name")
	fl.StringVarP(&f.namespace, "namespace", "n", cmp.Or(os.Getenv("KPTRACE_NAMESPACE"), "default"), "namespace of the Service ($KPTRACE_NAMESPACE)")
	fl.BoolVarP(&f.allNamespaces, "all-namespaces", "A", false, "all namespaces (the default of the table)")
	fl.StringVar(&f.in, "in", "", "interface the packet comes in by, where rules ask for it")
	fl.BoolVar(&f.all, "all", false, "print the rules of every endpoint's way, not only of one")
	fl.StringVarP(&f.output, "output", "o", "text", "text or json")
	addSocketFlag(cmd, &f.sockets)
	completeFrom(cmd, "output", []string{"text", "json"})
	return cmd
}

func (f *explainFlags) run(cmd *cobra.Command, args []string) error {
	if err := textOrJSON(f.output); err != nil {
		return err
	}
	switch {
	case f.packet != "" && (len(args) > 0 || f.from != ""):
		return usageErr(errors.New("--packet names both ends: it does not go with svc/NAME or --from"))
	case f.from != "" && len(args) == 0:
		return usageErr(errors.New("--from goes with svc/NAME"))
	case len(f.rules.ipsets) > 0 && len(f.rules.files) == 0:
		return usageErr(errors.New("--ipset goes with --rules: a kptrace that runs on the node reads the kernel's own sets"))
	case slices.Contains(f.rules.ipsets, "-") && slices.Contains(f.rules.files, "-"):
		return usageErr(errors.New("--rules - and --ipset -: there is one stdin; give both texts one after the other to --rules -"))
	}
	ns := ""
	if cmd.Flags().Changed("namespace") || len(args) > 0 && !f.allNamespaces {
		ns = f.namespace
	}
	var svc string
	if len(args) > 0 {
		sel, err := trace.ParseResource(args[0], ns)
		if err != nil {
			return usageErr(err)
		}
		if sel.Kind != trace.SelectService {
			return usageErr(fmt.Errorf("%s is no Service: use svc/NAME", args[0]))
		}
		svc, ns = sel.Name, sel.Namespace
		if sel.Port != (trace.Port{}) {
			f.ports = append(f.ports, sel.Port.String())
		}
	}
	for _, p := range f.ports {
		if _, err := trace.ParsePort(p); err != nil {
			return usageErr(fmt.Errorf("--port: %w", err))
		}
	}
	if len(f.rules.files) == 0 && !f.rules.wanted() {
		clients, err := connect(cmd.Context(), f.sockets, false, cmd.ErrOrStderr())
		if err == nil {
			defer closeAll(clients)
			return f.ask(cmd, clients, ns, svc)
		}
		if !errors.Is(err, relay.ErrNotRunning) || len(f.sockets) > 0 {
			return err
		}
		return usageErr(fmt.Errorf("%w; or say where rules come from: --rules FILE (what iptables-save printed; - is stdin), or --manifests DIR or --kubeconfig FILE for what kptrace would write", err))
	}
	live, err := f.rules.load(cmd.Context(), cmd.InOrStdin())
	if err != nil {
		return err
	}
	services := f.choose(live.program.Services(), ns, svc)
	if len(services) == 0 && (ns != "" || svc != "" || len(f.ports) > 0) {
		return live.unknown(ns, svc, f.ports)
	}
	if f.packet == "" && f.from == "" {
		if len(services) == 0 {
			return live.nothing()
		}
		if f.output != "json" {
			live.talk(cmd.ErrOrStderr())
		}
		return f.tables(cmd, []servicesOf{{live.from, live.program.Mode(), services, live.snapshot}})
	}
	var packets []proxy.Packet
	if f.packet != "" {
		pkt, err := parsePacket(f.packet)
		if err != nil {
			return usageErr(fmt.Errorf("--packet: %w", err))
		}
		packets = []proxy.Packet{pkt}
	} else if packets, err = f.packets(live, services); err != nil {
		return usageErr(err)
	}
	return f.answer(cmd, live, packets)
}

// choose picks Services by namespace, name and port.
func (f *explainFlags) choose(all []*liverules.Service, ns, svc string) []*liverules.Service {
	var out []*liverules.Service
	for _, s := range all {
		if ns != "" && s.Name.Namespace != ns || svc != "" && s.Name.Name != svc {
			continue
		}
		if len(f.ports) > 0 && !slices.ContainsFunc(f.ports, func(p string) bool {
			return p == s.Name.Port || slices.ContainsFunc(s.Fronts, func(x liverules.Front) bool { return p == strconv.Itoa(int(x.Port)) })
		}) {
			continue
		}
		out = append(out, s)
	}
	return out
}

// servicesOf are the Services that the rules of one node know.
type servicesOf struct {
	rules    string // which they are
	mode     proxy.Mode
	services []*liverules.Service
	snapshot *proxy.Snapshot
}

// tables prints a table for each node, and ends with exitProblem if rules lead nowhere.
func (f *explainFlags) tables(cmd *cobra.Command, all []servicesOf) error {
	var docs []text.RulesJSON
	bad := false
	for _, of := range all {
		for _, s := range of.services {
			bad = bad || slices.ContainsFunc(s.Fronts, func(x liverules.Front) bool { return x.Missing > 0 || x.Verdict == proxy.Pass })
		}
		docs = append(docs, text.ToRulesJSON(of.mode, of.services, of.snapshot))
		if f.output != "json" {
			if len(all) > 1 {
				fmt.Fprintln(cmd.OutOrStdout(), of.rules)
			}
			if err := text.Rules(cmd.OutOrStdout(), of.services, of.snapshot); err != nil {
				return err
			}
		}
	}
	if f.output == "json" {
		if err := printOneOrAll(cmd.OutOrStdout(), docs); err != nil {
			return err
		}
	}
	if bad {
		return &exitCodeError{code: exitProblem}
	}
	return nil
}

// askTables asks nodes that run here which Services their live rules know.
func (f *explainFlags) askTables(cmd *cobra.Command, clients []*relay.Client, ns string) error {
	var all []servicesOf
	var missing error
	found := 0
	for _, c := range clients {
		r, err := c.Services(cmd.Context(), relay.ServicesRequest{Namespace: ns})
		if errors.Is(err, relay.ErrNotFound) {
			missing = cmp.Or(missing, err)
			continue
		}
		if err != nil {
			return err
		}
		of := servicesOf{r.Rules, r.Mode, f.choose(r.Services, ns, ""), r.Snapshot}
		found += len(of.services)
		if len(clients) == 1 {
			fmt.Fprintln(cmd.ErrOrStderr(), r.Rules)
		}
		for _, n := range r.Notes {
			fmt.Fprintln(cmd.ErrOrStderr(), "note:", n)
		}
		all = append(all, of)
	}
	switch {
	case len(all) == 0:
		return missing
	case missing != nil:
		fmt.Fprintln(cmd.ErrOrStderr(), "note:", missing)
	}
	if found == 0 {
		return noneOf(ns, f.ports)
	}
	return f.tables(cmd, all)
}

// packets makes one packet for each address of the Services.
func (f *explainFlags) packets(live *rulesOf, services []*liverules.Service) ([]proxy.Packet, error) {
	sources, fromNode, err := live.clients(f.from, f.namespace)
	if err != nil {
		return nil, err
	}
	var out []proxy.Packet
	for _, s := range services {
		for i := range s.Fronts {
			x := &s.Fronts[i]
			dst := x.Addr
			if !dst.IsValid() {
				j := slices.IndexFunc(live.addrs, func(a netip.Addr) bool { return a.Is6() == s.IP6 })
				if j < 0 {
					continue // no address of the node to send to
				}
				dst = live.addrs[j]
			}
			j := slices.IndexFunc(sources, func(a netip.Addr) bool { return a.Is6() == dst.Is6() })
			if j < 0 {
				continue
			}
			out = append(out, proxy.Packet{Proto: s.Name.Proto, Src: netip.AddrPortFrom(sources[j], 40000),
				Dst: netip.AddrPortFrom(dst, x.Port), FromNode: fromNode, In: f.in})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the Service has no address of the family of %s", sources[0])
	}
	return out, nil
}

// ask asks nodes that run here; each answers by its own live rules.
func (f *explainFlags) ask(cmd *cobra.Command, clients []*relay.Client, ns, svc string) error {
	req := relay.ExplainRequest{Namespace: ns, Service: svc, Ports: f.ports, In: f.in}
	switch {
	case f.packet != "":
		pkt, err := parsePacket(f.packet)
		if err != nil {
			return usageErr(fmt.Errorf("--packet: %w", err))
		}
		pkt.In = f.in
		req.Packet = &pkt
	case svc == "":
		return f.askTables(cmd, clients, ns)
	case f.from == "node":
		req.FromNode = true
	case f.from != "":
		if a, err := netip.ParseAddr(f.from); err == nil {
			req.From = a
			break
		}
		sel, err := trace.ParseSelector(f.from, f.namespace)
		if err != nil || sel.Kind != trace.SelectPod {
			return usageErr(fmt.Errorf("--from %q: use an address, pod/NAME, or node", f.from))
		}
		req.FromPod = relay.PodName{Namespace: sel.Namespace, Name: sel.Name}
	}
	var all []explain.Answer
	var missing error
	for _, c := range clients {
		answers, err := c.Explain(cmd.Context(), req)
		if errors.Is(err, relay.ErrNotFound) || errors.Is(err, relay.ErrNoDecisions) {
			missing = cmp.Or(missing, err)
			continue
		}
		if err != nil {
			return err
		}
		all = append(all, answers...)
	}
	if len(all) == 0 && missing != nil {
		return missing
	}
	return f.print(cmd, all)
}

func (f *explainFlags) print(cmd *cobra.Command, all []explain.Answer) error {
	var docs []text.ExplainJSON
	for i := range all {
		if f.output == "json" {
			docs = append(docs, text.ToExplainJSON(&all[i]))
			continue
		}
		if i > 0 {
			fmt.Fprintln(cmd.OutOrStdout())
		}
		if err := text.Explain(cmd.OutOrStdout(), &all[i], f.all); err != nil {
			return err
		}
	}
	if f.output == "json" {
		return printOneOrAll(cmd.OutOrStdout(), docs)
	}
	return nil
}

// printOneOrAll prints one document, or a list of them.
func printOneOrAll[T any](w io.Writer, docs []T) error {
	if len(docs) == 1 {
		return printJSON(w, docs[0])
	}
	return printJSON(w, docs)
}

func (f *explainFlags) answer(cmd *cobra.Command, live *rulesOf, packets []proxy.Packet) error {
	var all []explain.Answer
	for _, pkt := range packets {
		if slices.Contains(live.addrs, pkt.Src.Addr()) || pkt.Src.Addr().IsLoopback() {
			pkt.FromNode = true
		}
		if pkt.In == "" && !pkt.FromNode {
			pkt.In = f.in
		}
		var a explain.Answer
		if p, ok := live.program.(*liverules.Program); ok {
			a = explain.Live(p, pkt)
		} else {
			o := live.program.Walk(pkt)
			a = explain.Outcome(&o, live.program.Mode(), pkt)
		}
		a.Rules = live.from
		a.Notes = append(a.Notes, live.notes...)
		if slices.ContainsFunc(a.Cases, func(c explain.Case) bool { return c.Affinity > 0 }) {
			a.Notes = append(a.Notes, "the kernel's lists of clients are not in the rules: this holds for a client without a session affinity entry")
		}
		a.Name(live.snapshot, proxy.Overlay{})
		all = append(all, a)
	}
	return f.print(cmd, all)
}

// parsePacket reads "tcp:10.244.1.2:40000-10.96.0.10:80".
func parsePacket(s string) (proxy.Packet, error) {
	form := errors.New("use PROTO:SOURCE:PORT-DESTINATION:PORT, as tcp:10.244.1.2:40000-10.96.0.10:80 or udp:[fd00::2]:40000-[fd00:96::a]:53")
	word, ends, ok := strings.Cut(s, ":")
	if !ok {
		return proxy.Packet{}, fmt.Errorf("%q is no packet: %w", s, form)
	}
	proto, err := conntrack.ParseProto(word)
	if err != nil || proto == conntrack.ICMP || proto == conntrack.ICMPv6 {
		return proxy.Packet{}, fmt.Errorf("protocol %q: use tcp, udp or sctp", word)
	}
	from, to, ok := strings.Cut(ends, "-")
	if !ok {
		return proxy.Packet{}, fmt.Errorf("%q has no destination: %w", s, form)
	}
	src, err := netip.ParseAddrPort(from)
	if err != nil {
		return proxy.Packet{}, fmt.Errorf("source %q: %w", from, form)
	}
	dst, err := netip.ParseAddrPort(to)
	if err != nil {
		return proxy.Packet{}, fmt.Errorf("destination %q: %w", to, form)
	}
	if src.Addr().Is6() != dst.Addr().Is6() {
		return proxy.Packet{}, fmt.Errorf("%s and %s are not of one family", from, to)
	}
	return proxy.Packet{Proto: proto, Src: src, Dst: dst}, nil
}

// load gets rules and, where there are any, the objects behind them.
func (f *rulesFlags) load(ctx context.Context, stdin io.Reader) (*rulesOf, error) {
	switch {
	case len(f.files) > 0:
		return f.fromFiles(ctx, stdin)
	case f.wanted():
		return f.desired(ctx)
	}
	return nil, usageErr(errors.New("say where rules come from: --rules FILE (what iptables-save printed; - is stdin), or --manifests DIR or --kubeconfig FILE for what kptrace would write"))
}
