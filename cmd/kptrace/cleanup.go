package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy/liverules/beside"
)

func newCleanupCmd() *cobra.Command {
	var f proxyFlags
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything kptrace left on this node, and nothing else",
		Long: `Remove everything kptrace left in this network namespace, and nothing else: of
an agent its chains named KPTRACE and its sets; of a proxy the chains it writes in
any mode (KUBE-* of kube-proxy, KPTRACE and KPTRACE-PATH) with the jumps to them and
the sets kptrace-*; and set back the sysctls it changed, if they are still as it made them. Chains
that kubelet shares stay. Doing it twice does no harm.`,
		Example: `  # After kill -9, or after SIGTERM, which leaves the rules on purpose
  kptrace cleanup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cleanup(cmd, f.flavour, f.socket)
		},
	}
	addBackendFlags(cmd, &f)
	cmd.Flags().StringVar(&f.socket, "socket", "", "socket the proxy was started with; its folder holds what the sysctls were")
	return cmd
}

// cleanup undoes what a proxy with this flavour and socket left.
func cleanup(cmd *cobra.Command, flavour, socket string) error {
	if socket == "" {
		socket = relay.DefaultSocket()
	}
	if err := checkFlavour(flavour); err != nil {
		return usageErr(err)
	}
	watched, err := node.Beside(filepath.Dir(socket))
	if err != nil {
		return err
	}
	var all node.Cleaner = beside.New(beside.Config{})
	if !watched {
		if all, err = allModes(flavour, ""); err != nil {
			return err
		}
	}
	if err := needsRoot("removing rules", node.Cleanup(cmd.Context(), all, filepath.Dir(socket))); err != nil {
		return err
	}
	if err := removeDead(socket); err != nil {
		return err
	}
	if watched {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "the rules of kptrace agent are gone and its sysctls set back; those of the kube-proxy beside it stay")
		return err
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), "kptrace's rules are gone and its sysctls set back")
	return err
}

// removeDead removes a socket on which nobody listens.
func removeDead(socket string) error {
	info, err := os.Lstat(socket)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return nil // it is gone, or it is not ours
	}
	client, err := relay.Dial(socket)
	if err == nil {
		return client.Close()
	}
	if !errors.Is(err, relay.ErrNotRunning) {
		return err
	}
	if err := os.Remove(socket); err != nil {
		return fmt.Errorf("removing a dead proxy's socket: %w", err)
	}
	return nil
}
