package main

import (
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// query is a question to Prometheus and the name of its answers.
type query struct{ expr, legend string }

func source() common.DataSourceRef {
	kind, uid := "prometheus", "${datasource}"
	return common.DataSourceRef{Type: &kind, Uid: &uid}
}

// board is a dashboard in the making. Panels stand in rows of 24 columns.
type board struct{ *dashboard.DashboardBuilder }

// The variables that panels filter by.
const (
	byNode    = `cluster=~"$cluster", instance=~"$node"`
	byService = byNode + `, namespace=~"$namespace", service=~"$service"`
)

func newBoard(uid, title, about string, services, one bool) *board {
	b := &board{dashboard.NewDashboardBuilder(title)} //nolint:staticcheck // see render
	b.Uid("kptrace-"+uid).Description(about).Tags([]string{"kptrace", "kubernetes", "networking"}).Editable().
		Time("now-1h", "now").Refresh("30s").Timezone("browser").Tooltip(dashboard.DashboardCursorSyncCrosshair)
	b.Link(dashboard.NewDashboardLinkBuilder("kptrace").Type(dashboard.DashboardLinkTypeDashboards).
		Tags([]string{"kptrace"}).IncludeVars(true).KeepTime(true))
	b.WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Data source").Type("prometheus"))
	b.variable("cluster", "Cluster", `label_values(kptrace_build_info, cluster)`, true)
	b.variable("node", "Node", `label_values(kptrace_build_info{cluster=~"$cluster"}, instance)`, true)
	if services {
		b.variable("namespace", "Namespace", `label_values(kptrace_service_endpoints{`+byNode+`}, namespace)`, !one)
		b.variable("service", "Service", `label_values(kptrace_service_endpoints{`+byNode+`, namespace=~"$namespace"}, service)`, !one)
	}
	return b
}

func (b *board) variable(name, label, text string, many bool) {
	v := dashboard.NewQueryVariableBuilder(name).Label(label).Query(dashboard.StringOrMap{String: &text}).
		Definition(text).Datasource(source()).Refresh(dashboard.VariableRefreshOnTimeRangeChanged).
		Sort(dashboard.VariableSortAlphabeticalAsc)
	if many {
		all, value := "All", "$__all"
		v.Multi(true).IncludeAll(true).AllValue(".*").Current(dashboard.VariableOption{
			Text: dashboard.StringOrArrayOfString{String: &all}, Value: dashboard.StringOrArrayOfString{String: &value},
		})
	}
	b.WithVariable(v)
}

func (b *board) row(title string) { b.WithRow(dashboard.NewRowBuilder(title)) }

func target(i int, q query) *prometheus.DataqueryBuilder {
	return prometheus.NewDataqueryBuilder().RefId(string(rune('A' + i))).Datasource(source()).Expr(q.expr).LegendFormat(q.legend)
}

// stat shows one number. Above warn it is yellow, above bad red; zeros leave
// the colours out.
func (b *board) stat(title, about, unit string, warn, bad float64, q string) {
	p := stat.NewPanelBuilder().Title(title).Description(about).Unit(unit).Height(4).Span(4).Datasource(source()).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
		GraphMode(common.BigValueGraphModeArea).WithTarget(target(0, query{q, ""}))
	steps := []dashboard.Threshold{{Color: "green"}}
	if bad > 0 {
		steps = append(steps, dashboard.Threshold{Value: &warn, Color: "orange"}, dashboard.Threshold{Value: &bad, Color: "red"})
	}
	b.WithPanel(p.Thresholds(dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(steps)))
}

// lines shows what changes with time, half as wide as the page.
func (b *board) lines(title, about, unit string, queries ...query) {
	b.WithPanel(lines(title, about, unit, queries...))
}

func lines(title, about, unit string, queries ...query) *timeseries.PanelBuilder {
	p := timeseries.NewPanelBuilder().Title(title).Description(about).Unit(unit).Height(8).Span(12).Datasource(source()).
		Min(0).FillOpacity(8).ShowPoints(common.VisibilityModeNever).
		Legend(common.NewVizLegendOptionsBuilder().ShowLegend(true).DisplayMode(common.LegendDisplayModeTable).
			Placement(common.LegendPlacementBottom).Calcs([]string{"lastNotNull", "max"})).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending))
	for i, q := range queries {
		p.WithTarget(target(i, q))
	}
	return p
}

// latency shows quantiles of a histogram, with exemplars that lead to traces.
func (b *board) latency(title, about, metric, by string) {
	legend := "{{" + by + "}} "
	grouping := "le, " + by
	if by == "" {
		legend, grouping = "", "le"
	}
	p := lines(title, about, units.Seconds)
	for i, n := range []string{"0.5", "0.99"} {
		p.WithTarget(target(i, query{
			fmt.Sprintf(`histogram_quantile(%s, sum by (%s) (rate(%s_bucket{%s}[$__rate_interval])))`, n, grouping, metric, byService),
			legend + map[string]string{"0.5": "p50", "0.99": "p99"}[n],
		}).Exemplar(true))
	}
	b.WithPanel(p)
}

func (b *board) heat(title, about, metric string) {
	b.WithPanel(heatmap.NewPanelBuilder().Title(title).Description(about).Height(8).Span(12).Datasource(source()).
		YAxis(heatmap.NewYAxisConfigBuilder().Unit(units.Seconds)).
		WithTarget(target(0, query{
			fmt.Sprintf(`sum by (le) (increase(%s_bucket{%s}[$__rate_interval]))`, metric, byService), "{{le}}",
		}).Format(prometheus.PromQueryFormatHeatmap)))
}

// column is one column of a table: a query and what it is called.
type column struct{ title, unit, expr string }

// table shows one row for each set of labels, and a column for each query.
func (b *board) table(title, about string, labels []string, links map[string]string, columns ...column) {
	p := table.NewPanelBuilder().Title(title).Description(about).Height(9).Span(24).Datasource(source()).
		Footer(common.NewTableFooterOptionsBuilder().Show(false).Reducer([]string{"sum"}).CountRows(false)).
		SortBy([]cog.Builder[common.TableSortByFieldState]{
			common.NewTableSortByFieldStateBuilder().DisplayName(columns[0].title).Desc(true),
		})
	names, order := map[string]string{}, map[string]int{}
	for i, l := range labels {
		order[l] = i
	}
	for i, c := range columns {
		id := string(rune('A' + i))
		p.WithTarget(target(i, query{c.expr, ""}).Format(prometheus.PromQueryFormatTable).Instant())
		field := "Value #" + id
		names[field], order[field] = c.title, len(labels)+i
		p.OverrideByName(c.title, []dashboard.DynamicConfigValue{{Id: "unit", Value: c.unit}})
	}
	for label, url := range links {
		p.OverrideByName(label, []dashboard.DynamicConfigValue{{Id: "links", Value: []map[string]any{{"title": "Details", "url": url}}}})
	}
	p.WithTransformation(dashboard.DataTransformerConfig{Id: "merge", Options: map[string]any{}})
	p.WithTransformation(dashboard.DataTransformerConfig{Id: "organize", Options: map[string]any{
		"excludeByName": map[string]bool{"Time": true}, "indexByName": order, "renameByName": names,
	}})
	b.WithPanel(p)
}
