package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace"
)

func newShowCmd() *cobra.Command {
	var output string
	var sockets []string
	cmd := &cobra.Command{
		Use:   "show ID...",
		Short: "Print all that is kept of one connection",
		Long: `Print all that is kept of one connection. Its ID is in the output of
kptrace follow -o wide, json or jsonl. Failed connections are kept longer than
others; kptrace status says how far back.

Exit codes: 0, 1 if it is not held (any more) or for another error, 2 for wrong usage.`,
		Example: `  # The ids of what failed lately, then one of them in full
  kptrace follow -A --outcome failed --since 1h --for 0s -o wide
  kptrace show 1k5s7r2qe0001

  # The same for scripts
  kptrace show 1k5s7r2qe0001 -o json | jq .decision`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErr(errors.New("which connection? give its ID, as kptrace follow -o wide prints it"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := textOrJSON(output); err != nil {
				return err
			}
			var ids []trace.FlowID
			for _, a := range args {
				id, err := trace.ParseFlowID(a)
				if err != nil {
					return usageErr(fmt.Errorf("%q is no ID: one has 13 characters, 0 to 9 and a to v", a))
				}
				ids = append(ids, id)
			}
			clients, err := connect(cmd.Context(), sockets, false, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer closeAll(clients)
			for i, id := range ids {
				f, err := findFlow(cmd, clients, id)
				if err != nil {
					return err
				}
				if output == "json" {
					enc := json.NewEncoder(cmd.OutOrStdout())
					enc.SetIndent("", "  ")
					err = enc.Encode(text.ToJSON(f))
				} else {
					if i > 0 {
						fmt.Fprintln(cmd.OutOrStdout())
					}
					err = text.Detail(cmd.OutOrStdout(), f, time.Now(), time.Local)
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	addSocketFlag(cmd, &sockets)
	completeFrom(cmd, "output", []string{"text", "json"})
	return cmd
}

// findFlow asks each node for a flow.
func findFlow(cmd *cobra.Command, clients []*relay.Client, id trace.FlowID) (*trace.Flow, error) {
	var missing error
	for _, c := range clients {
		f, err := c.Flow(cmd.Context(), id)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, relay.ErrNotFound) {
			return nil, err
		}
		if missing == nil {
			missing = err
		}
	}
	return nil, missing
}
