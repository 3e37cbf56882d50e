package prom

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// other is the label of what has no series of its own because there are too
// many.
const other = "other"

// service holds the series of one Service port.
type service struct {
	name   proxy.PortName
	labels []*dto.LabelPair // namespace, port, protocol, service
	// endpoints finds what list has in the order of addresses. The zero
	// address stands for none, the address addrOther for those over the bound.
	endpoints map[netip.AddrPort]*endpoint
	list      []*endpoint
	affinity  []counted
	latency   latency
	// ready, waiting and terminating are endpoints of the newest View that
	// are so; known says that the Service is in it, gone since when not.
	ready, waiting, terminating int
	stateLabels                 [3][]*dto.LabelPair
	known                       bool
	gone                        time.Time
}

// endpoint holds the series of one endpoint of a Service port.
type endpoint struct {
	service *service
	addr    netip.AddrPort
	labels  []*dto.LabelPair // endpoint, namespace, pod, port, protocol, service

	started, picks, retransmits       float64
	unanswered, retries, reroutes     float64
	open                              int
	ended, failed                     []counted
	out, in                           conntrack.Counters
	hasBytes                          bool
	outLabels, inLabels               []*dto.LabelPair
	establishedSum, establishedNumber float64
	latency                           latency
	// share is the expected one of the newest View, -1 where it has none.
	share float64
	known bool
	gone  time.Time
}

// counted is a counter with one or two more labels.
type counted struct {
	what, why string
	labels    []*dto.LabelPair
	n         float64
}

// latency holds the histograms of one scope, nil until there is a value.
type latency struct {
	establish, duration *latencyHistogram
}

type latencyHistogram struct {
	prometheus.Histogram
	buckets []float64
	// told is when a bucket got its last exemplar.
	told []int64
}

// exemplarEvery is how rarely a bucket gets a new exemplar, as one costs more
// than the observation; a scraper sees the last one only.
const exemplarEvery = int64(time.Second)

// observe counts v. trace gives the id of the exemplar, or nothing.
func (h *latencyHistogram) observe(v time.Duration, now int64, trace func() string) {
	i := sort.SearchFloat64s(h.buckets, v.Seconds())
	if now-h.told[i] >= exemplarEvery {
		if id := trace(); id != "" {
			h.told[i] = now
			h.Histogram.(prometheus.ExemplarObserver).ObserveWithExemplar(v.Seconds(), prometheus.Labels{"trace_id": id})
			return
		}
	}
	h.Observe(v.Seconds())
}

func (f *flows) histogram(name, help string, buckets []float64) *latencyHistogram {
	opts := prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}
	if !f.cfg.ClassicOnly {
		opts.NativeHistogramBucketFactor = 1.1
		opts.NativeHistogramMaxBucketNumber = 100
		opts.NativeHistogramMinResetDuration = time.Hour
	}
	return &latencyHistogram{Histogram: prometheus.NewHistogram(opts), buckets: buckets, told: make([]int64, len(buckets)+1)}
}

// weigher says how much of a Service each candidate should get, in proportion
// to the others: all the same, but in IPVS mode as its scheduler has it. One
// that looks at load or at addresses promises no share.
func weigher(s *proxy.Service, v *proxy.View) func(*proxy.Endpoint) float64 {
	same := func(*proxy.Endpoint) float64 { return 1 }
	if v.Mode != proxy.IPVS || v.Program == nil {
		return same
	}
	from := netip.AddrPortFrom(netip.IPv4Unspecified(), 1)
	if s.Is6() {
		from = netip.AddrPortFrom(netip.IPv6Unspecified(), 1)
	}
	o := v.Program.Walk(proxy.Packet{Proto: s.Name.Proto, Src: from, Dst: netip.AddrPortFrom(s.ClusterIP, s.Port)})
	switch o.Algorithm {
	case "rr", "single":
		return same
	case "wrr":
		return func(e *proxy.Endpoint) float64 { return float64(max(1, e.Weight)) }
	}
	return func(*proxy.Endpoint) float64 { return 0 }
}

// labelNames are shared by all pairs: what is near each other in memory is
// written faster, and a scrape goes through millions of them.
var labelNames = func() map[string]*string {
	m := map[string]*string{}
	for _, name := range []string{
		"client", "client_namespace", "decision", "direction", "endpoint", "namespace", "outcome", "pod", "port",
		"protocol", "reason", "result", "service", "state",
	} {
		m[name] = &name
	}
	return m
}()

func pair(name, value string) *dto.LabelPair {
	p := &struct {
		pair  dto.LabelPair
		value string
	}{value: value}
	p.pair.Name, p.pair.Value = labelNames[name], &p.value
	return &p.pair
}

