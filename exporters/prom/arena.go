package prom

import (
	"sync"

	dto "github.com/prometheus/client_model/go"
)

// arena holds the metrics of one scrape, so that the next one allocates
// little: with tens of thousands of endpoints there are hundreds of thousands.
type arena struct {
	chunks [][]slot
	used   int
	// lists are the families' lists of metrics, by their place.
	lists [][]*dto.Metric
}

// slot is a metric with room for its value.
type slot struct {
	metric  dto.Metric
	counter dto.Counter
	gauge   dto.Gauge
	value   float64
}

const chunkSlots = 4096

func (a *arena) next() *slot {
	i, j := a.used/chunkSlots, a.used%chunkSlots
	if i == len(a.chunks) {
		a.chunks = append(a.chunks, make([]slot, chunkSlots))
	}
	a.used++
	s := &a.chunks[i][j]
	s.metric.Histogram, s.metric.Summary, s.metric.Counter, s.metric.Gauge = nil, nil, nil, nil
	return s
}

func (a *arena) of(counter bool, labels []*dto.LabelPair, v float64) *dto.Metric {
	s := a.next()
	s.metric.Label, s.value = labels, v
	if counter {
		s.counter.Value = &s.value
		s.metric.Counter = &s.counter
	} else {
		s.gauge.Value = &s.value
		s.metric.Gauge = &s.gauge
	}
	return &s.metric
}

// arenas lends them. The one given back last is the next one lent; after a
// scrape that needed much more than usual the collector takes it.
type arenas struct{ pool sync.Pool }

func (p *arenas) get() *arena {
	if a, ok := p.pool.Get().(*arena); ok {
		return a
	}
	return new(arena)
}

// put takes a back. Nobody may look at its metrics any more.
func (p *arenas) put(a *arena) {
	if keep := a.used/chunkSlots + 1; keep < len(a.chunks)/2 {
		a.chunks = a.chunks[:keep:keep]
	}
	a.used = 0
	for i := range a.lists {
		clear(a.lists[i])
		a.lists[i] = a.lists[i][:0]
	}
	p.pool.Put(a)
}
