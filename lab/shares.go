package lab

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// services sums up the flows by Service port and endpoint.
func (j *judge) services() {
	byName := map[proxy.PortName][]*trace.Flow{}
	for _, f := range j.Flows {
		if f.Service.Name.Name != "" && !f.Existing {
			byName[f.Service.Name] = append(byName[f.Service.Name], f)
		}
	}
	names := make([]proxy.PortName, 0, len(byName))
	for name := range byName {
		names = append(names, name)
	}
	slices.SortFunc(names, proxy.PortName.Compare)
	for _, name := range names {
		flows := byName[name]
		slices.SortFunc(flows, trace.CompareFlows)
		j.s.Services = append(j.s.Services, j.service(name, flows))
	}
}

func (j *judge) service(name proxy.PortName, flows []*trace.Flow) ServiceSummary {
	v := ServiceSummary{
		Namespace: name.Namespace, Name: name.Name, Port: name.Port,
		Connections: len(flows), Outcomes: map[string]int{}, Endpoints: []EndpointSummary{},
	}
	var took []float64
	for _, f := range flows {
		v.Outcomes[string(f.Outcome)]++
		if f.Retried() {
			v.Retried++
		}
		if f.Established >= 0 {
			took = append(took, float64(f.Established)/float64(time.Millisecond))
		}
	}
	v.EstablishedMs = percentiles(took)

	t := tally{eps: map[netip.AddrPort]*EndpointSummary{}}
	var selected []proxy.Endpoint
	if j.Snapshot != nil {
		if svc, ok := j.Snapshot.Service(name); ok {
			selected = svc.Select(j.Snapshot.Node, proxy.Overlay{}).Cluster
		}
	}
	for _, ep := range selected {
		t.at(ep.Addr).Pod = ep.Pod
	}
	affinity, algorithm := false, ""
	for _, f := range flows {
		affinity = affinity || f.Decision.AffinityTimeout > 0
		algorithm = cmp.Or(algorithm, f.Decision.Algorithm)
		if f.Backend.Addr.IsValid() {
			e := t.at(f.Backend.Addr)
			e.Pod = cmp.Or(f.Backend.Pod, e.Pod)
			e.Connections++
			t.total++
		}
	}
	hash := strings.HasPrefix(algorithm, "sh") || strings.HasPrefix(algorithm, "dh")
	switch {
	case affinity || hash:
		t.expectPins(flows, hash)
	case algorithm == "wrr":
		t.expectWeights(selected)
	default:
		t.expectChance(flows, selected)
	}
	v.Endpoints = append(v.Endpoints, t.sorted()...)
	return v
}

// tally counts by endpoint.
type tally struct {
	eps   map[netip.AddrPort]*EndpointSummary
	total int
}

func (t *tally) at(a netip.AddrPort) *EndpointSummary {
	e := t.eps[a]
	if e == nil {
		e = &EndpointSummary{IP: a.Addr().String()}
		t.eps[a] = e
	}
	return e
}

func (t *tally) sorted() []EndpointSummary {
	var list []EndpointSummary
	for _, a := range slices.SortedFunc(maps.Keys(t.eps), netip.AddrPort.Compare) {
		e := *t.eps[a]
		if t.total > 0 {
			e.Share = float64(e.Connections) / float64(t.total)
		}
		list = append(list, e)
	}
	return list
}

// expectChance takes the chance shown for each endpoint that was picked; one
// that never was has an equal share of those selected.
func (t *tally) expectChance(flows []*trace.Flow, selected []proxy.Endpoint) {
	type sum struct {
		p float64
		n int
	}
	shown := map[netip.AddrPort]sum{}
	for _, f := range flows {
		if f.Backend.Addr.IsValid() && f.Decision.Known && f.Decision.Probability > 0 {
			s := shown[f.Backend.Addr]
			shown[f.Backend.Addr] = sum{s.p + f.Decision.Probability, s.n + 1}
		}
	}
	for a, e := range t.eps {
		if s := shown[a]; s.n > 0 {
			e.ExpectedShare = s.p / float64(s.n)
		} else if slices.ContainsFunc(selected, func(ep proxy.Endpoint) bool { return ep.Addr == a }) {
			e.ExpectedShare = 1 / float64(len(selected))
		}
	}
}

// expectWeights has each endpoint take its turns by its weight.
func (t *tally) expectWeights(selected []proxy.Endpoint) {
	sum := 0
	for _, ep := range selected {
		sum += max(1, int(ep.Weight))
	}
	for _, ep := range selected {
		t.at(ep.Addr).ExpectedShare = float64(max(1, int(ep.Weight))) / float64(sum)
	}
}

// expectPins sends every connection where its client's last free pick went:
// what affinity promises, or a hash of addresses, which leaves none free but
// the first. flows are in order of time.
func (t *tally) expectPins(flows []*trace.Flow, hash bool) {
	pin := map[netip.Addr]netip.AddrPort{}
	for _, f := range flows {
		if !f.Backend.Addr.IsValid() || t.total == 0 {
			continue
		}
		client := f.Client.Addr.Addr()
		if _, ok := pin[client]; !ok || !hash && f.Decision.Affinity != trace.AffinityHit {
			pin[client] = f.Backend.Addr
		}
		t.at(pin[client]).ExpectedShare += 1 / float64(t.total)
	}
}