// with returns labels and more, ordered by name as the client library has them.
func with(labels []*dto.LabelPair, more ...*dto.LabelPair) []*dto.LabelPair {
	all := slices.Concat(labels, more)
	slices.SortFunc(all, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	return all
}

// serviceOf returns the series of a Service port, or those of the Service
// "other" where there are too many.
func (f *flows) serviceOf(name proxy.PortName) *service {
	if s := f.services[name]; s != nil {
		return s
	}
	if len(f.services) >= f.cfg.MaxServices && name != (proxy.PortName{Name: other}) {
		f.folded++
		return f.serviceOf(proxy.PortName{Name: other})
	}
	proto := name.Proto.String()
	if name.Proto == 0 {
		proto = ""
	}
	s := &service{
		name: name, endpoints: map[netip.AddrPort]*endpoint{},
		labels: []*dto.LabelPair{
			pair("namespace", name.Namespace), pair("port", name.Port),
			pair("protocol", proto), pair("service", name.Name),
		},
	}
	f.services[name] = s
	at, _ := slices.BinarySearchFunc(f.list, name, func(s *service, n proxy.PortName) int { return s.name.Compare(n) })
	f.list = slices.Insert(f.list, at, s)
	return s
}

// endpointOf returns the series of an endpoint, or those of the endpoint
// "other" where there are too many.
func (f *flows) endpointOf(s *service, addr netip.AddrPort, pod string) *endpoint {
	if e := s.endpoints[addr]; e != nil {
		return e
	}
	text := ""
	switch {
	case addr == addrOther():
		text = other
	case !addr.IsValid():
	case f.endpoints >= f.cfg.MaxEndpoints:
		f.folded++
		return f.endpointOf(s, addrOther(), "")
	default:
		text = addr.String()
	}
	f.endpoints++
	f.fresh = true
	e := &endpoint{
		service: s, addr: addr, share: -1,
		labels: with(s.labels, pair("endpoint", text), pair("pod", pod)),
	}
	s.endpoints[addr] = e
	at, _ := slices.BinarySearchFunc(s.list, addr, func(e *endpoint, a netip.AddrPort) int { return e.addr.Compare(a) })
	s.list = slices.Insert(s.list, at, e)
	return e
}

// addrOther is an address that no endpoint has.
func addrOther() netip.AddrPort {
	return netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
}

// add counts in the entry of a list with these words.
func add(list *[]counted, base []*dto.LabelPair, whatName, what, whyName, why string) {
	for i := range *list {
		if c := &(*list)[i]; c.what == what && c.why == why {
			c.n++
			return
		}
	}
	more := []*dto.LabelPair{pair(whatName, what)}
	if whyName != "" {
		more = append(more, pair(whyName, why))
	}
	*list = append(*list, counted{what: what, why: why, labels: with(base, more...), n: 1})
}

// look takes note of the newest View: which endpoints there are, which share
// each should get, and which series belong to nobody any more.
func (f *flows) look(v *proxy.View, now time.Time) {
	if v != nil && (v != f.view || f.fresh) {
		f.view, f.fresh = v, false
		f.learn(v)
	}
	if f.view == nil {
		return
	}
	f.list = slices.DeleteFunc(f.list, func(s *service) bool {
		s.list = slices.DeleteFunc(s.list, func(e *endpoint) bool {
			if !f.stale(e.known, &e.gone, now) || e.open > 0 || !e.addr.IsValid() && s.known {
				return false
			}
			delete(s.endpoints, e.addr)
			f.endpoints--
			f.dropped++
			return true
		})
		if !f.stale(s.known, &s.gone, now) || len(s.list) > 0 {
			return false
		}
		delete(f.services, s.name)
		f.clients.forget(s.name)
		return true
	})
}

func (f *flows) stale(known bool, gone *time.Time, now time.Time) bool {
	switch {
	case known:
		*gone = time.Time{}
		return false
	case gone.IsZero():
		*gone = now
	}
	return now.Sub(*gone) >= f.cfg.StaleAfter
}

// learn goes through the Services of a View. All of them get series, so that
// a Service nobody uses shows as such; their endpoints get them by traffic, or
// once the Service has any.
func (f *flows) learn(v *proxy.View) {
	for _, s := range f.list {
		s.known, s.ready, s.waiting, s.terminating = s.name == proxy.PortName{Name: other}, 0, 0, 0
		for _, e := range s.list {
			e.known, e.share = false, -1
		}
	}
	if v.Snapshot == nil {
		return
	}
	for i := range v.Snapshot.Services {
		want := &v.Snapshot.Services[i]
		s := f.serviceOf(want.Name)
		s.known = true
		for j := range want.Endpoints {
			switch e := &want.Endpoints[j]; {
			case e.Terminating:
				s.terminating++
			case e.Ready:
				s.ready++
			default:
				s.waiting++
			}
		}
		f.expect(s, want, v)
	}
}

// expect notes the endpoints of a Service that has series, and the share that
// each should get of new connections from inside the cluster, those that
// affinity decides left aside.
func (f *flows) expect(s *service, want *proxy.Service, v *proxy.View) {
	if len(s.list) == 0 {
		return // nobody used it yet
	}
	used := 0.0
	for _, e := range s.list {
		used += e.started
	}
	for j := range want.Endpoints {
		e := s.endpoints[want.Endpoints[j].Addr]
		if e == nil && used > 0 && want.Endpoints[j].Ready {
			e = f.endpointOf(s, want.Endpoints[j].Addr, want.Endpoints[j].Pod)
		}
		if e != nil {
			e.known = true
		}
	}
	choice := want.Select(v.Snapshot.Node, v.Overlay)
	candidates := choice.Cluster
	if want.InternalLocal {
		candidates = choice.Local
	}
	weight := weigher(want, v)
	total := 0.0
	for j := range candidates {
		total += weight(&candidates[j])
	}
	for j := range candidates {
		if e := s.endpoints[candidates[j].Addr]; e != nil && total > 0 {
			e.share = weight(&candidates[j]) / total
		}
	}
	if e := s.endpoints[addrOther()]; e != nil {
		e.known = true
	}
}
