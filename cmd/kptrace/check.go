package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/trace/check"
)

// checkFlags are the flags of kptrace check.
type checkFlags struct {
	rules      rulesFlags
	ignore     []string
	ignoreFile string
	fix        bool
	list       bool
	verbose    bool
	output     string
	sockets    []string
}

func newCheckCmd() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with a node: rules, odds, tables, settings",
		Long: `Compare what a node should have in its kernel with what it has, and say what is
wrong: Services and endpoints missing from the rules or left in them, odds that
are not what they should be, rules of others in the way, two proxies at once,
stale and full tables, settings. On a healthy node it says nothing.

It asks the nodes that run here, or looks at what iptables-save or nft list ruleset
printed (--rules FILE, or - for stdin), which needs no root, no cluster, and works on
any OS; with --manifests or --kubeconfig also at what the API says. It changes
nothing, but for --fix, by which a node's own proxy writes its own rules again.

Severities: BREAKS, connections fail because of it; RISK, some do or will; NOTE,
worth knowing. Findings that are known and accepted: --ignore CODE or
--ignore CODE:OBJECT, with * for any text, or a file of such lines.

Exit codes: 0, 1 for an error, 2 for wrong usage, 3 if something breaks traffic.`,
		Example: `  # What is wrong with the nodes that run here?
  kptrace check

  # A node of your own, with nothing installed there
  ssh node sudo iptables-save | kptrace check --rules -
  ssh node sudo nft list ruleset | kptrace check --rules -   # of nftables mode

  # The same against what the API says, exported as YAML
  kptrace check --rules node1.rules --manifests ./state --node node1

  # The same against what the API server says now
  ssh node1 sudo iptables-save | kptrace check --rules - --kubeconfig ~/.kube/config --node node1

  # For scripts, without what is known
  kptrace check -o json --ignore rp-filter --ignore 'foreign-drop:filter/DOCKER*'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	fl := cmd.Flags()
	fl.SortFlags = false
	f.rules.both = true
	f.rules.add(cmd)
	fl.StringArrayVar(&f.ignore, "ignore", nil, "leave out findings: CODE or CODE:OBJECT, * for any text; repeatable")
	fl.StringVar(&f.ignoreFile, "ignore-file", "", "file of such patterns, one a line, # for comments")
	fl.BoolVar(&f.fix, "fix", false, "have the node's own proxy write its own rules again; nothing of others is touched")
	fl.BoolVar(&f.list, "list-codes", false, "list all kinds of findings")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show the rules and entries that are meant")
	fl.StringVarP(&f.output, "output", "o", "text", "text or json")
	addSocketFlag(cmd, &f.sockets)
	completeFrom(cmd, "output", []string{"text", "json"})
	_ = cmd.MarkFlagFilename("ignore-file")
	return cmd
}

func (f *checkFlags) run(cmd *cobra.Command) error {
	if err := textOrJSON(f.output); err != nil {
		return err
	}
	if f.list {
		tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "CODE\tSEVERITY\tMEANING")
		for _, c := range check.Codes() {
			fmt.Fprintf(tw, "%s\t%s\t%s\n", c.Name, c.Severity, c.Meaning)
		}
		return tw.Flush()
	}
	opts, err := f.options()
	if err != nil {
		return usageErr(err)
	}
	if len(f.rules.files) == 0 {
		return f.ask(cmd, opts)
	}
	if f.fix {
		return usageErr(errors.New("--fix is for a running node: a file of rules cannot be repaired"))
	}
	r, err := f.rules.load(cmd.Context(), cmd.InOrStdin())
	if err != nil {
		return err
	}
	if f.output == "text" {
		r.talk(cmd.ErrOrStderr())
	}
	s := check.State{Node: f.rules.node, Dumps: r.dumps, NFT: r.nft, Snapshot: r.snapshot, Addrs: r.addrs, Now: time.Now()}
	return f.print(cmd, []relay.CheckResponse{{Node: f.rules.node, Findings: check.Run(&s, opts)}})
}

// ask asks the nodes that run here, or looks at this network namespace itself.
func (f *checkFlags) ask(cmd *cobra.Command, opts check.Options) error {
	clients, err := connect(cmd.Context(), f.sockets, false, cmd.ErrOrStderr())
	if errors.Is(err, relay.ErrNotRunning) && len(f.sockets) == 0 && os.Getenv("KPTRACE_SOCKET") == "" {
		return f.here(cmd, opts, err)
	}
	if err != nil {
		return err
	}
	defer closeAll(clients)
	if f.rules.wanted() {
		fmt.Fprintln(cmd.ErrOrStderr(), "note: a kptrace runs here and compares with the state it knows: --manifests and --kubeconfig are not looked at")
	}
	var out []relay.CheckResponse
	for _, c := range clients {
		r, err := c.Check(cmd.Context(), relay.CheckRequest{Options: opts, Fix: f.fix})
		if err != nil {
			return err
		}
		for _, done := range r.Fixed {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: written again: %s\n", r.Node, done)
		}
		for _, n := range r.Notes {
			fmt.Fprintf(cmd.ErrOrStderr(), "note: %s: %s\n", r.Node, n)
		}
		out = append(out, r)
	}
	return f.print(cmd, out)
}

// here looks at this network namespace, where no kptrace runs.
func (f *checkFlags) here(cmd *cobra.Command, opts check.Options, none error) error {
	if f.fix {
		return none
	}
	s, notes, err := node.Inspect(cmd.Context())
	if err != nil {
		return fmt.Errorf("%w; and without it: %w", none, needsRoot("looking at the kernel", err))
	}
	if f.rules.wanted() {
		if s.Snapshot, err = f.rules.snapshot(cmd.Context()); err != nil {
			return err
		}
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "note: no kptrace runs here: this looked at this network namespace itself")
	for _, n := range notes {
		fmt.Fprintln(cmd.ErrOrStderr(), "note:", n)
	}
	return f.print(cmd, []relay.CheckResponse{{Node: f.rules.node, Findings: check.Run(s, opts)}})
}

// print writes what was found.
func (f *checkFlags) print(cmd *cobra.Command, all []relay.CheckResponse) error {
	broken := false
	var docs []text.CheckJSON
	for i, r := range all {
		broken = broken || check.Broken(r.Findings)
		docs = append(docs, text.ToCheckJSON(r.Node, r.Findings))
		if f.output == "json" {
			continue
		}
		if len(all) > 1 && len(r.Findings) > 0 {
			if i > 0 {
				fmt.Fprintln(cmd.OutOrStdout())
			}
			fmt.Fprintf(cmd.OutOrStdout(), "node %s\n", r.Node)
		}
		if err := text.Check(cmd.OutOrStdout(), r.Findings, f.verbose); err != nil {
			return err
		}
	}
	if f.output == "json" {
		var err error
		if len(docs) == 1 {
			err = printJSON(cmd.OutOrStdout(), docs[0])
		} else {
			err = printJSON(cmd.OutOrStdout(), docs)
		}
		if err != nil {
			return err
		}
	}
	if broken {
		return &exitCodeError{code: exitProblem}
	}
	return nil
}

// options reads what is to be ignored.
func (f *checkFlags) options() (check.Options, error) {
	o := check.Options{Ignore: f.ignore}
	if f.ignoreFile != "" {
		file, err := os.Open(f.ignoreFile)
		if err != nil {
			return o, fmt.Errorf("--ignore-file: %w", err)
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			line, _, _ := strings.Cut(lines.Text(), "#")
			if line = strings.TrimSpace(line); line != "" {
				o.Ignore = append(o.Ignore, line)
			}
		}
		if err := lines.Err(); err != nil {
			return o, fmt.Errorf("--ignore-file: %w", err)
		}
	}
	return o, o.Validate()
}
