package node

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// reportDelay is how much earlier than its discovery an event may have been
// lost: NFLOG and conntrack are drained on ticks.
const reportDelay = 200 * time.Millisecond

// lossBox gathers losses from the sources for the correlator, and adds them up
// for the status. Its zero value is ready.
type lossBox struct {
	some  atomic.Bool // something is fresh
	mu    sync.Mutex
	fresh []trace.Loss
	total []trace.Loss
}

// add notes a loss. It may be called from any goroutine and does not wait.
func (b *lossBox) add(l trace.Loss) {
	b.mu.Lock()
	defer b.mu.Unlock()
	merge(&b.total, l)
	merge(&b.fresh, l)
	b.some.Store(true)
}

// count notes a loss that the correlator need not know of.
func (b *lossBox) count(l trace.Loss) {
	b.mu.Lock()
	defer b.mu.Unlock()
	merge(&b.total, l)
}

// merge adds l to the loss of the same source and place, so that a storm of
// losses takes no more room than one.
func merge(list *[]trace.Loss, l trace.Loss) {
	for i := range *list {
		have := &(*list)[i]
		if have.Source == l.Source && have.Where == l.Where {
			have.Events += l.Events
			have.From, have.To = min(have.From, l.From), max(have.To, l.To)
			return
		}
	}
	*list = append(*list, l)
}

// take returns what came since the last time.
func (b *lossBox) take() []trace.Loss {
	if !b.some.Swap(false) {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	fresh := b.fresh
	b.fresh = nil
	return fresh
}

// all returns everything lost so far, by source and place.
func (b *lossBox) all() []trace.Loss {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]trace.Loss(nil), b.total...)
}
