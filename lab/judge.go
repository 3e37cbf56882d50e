package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	// slack is how far the clocks of a client and of its node's sources may
	// be apart, queues included.
	slack = 300 * time.Millisecond
	// maxDetails bounds Summary.Details.
	maxDetails = 20
)

// Evidence is what Judge holds against each other.
type Evidence struct {
	Cluster *Cluster
	// Snapshot says which endpoints there are; nil if unknown.
	Snapshot *proxy.Snapshot
	// Reports is what clients say, Flows the last revision of each flow that
	// was shown, from all nodes, in any order.
	Reports []Report
	Flows   []*trace.Flow
	Lost    map[string]uint64
}

// Judge compares what was shown with what clients know, and sums it up.
func Judge(e Evidence) *Summary {
	j := judge{Evidence: e, s: &Summary{Lost: e.Lost, Services: []ServiceSummary{}}}
	if j.s.Lost == nil {
		j.s.Lost = map[string]uint64{}
	}
	j.match()
	for _, p := range j.pairs {
		j.checkServer(p)
		j.checkOutcome(p)
	}
	j.checkAffinity()
	j.services()
	return j.s
}

type judge struct {
	Evidence
	s     *Summary
	pairs []pair
}

// pair is a connection as both sides know it.
type pair struct {
	r *Report
	f *trace.Flow
}

func (j *judge) detail(format string, args ...any) {
	if len(j.s.Details) < maxDetails {
		j.s.Details = append(j.s.Details, fmt.Sprintf(format, args...))
	}
}

// service finds the Service port that a connection was made to.
func (c *Cluster) service(proto conntrack.Proto, to netip.AddrPort) *Service {
	for i := range c.Services {
		s := &c.Services[i]
		if s.Proto != proto {
			continue
		}
		if s.ClusterIP == to.Addr() && s.Number == to.Port() {
			return s
		}
		if s.NodePort != 0 && s.NodePort == to.Port() &&
			slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Addr == to.Addr() }) {
			return s
		}
	}
	return nil
}

// match finds each report's flow: the same tuple at the same time. Of several
// by reuse of a port, both sides are taken in order of time.
func (j *judge) match() {
	byTuple := map[conntrack.Tuple][]*trace.Flow{}
	for _, f := range j.Flows {
		byTuple[f.Tuple] = append(byTuple[f.Tuple], f)
	}
	for _, list := range byTuple {
		slices.SortFunc(list, func(a, b *trace.Flow) int { return a.Start.Compare(b.Start) })
	}
	reports := make([]*Report, 0, len(j.Reports))
	for i := range j.Reports {
		r := &j.Reports[i]
		if j.Cluster.service(r.Proto, r.Remote) != nil && r.Local.Port() != 0 {
			reports = append(reports, r)
		}
	}
	slices.SortFunc(reports, func(a, b *Report) int { return a.Start.Compare(b.Start) })
	j.s.Made = len(reports)
	used := map[*trace.Flow]bool{}
	for _, r := range reports {
		f := pick(byTuple[r.Tuple()], r, used)
		if f == nil {
			j.s.Missing++
			j.detail("%s: %s at %s is not shown", r.Client, r.Tuple(), clock(r.Start))
			continue
		}
		used[f] = true
		j.pairs = append(j.pairs, pair{r, f})
	}
	known := map[conntrack.Tuple]bool{}
	for _, r := range reports {
		known[r.Tuple()] = true
	}
	for tuple := range known {
		for _, f := range byTuple[tuple] {
			if !used[f] && !f.Existing {
				j.s.Duplicates++
				j.detail("%s at %s is shown, but was made once", tuple, clock(f.Start))
			}
		}
	}
}

// pick returns the first flow in time that is the report's and not used. A
// datagram from a port used shortly before belongs to the same flow.
func pick(flows []*trace.Flow, r *Report, used map[*trace.Flow]bool) *trace.Flow {
	var again *trace.Flow
	for _, f := range flows {
		switch {
		case f.Start.After(r.End.Add(slack)):
		case used[f]:
			if r.Proto == conntrack.UDP {
				again = f
			}
		case f.Start.Add(slack).Before(r.Start):
		default:
			return f
		}
	}
	return again
}

