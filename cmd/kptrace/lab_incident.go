package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy"
)

func newLabIncidentCmd() *cobra.Command {
	var f labFlags
	var list, reveal, change, heal, beside bool
	cmd := &cobra.Command{
		Use:   "incident [N]",
		Short: "Start a lab in which something is wrong, and find out what",
		Long: `Start a lab with traffic in which, after a moment, something goes wrong: number N
of --list, or one by chance. You are told what a user would tell you. Find out
what it is with kptrace, from another terminal; --reveal tells.

It lasts until Ctrl-C or kptrace lab down. docs/incidents.md is a tutorial.`,
		Example: `  # Something is wrong. What?
  kptrace lab incident

  # In other terminals
  kptrace follow -A --outcome failed --since 1m
  kptrace diagnose svc/foo -n shop
  kptrace check

  # Was that it?
  kptrace lab incident --reveal

  # The same where kptrace only watches somebody else's kube-proxy
  kptrace lab incident --beside

  # What there is to solve, and number 6 in the lab that runs
  kptrace lab incident --list
  kptrace lab incident 6 --change`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErr(fmt.Errorf("one incident at a time: %q is one too many", args[1]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case list:
				return listIncidents(cmd.OutOrStdout())
			case reveal:
				return revealIncident(cmd, f.name)
			}
			if heal {
				control, err := lab.DialControl(cmd.Context(), labSockets(f.name))
				if err != nil {
					return err
				}
				defer control.Close()
				return control.Heal()
			}
			n := 0
			if len(args) > 0 {
				var err error
				if n, _, err = lab.FindIncident(args[0]); err != nil {
					return usageErr(fmt.Errorf("%w; kptrace lab incident --list says what each looks like", err))
				}
			}
			if change {
				return changeIncident(cmd, f.name, n)
			}
			if err := f.check(); err != nil {
				return err
			}
			if err := f.refuseGuest(cmd); err != nil {
				return err
			}
			if n == 0 {
				n = anyIncident(proxy.Mode(f.mode))
			}
			if lab.Incidents()[n-1].Userspace && !cmd.Flags().Changed("mode") {
				f.mode = string(proxy.Userspace)
			}
			in, never := lab.Incidents()[n-1].In(proxy.Mode(f.mode))
			if never != "" {
				return usageErr(fmt.Errorf("incident %s cannot happen in mode %s: %s", in.Name, f.mode, never))
			}
			cfg := f.config()
			if in.Userspace {
				cfg.ProxyArgs = append(cfg.ProxyArgs, "--userspace-drain", "500ms")
			}
			cfg.Scenario = lab.IncidentScenario
			cfg.Beside = beside || in.Beside
			return f.inLab(cmd, func(ctx context.Context) error {
				return runIncident(ctx, cmd, cfg, &f, n)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&beside, "beside", false, "have kptrace only watch: it runs as kptrace agent beside a kube-proxy")
	cmd.Flags().BoolVar(&list, "list", false, "list all incidents by what users say of them")
	cmd.Flags().BoolVar(&reveal, "reveal", false, "tell what is wrong in the lab that runs")
	cmd.Flags().BoolVar(&heal, "heal", false, "undo the incident in the lab that runs")
	cmd.Flags().BoolVar(&change, "change", false, "in the lab that runs: undo the incident, and let number N happen")
	return cmd
}

// anyIncident picks one that can happen in a mode, by chance.
func anyIncident(mode proxy.Mode) int {
	for {
		n := 1 + rand.N(len(lab.Incidents()))
		if _, never := lab.Incidents()[n-1].In(mode); never == "" {
			return n
		}
	}
}

func listIncidents(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, in := range lab.Incidents() {
		mode := ""
		if in.Userspace {
			mode = " (--mode userspace)"
		}
		fmt.Fprintf(tw, "%d\t%s%s\n", i+1, in.Symptom, mode)
	}
	return tw.Flush()
}

func revealIncident(cmd *cobra.Command, name string) error {
	control, err := lab.DialControl(cmd.Context(), labSockets(name))
	if err != nil {
		return err
	}
	defer control.Close()
	n, mode, err := control.Happened()
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("nothing has happened in this lab (yet)")
	}
	in, _ := lab.Incidents()[n-1].In(mode)
	fmt.Fprintf(cmd.OutOrStdout(), "Incident %d, %s: %s\n", n, in.Name, in.Answer)
	if in.Reason != "" {
		fmt.Fprintf(cmd.OutOrStdout(), "kptrace calls it %s: kptrace help reasons\n", in.Reason)
	}
	if in.Check != "" {
		fmt.Fprintf(cmd.OutOrStdout(), "kptrace check calls it %s\n", in.Check)
	}
	return nil
}

func changeIncident(cmd *cobra.Command, name string, n int) error {
	if n == 0 {
		control, err := lab.DialControl(cmd.Context(), labSockets(name))
		if err != nil {
			return err
		}
		_, mode, err := control.Happened()
		control.Close()
		if err != nil {
			return err
		}
		n = anyIncident(mode)
	}
	for _, do := range []func(*lab.Control) error{(*lab.Control).Heal, func(c *lab.Control) error { return c.Incident(n) }} {
		control, err := lab.DialControl(cmd.Context(), labSockets(name))
		if err != nil {
			return err
		}
		err = do(control)
		control.Close()
		if err != nil {
			return err
		}
	}
	fmt.Fprintln(cmd.OutOrStdout(), lab.Incidents()[n-1].Symptom)
	return nil
}

func runIncident(ctx context.Context, cmd *cobra.Command, cfg lab.Config, f *labFlags, n int) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGHUP)
	defer stop()
	l, err := startLab(ctx, cmd, cfg, f.verbose)
	if err != nil {
		return err
	}
	defer l.Close()
	group, ctx := errgroup.WithContext(ctx)
	listening := make(chan struct{})
	group.Go(func() error { return l.ServeControl(ctx, func() { close(listening) }, stop) })
	group.Go(func() error {
		select {
		case <-listening:
		case <-ctx.Done():
			return nil
		}
		if err := l.RunIncident(ctx, n); err != nil || ctx.Err() != nil {
			return err
		}
		in := lab.Incidents()[n-1]
		flag := ""
		if f.name != "" {
			flag = " --name " + f.name
		}
		fmt.Fprintf(cmd.OutOrStdout(), `Incident %s. A user says: %s.

Find out what is wrong, from another terminal:
  kptrace follow -A --outcome failed --since 1m
  kptrace diagnose svc/%s -n shop
  kptrace check
  kptrace explain svc/%s -n shop --from pod/web
  kptrace lab exec%s node/node1 -- iptables-save
Was that it?
  kptrace lab incident --reveal%s
End it by Ctrl-C, or kptrace lab down%s
`, strconv.Itoa(n), in.Symptom, in.Service, in.Service, flag, flag, flag)
		return nil
	})
	group.Go(func() error { return reviveNodes(ctx, cmd.ErrOrStderr(), l) })
	return group.Wait()
}
