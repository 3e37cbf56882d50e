package dashboards

import (
	"fmt"
	"regexp"
	"strings"
)

// Query is one question that a panel or a variable asks.
type Query struct {
	// Where is the dashboard and the panel, "services.json: Failed (A)".
	Where string
	// Expr is PromQL with Grafana's variables in it.
	Expr string
}

// Queries returns what all panels and variables of the dashboards ask.
func Queries() ([]Query, error) {
	list, err := List()
	if err != nil {
		return nil, err
	}
	var all []Query
	for _, d := range list {
		m, err := parse(d.JSON)
		if err != nil {
			return nil, fmt.Errorf("dashboards: %s: %w", d.File, err)
		}
		for _, v := range m.Templating.List {
			if v.Type == "query" {
				all = append(all, Query{Where: d.File + ": variable " + v.Name, Expr: labelValues(v.Def)})
			}
		}
		for _, p := range m.Panels {
			for _, t := range p.Targets {
				all = append(all, Query{Where: fmt.Sprintf("%s: %s (%s)", d.File, p.Title, t.RefID), Expr: t.Expr})
			}
		}
	}
	return all, nil
}

// labelValues makes PromQL of Grafana's label_values(metric, label): the
// values are those of the label in the answer.
func labelValues(text string) string {
	m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(text)
	if m == nil {
		return text
	}
	return fmt.Sprintf("count by (%s) (%s)", m[2], m[1])
}

// Substitute puts values in the place of Grafana's variables: those given, and
// else what selects everything. window is the range of rates.
func (q Query) Substitute(values map[string]string, window string) string {
	pairs := []string{"$__rate_interval", window, "$__range", window, "$__interval", window}
	for _, name := range []string{"cluster", "node", "namespace", "service"} {
		v, ok := values[name]
		if !ok {
			v = ".*"
		}
		pairs = append(pairs, "$"+name, v)
	}
	return strings.NewReplacer(pairs...).Replace(q.Expr)
}