func clock(t time.Time) string { return t.Format("15:04:05.000") }

// checkServer compares the endpoint shown with the one that answered.
func (j *judge) checkServer(p pair) {
	if p.r.Server == "" {
		return
	}
	shown := p.f.Backend.Namespace + "/" + p.f.Backend.Pod
	seen := p.f.Decision.SourceSeen
	if shown != p.r.Server || seen.IsValid() && seen != p.r.Seen {
		j.s.ServerMismatch++
		j.detail("%s: %s was answered by %s, which saw %s; shown is %s seeing %s",
			p.r.Client, p.r.Tuple(), p.r.Server, p.r.Seen, shown, seen)
	}
}

// checkOutcome compares the outcome shown with what the client's kernel said.
func (j *judge) checkOutcome(p pair) {
	var may []trace.Outcome
	switch {
	case p.r.Err == FailRefused, p.r.Err == FailUnreachable:
		may = []trace.Outcome{trace.Refused, trace.Rejected}
	case p.r.Err == FailTimeout && p.r.Established < 0:
		may = []trace.Outcome{trace.Unanswered, trace.Timeout, trace.Dropped}
	case p.r.Err == FailReset:
		may = []trace.Outcome{trace.Reset}
	default: // answered, in time or later
		may = []trace.Outcome{trace.Closed, trace.Open}
	}
	if !slices.Contains(may, p.f.Outcome) {
		j.s.OutcomeMismatch++
		how := cmp.Or(p.r.Err, "answered")
		j.detail("%s: %s at %s: the client says %s, shown is %s %s", p.r.Client, p.r.Tuple(), clock(p.r.Start), how, p.f.Outcome, p.f.Missing)
	}
}

// checkAffinity compares the affinity word and the endpoint with the client's
// own history.
func (j *judge) checkAffinity() {
	type key struct {
		client  netip.Addr
		service *Service
	}
	last := map[key]pair{}
	pairs := slices.Clone(j.pairs)
	slices.SortStableFunc(pairs, func(a, b pair) int { return a.f.Start.Compare(b.f.Start) })
	for _, p := range pairs {
		s := j.Cluster.service(p.r.Proto, p.r.Remote)
		if !p.f.Backend.Addr.IsValid() {
			continue // nothing was picked
		}
		before, seen := last[key{p.r.Local.Addr(), s}]
		last[key{p.r.Local.Addr(), s}] = p
		if want := affinityOf(s, before, seen, p); !slices.Contains(want, p.f.Decision.Affinity) {
			j.s.AffinityMismatch++
			j.detail("%s: %s at %s: affinity should be %v, shown is %q to %s", p.r.Client, p.r.Tuple(), clock(p.r.Start), want, p.f.Decision.Affinity, p.f.Backend.Pod)
		}
	}
}

// affinityOf returns the words that may be shown of a connection.
func affinityOf(s *Service, before pair, seen bool, p pair) []trace.Affinity {
	var gap time.Duration
	if seen {
		gap = p.f.Start.Sub(before.f.Start)
	}
	timeout := p.f.Decision.AffinityTimeout
	switch {
	case !s.Affinity:
		return []trace.Affinity{trace.AffinityNone}
	case !seen:
		return []trace.Affinity{trace.AffinityNew}
	case timeout > 0 && gap > timeout+time.Second:
		return []trace.Affinity{trace.AffinityExpired}
	case p.f.Backend.Addr != before.f.Backend.Addr:
		// Only if the list was changed under it, or time is about up.
		words := []trace.Affinity{trace.AffinityReset, trace.AffinityEvicted}
		if timeout > 0 && gap > timeout-time.Second {
			words = append(words, trace.AffinityExpired)
		}
		return words
	case timeout > 0 && gap > timeout-time.Second:
		return []trace.Affinity{trace.AffinityHit, trace.AffinityExpired}
	}
	return []trace.Affinity{trace.AffinityHit}
}
