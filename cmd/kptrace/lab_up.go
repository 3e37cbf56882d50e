package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/lab"
)

func newLabUpCmd() *cobra.Command {
	var f labFlags
	var dir, scenario string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Make a lab that lasts until Ctrl-C or kptrace lab down",
		Long: `Make a lab that lasts until Ctrl-C or kptrace lab down. Its state is a folder of
ordinary Kubernetes YAML that its proxies watch: edit a Service or an
EndpointSlice there, and the next connections follow. Pods and Nodes are made
at the start only.`,
		Example: `  kptrace lab up

  # Keep the manifests: the scenario is written there if the folder is empty
  kptrace lab up --dir ./state`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if err := f.refuseGuest(cmd); err != nil {
				return err
			}
			if scenario == "" {
				scenario = f.defaultScenario()
			}
			cfg := f.config()
			cfg.Dir, cfg.Scenario = dir, scenario
			return f.inLab(cmd, func(ctx context.Context) error {
				if dir != "" && !lab.HasManifests(dir) {
					if err := lab.WriteScenario(scenario, dir); err != nil {
						return err
					}
				}
				return upLab(ctx, cmd, cfg, &f, quiet)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&dir, "dir", "", "folder of manifests (default: one that lasts as long as the lab)")
	cmd.Flags().StringVar(&scenario, "scenario", "", fmt.Sprintf("what to write to an empty folder: one of %v (default: demo, or schedulers with --mode ipvs)", lab.Scenarios()))
	cmd.Flags().BoolVar(&quiet, "no-traffic", false, "let the clients in the scenario rest")
	return cmd
}

func upLab(ctx context.Context, cmd *cobra.Command, cfg lab.Config, f *labFlags, quiet bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGHUP)
	defer stop()
	l, err := startLab(ctx, cmd, cfg, f.verbose)
	if err != nil {
		return err
	}
	defer l.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return l.ServeControl(ctx, func() {
			printLab(cmd.OutOrStdout(), l, f.name)
		}, stop)
	})
	group.Go(func() error {
		if quiet {
			return nil
		}
		return l.StartTraffic(ctx)
	})
	group.Go(func() error { return reviveNodes(ctx, cmd.ErrOrStderr(), l) })
	return group.Wait()
}

// reviveNodes starts a proxy that has ended again, as a cluster would.
func reviveNodes(ctx context.Context, w io.Writer, l *lab.Lab) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-l.Ended():
			fmt.Fprintf(w, "the proxy of %s ended (%v): starting it again\n", e.Node, brief(e.Err))
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
			if err := l.StartNode(e.Node); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

func printLab(w io.Writer, l *lab.Lab, name string) {
	c := l.Cluster()
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "SERVICE\tADDRESS")
	for _, s := range c.Services {
		fmt.Fprintf(tw, "%s/%s\t%s:%d/%s", s.Namespace, s.Name, s.ClusterIP, s.Number, s.Proto)
		if s.NodePort != 0 {
			fmt.Fprintf(tw, ", port %d of every node", s.NodePort)
		}
		fmt.Fprintln(tw)
	}
	fmt.Fprintln(tw, "\nPOD\tADDRESS\tNODE")
	for _, p := range c.Pods {
		where := p.Node
		if p.External {
			where = "outside"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", p.ID(), p.Addr, where)
	}
	fmt.Fprintln(tw, "\nNODE\tADDRESS\tPODS")
	for _, n := range c.Nodes {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", n.Name, n.Addr, n.PodCIDR)
	}
	_ = tw.Flush()
	fmt.Fprintf(w, "\nState: %s (edit a file and the proxies follow)\n", l.Dir())
	fmt.Fprint(w, hints(c, name))
}

// hints are commands to try, made of what there is.
func hints(c *lab.Cluster, name string) string {
	flag := ""
	if name != "" {
		flag = " --name " + name
	}
	out := "Try in another terminal:\n"
	if len(c.Services) > 0 {
		s := c.Services[0]
		for _, t := range c.Services {
			if t.Name == "foo" {
				s = t
			}
		}
		out += fmt.Sprintf("  kptrace follow svc/%s -n %s\n", s.Name, s.Namespace)
		for _, p := range c.Pods {
			if len(p.Traffic) > 0 && !p.External {
				out += fmt.Sprintf("  kptrace lab exec%s pod/%s -n %s -- kptrace lab get http://%s:%d\n", flag, p.Name, p.Namespace, s.ClusterIP, s.Number)
				break
			}
		}
	}
	for _, p := range c.Pods {
		if len(p.Serves) > 0 {
			out += fmt.Sprintf("  kptrace lab fault%s refuse pod/%s -n %s\n", flag, p.Name, p.Namespace)
			break
		}
	}
	return out + fmt.Sprintf("End it by Ctrl-C, or kptrace lab down%s\n", flag)
}
