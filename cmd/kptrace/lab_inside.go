package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/lab/load"
)

// newLabPodCmd is what the lab starts in its pods.
func newLabPodCmd() *cobra.Command {
	return &cobra.Command{
		Use: "pod", Hidden: true, Args: noArgs,
		Short: "Be the program of a pod; the lab starts this",
		RunE:  func(*cobra.Command, []string) error { return lab.RunPod() },
	}
}

// newLabLoadCmd is the client of the benchmark.
func newLabLoadCmd() *cobra.Command {
	var cfg load.Config
	var target, output string
	cmd := &cobra.Command{
		Use: "load", Hidden: true, Args: noArgs,
		Short: "Make many new connections, for measurements",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.Target, err = netip.ParseAddrPort(target); err != nil {
				return usageErr(fmt.Errorf("--target=%q: use ADDRESS:PORT", target))
			}
			r, err := load.Run(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if output == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), r.String())
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&target, "target", "", "where to connect, ADDRESS:PORT")
	fl.IntVar(&cfg.Conns, "conns", 0, "end after so many connections")
	fl.IntVar(&cfg.Concurrency, "concurrency", 32, "connections open at once")
	fl.DurationVar(&cfg.Duration, "for", 0, "end after this time")
	fl.Float64Var(&cfg.Rate, "rate", 0, "connections per second at most")
	fl.StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// newLabServeCmd is the server of the benchmark.
func newLabServeCmd() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use: "serve", Hidden: true, Args: noArgs,
		Short: "Answer many connections, for measurements",
		RunE: func(cmd *cobra.Command, _ []string) error {
			at, err := netip.ParseAddrPort(listen)
			if err != nil {
				return usageErr(fmt.Errorf("--listen=%q: use ADDRESS:PORT", listen))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			return serveLoad(ctx, cmd, at)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "0.0.0.0:8080", "where to listen, ADDRESS:PORT")
	return cmd
}

func serveLoad(ctx context.Context, cmd *cobra.Command, at netip.AddrPort) error {
	return load.Serve(ctx, at, func() { fmt.Fprintln(cmd.OutOrStdout(), "ready") })
}
