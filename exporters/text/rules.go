package text

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// Rules writes a table of every Service that rules know: its addresses, where
// each leads, and with what odds; and by a Snapshot, nil if there is none, which
// endpoints are no candidates, and why.
func Rules(w io.Writer, services []*liverules.Service, s *proxy.Snapshot) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "SERVICE\tADDRESS\tVIA\tENDPOINT\tODDS\tNOTE")
	for _, svc := range services {
		for i := range svc.Fronts {
			f := &svc.Fronts[i]
			who, where, via := svc.Name.String(), f.String()+"/"+svc.Name.Proto.String(), string(f.Via)
			if i > 0 {
				who = ""
			}
			for j, line := range frontLines(svc, f, s) {
				if j > 0 {
					who, where, via = "", "", ""
				}
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", who, where, via, line)
			}
		}
	}
	return tw.Flush()
}

// frontLines are the last three columns, a line for each endpoint.
func frontLines(svc *liverules.Service, f *liverules.Front, s *proxy.Snapshot) []string {
	var lines []string
	for i, c := range f.Choices {
		lines = append(lines, fmt.Sprintf("%s\t%s\t%s", frontEnd(s, c.Endpoint), percent(c.Probability), frontNote(svc, f, i, c)))
	}
	switch {
	case len(f.Choices) == 0 && f.Reason != "":
		lines = append(lines, fmt.Sprintf("-\t\t%sed: %s", strings.TrimSuffix(strings.ReplaceAll(f.Verdict.String(), "drop", "dropp"), "ed"), reasonWords(trace.Reason(f.Reason))))
	case len(f.Choices) == 0:
		lines = append(lines, "-\t\tPROBLEM: "+f.Chain+" leads to no endpoint")
	case f.Missing > 0:
		lines = append(lines, fmt.Sprintf("nowhere\t%s\tPROBLEM: no rule of %s takes these", percent(f.Missing), f.Chain))
	}
	for _, x := range explain.Front(s, svc, f) {
		end := "all endpoints"
		if x.Endpoint.Addr.IsValid() {
			end = frontEnd(s, x.Endpoint.Addr)
		}
		lines = append(lines, fmt.Sprintf("%s\t-\texcluded: %s", end, x.Why))
	}
	return lines
}

// frontEnd is an endpoint with the name of its pod where that is known.
func frontEnd(s *proxy.Snapshot, a netip.AddrPort) string {
	if s != nil {
		if p, ok := s.Pods[a.Addr()]; ok {
			return fmt.Sprintf("%s (%s)", a, p.Name)
		}
	}
	return a.String()
}

func frontNote(s *liverules.Service, f *liverules.Front, i int, c proxy.Choice) string {
	var notes []string
	if i == 0 && s.Affinity > 0 {
		notes = append(notes, "affinity "+Duration(s.Affinity))
	}
	if i == 0 && liverules.KindOf(f.Chain) == liverules.KindLocal {
		notes = append(notes, "policy Local")
	}
	if i == 0 && len(s.Ranges) > 0 && (liverules.KindOf(f.Chain) == liverules.KindFirewall || f.Via == proxy.ViaLoadBalancer) {
		var ranges []string
		for _, r := range s.Ranges {
			ranges = append(ranges, r.String())
		}
		notes = append(notes, "only from "+strings.Join(ranges, ", "))
	}
	if c.Masquerade == "external" {
		notes = append(notes, "masqueraded")
	}
	return strings.Join(notes, ", ")
}

// RulesJSON is the table of Services for programs.
type RulesJSON struct {
	SchemaVersion int               `json:"schemaVersion"`
	Mode          proxy.Mode        `json:"mode"`
	Services      []RuleServiceJSON `json:"services"`
}

// RuleServiceJSON is one Service port.
type RuleServiceJSON struct {
	Namespace         string      `json:"namespace"`
	Name              string      `json:"name"`
	Port              string      `json:"port"`
	Proto             string      `json:"proto"`
	AffinityTimeoutMs *Millis     `json:"affinityTimeoutMs,omitempty"`
	SourceRanges      []string    `json:"sourceRanges,omitempty"`
	Addresses         []FrontJSON `json:"addresses"`
}

// FrontJSON is one address of a Service port. IP is empty for a node port.
type FrontJSON struct {
	Via       proxy.Via      `json:"via"`
	IP        string         `json:"ip,omitempty"`
	Port      uint16         `json:"port"`
	Chain     string         `json:"chain,omitempty"`
	Verdict   string         `json:"verdict"`
	Reason    string         `json:"reason,omitempty"`
	Endpoints []EndpointJSON `json:"endpoints"`
	Excluded  []ExcludedEnds `json:"excluded,omitempty"`
	// Missing is the chance that no endpoint is picked, for rules are missing.
	Missing float64 `json:"missing,omitempty"`
}

// EndpointJSON is one endpoint and its odds.
type EndpointJSON struct {
	Endpoint    string  `json:"endpoint"`
	Probability float64 `json:"probability"`
}

// ToRulesJSON converts the table; the Snapshot may be nil.
func ToRulesJSON(mode proxy.Mode, services []*liverules.Service, snapshot *proxy.Snapshot) RulesJSON {
	out := RulesJSON{SchemaVersion: SchemaVersion, Mode: mode, Services: []RuleServiceJSON{}}
	for _, s := range services {
		j := RuleServiceJSON{Namespace: s.Name.Namespace, Name: s.Name.Name, Port: s.Name.Port, Proto: s.Name.Proto.String()}
		if s.Affinity > 0 {
			j.AffinityTimeoutMs = millis(s.Affinity)
		}
		for _, r := range s.Ranges {
			j.SourceRanges = append(j.SourceRanges, r.String())
		}
		for i := range s.Fronts {
			f := &s.Fronts[i]
			front := FrontJSON{Via: f.Via, Port: f.Port, Chain: f.Chain, Verdict: f.Verdict.String(), Reason: f.Reason,
				Missing: round(f.Missing, 1e6), Endpoints: []EndpointJSON{},
				Excluded: excludedJSON(explain.Front(snapshot, s, f))}
			if f.Addr.IsValid() {
				front.IP = f.Addr.String()
			}
			for _, c := range f.Choices {
				front.Endpoints = append(front.Endpoints, EndpointJSON{c.Endpoint.String(), round(c.Probability, 1e6)})
			}
			j.Addresses = append(j.Addresses, front)
		}
		out.Services = append(out.Services, j)
	}
	return out
}
