package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/dashboards"
)

func newDashboardsCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dashboards",
		Short: "Grafana dashboards and Prometheus rules for kptrace's metrics",
		Example: `  kptrace dashboards list
  kptrace dashboards export ./grafana

  # A folder that Grafana provisions itself from: GF_PATHS_PROVISIONING=./grafana
  kptrace dashboards export ./grafana --provision`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErr(fmt.Errorf("unknown command %q%s; kptrace dashboards --help lists them", args[0], suggestion(cmd, args[0])))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDashboardsListCmd(), newDashboardsExportCmd())
	return cmd
}

func newDashboardsListCmd() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the dashboards",
		Example: `  kptrace dashboards list -o json`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := dashboards.List()
			if err != nil {
				return err
			}
			switch output {
			case "json":
				type row struct {
					File        string `json:"file"`
					UID         string `json:"uid"`
					Title       string `json:"title"`
					Panels      int    `json:"panels"`
					Description string `json:"description"`
				}
				rows := []row{}
				for _, d := range list {
					rows = append(rows, row{d.File, d.UID, d.Title, d.Panels, d.Description})
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
			case "text":
			default:
				return usageErr(fmt.Errorf("-o %q: use text or json", output))
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "FILE\tTITLE\tPANELS\tABOUT")
			for _, d := range list {
				fmt.Fprintf(tw, "%s\t%s\t%d\t%s\n", d.File, d.Title, d.Panels, d.Description)
			}
			return tw.Flush()
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newDashboardsExportCmd() *cobra.Command {
	var provision bool
	cmd := &cobra.Command{
		Use:   "export DIR",
		Short: "Write the dashboards and the rules to a folder",
		Long: `Write the dashboards (to import into Grafana) and the recording and alert rules
(for rule_files of Prometheus) to a folder, which is made if it is absent. Files
of an earlier export are overwritten.

With --provision the folder is one that Grafana provisions itself from: start it
with GF_PATHS_PROVISIONING set to it. The data sources in it are Prometheus and
Jaeger on this machine, as kptrace lab stack runs them; edit or remove them if
yours are elsewhere.`,
		Example: `  kptrace dashboards export ./grafana
  kptrace dashboards export /etc/grafana/provisioning --provision`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErr(errors.New("give one folder: kptrace dashboards export DIR"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := dashboards.Export(args[0], provision)
			if err != nil {
				return err
			}
			for _, n := range names {
				fmt.Fprintln(cmd.OutOrStdout(), n)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&provision, "provision", false, "lay the folder out for Grafana's provisioning, data sources included")
	return cmd
}
