package lab

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// Summary is what a run comes to. Its JSON names are API.
type Summary struct {
	Services []ServiceSummary `json:"services"`
	// Lost counts events missed, by source.
	Lost map[string]uint64 `json:"lost"`
	// Made is the number of connections that clients made to Services.
	Made int `json:"made"`
	// ServerMismatch counts connections shown with another endpoint than the
	// one that answered, Missing those not shown at all, Duplicates those
	// shown more than once. AffinityMismatch and OutcomeMismatch count those
	// whose affinity word or outcome is not what their client knows.
	ServerMismatch   int `json:"serverMismatch"`
	Missing          int `json:"missing"`
	Duplicates       int `json:"duplicates"`
	AffinityMismatch int `json:"affinityMismatch"`
	OutcomeMismatch  int `json:"outcomeMismatch"`
	// Details describes the first few of all these.
	Details []string `json:"details,omitempty"`
}

// ServiceSummary is about one Service port.
type ServiceSummary struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port"`
	// Connections is how many were shown, Outcomes how they ended, Retried
	// how many tried more than one endpoint.
	Connections int               `json:"connections"`
	Outcomes    map[string]int    `json:"outcomes"`
	Retried     int               `json:"retried"`
	Endpoints   []EndpointSummary `json:"endpoints"`
	// EstablishedMs is the time to establish in milliseconds, null if nothing
	// was established.
	EstablishedMs *Percentiles `json:"establishedMs"`
}

// EndpointSummary is about one endpoint of a Service port.
type EndpointSummary struct {
	Pod         string `json:"pod"`
	IP          string `json:"ip"`
	Connections int    `json:"connections"`
	// Share is the part of the Service's connections that came here, of those
	// that came anywhere. ExpectedShare is the chance that the proxy gave the
	// endpoint; for a Service with session affinity, the part of connections
	// made by clients whose first pick it was.
	Share         float64 `json:"share"`
	ExpectedShare float64 `json:"expectedShare"`
}

// Percentiles of a set of values.
type Percentiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// OK reports whether every connection was shown once and rightly.
func (s *Summary) OK() bool {
	return s.Missing+s.ServerMismatch+s.Duplicates+s.AffinityMismatch+s.OutcomeMismatch == 0
}

// percentiles returns the smallest values that are not below 50 and 99 % of
// all, nil if there are none. It sorts values.
func percentiles(values []float64) *Percentiles {
	if len(values) == 0 {
		return nil
	}
	slices.Sort(values)
	at := func(percent int) float64 { return values[(len(values)*percent+99)/100-1] }
	return &Percentiles{P50: at(50), P99: at(99)}
}

// WriteText writes the summary for people.
func (s *Summary) WriteText(w io.Writer) error {
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "SERVICE\tENDPOINT\tCONNECTIONS\tSHARE\tEXPECTED\tESTABLISHED p50 / p99\tOUTCOMES")
	for i := range s.Services {
		v := &s.Services[i]
		took := "–"
		if p := v.EstablishedMs; p != nil {
			took = fmt.Sprintf("%.2f / %.2f ms", p.P50, p.P99)
		}
		var outcomes []string
		for _, name := range slices.Sorted(maps.Keys(v.Outcomes)) {
			outcomes = append(outcomes, fmt.Sprintf("%d %s", v.Outcomes[name], name))
		}
		if v.Retried > 0 {
			outcomes = append(outcomes, fmt.Sprintf("%d retried", v.Retried))
		}
		fmt.Fprintf(tw, "%s\t\t%d\t\t\t%s\t%s\n", v.title(), v.Connections, took, strings.Join(outcomes, ", "))
		for _, e := range v.Endpoints {
			name := e.Pod
			if name == "" {
				name = e.IP
			}
			fmt.Fprintf(tw, "\t%s\t%d\t%.1f %%\t%.1f %%\t\t\n", name, e.Connections, 100*e.Share, 100*e.ExpectedShare)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	_, err := fmt.Fprint(w, "\n", s.verdict())
	return err
}

func (v *ServiceSummary) title() string {
	t := v.Namespace + "/" + v.Name
	if v.Port != "" {
		t += ":" + v.Port
	}
	return t
}

func (s *Summary) verdict() string {
	var lost []string
	for _, source := range slices.Sorted(maps.Keys(s.Lost)) {
		lost = append(lost, fmt.Sprintf("%s %d", source, s.Lost[source]))
	}
	if len(lost) == 0 {
		lost = []string{"0"}
	}
	out := fmt.Sprintf("Events lost: %s\n", strings.Join(lost, ", "))
	if s.OK() {
		return out + fmt.Sprintf("Checked with the clients: all %d connections were shown once, with the endpoint that answered.\n", s.Made)
	}
	out += fmt.Sprintf("Checked with the clients, of %d connections:", s.Made)
	for _, c := range []struct {
		n    int
		what string
	}{
		{s.Missing, "not shown"},
		{s.Duplicates, "shown more than once"},
		{s.ServerMismatch, "shown with the wrong endpoint"},
		{s.AffinityMismatch, "with the wrong affinity word"},
		{s.OutcomeMismatch, "with the wrong outcome"},
	} {
		if c.n > 0 {
			out += fmt.Sprintf(" %d %s;", c.n, c.what)
		}
	}
	out = strings.TrimSuffix(out, ";") + "\n"
	for _, d := range s.Details {
		out += "  " + d + "\n"
	}
	return out
}
