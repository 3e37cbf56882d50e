package node

import (
	"context"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/internal/recent"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace/correlate"
)

const (
	// seedEvery is how often it is looked whether there is a first generation.
	seedEvery = 50 * time.Millisecond
	// seedMost bounds the clients that are taken over from the kernel's lists.
	seedMost = 65536
)

// affinityLists lists the kernel's lists of clients in a generation.
func affinityLists(v *proxy.View) (all []proxy.AffinityList) {
	if v.Mode != proxy.IPTables || v.Snapshot == nil {
		return nil
	}
	if p, ok := v.Program.(interface{ AffinityLists() []proxy.AffinityList }); ok {
		return p.AffinityLists()
	}
	timeouts := map[proxy.PortName]time.Duration{}
	for i := range v.Snapshot.Services {
		timeouts[v.Snapshot.Services[i].Name] = v.Snapshot.Services[i].Affinity
	}
	for _, r := range affinityRules(v) {
		all = append(all, proxy.AffinityList{Name: r.Chain, Service: r.Service, Endpoint: r.Endpoint, Timeout: timeouts[r.Service]})
	}
	return all
}

// seedAffinity tells the correlator of the clients that the kernel has in its lists
// already, once there is a first generation. Without that, affinity of clients that
// came before us is said to be unknown.
func (t *tracer) seedAffinity(ctx context.Context) error {
	var v *proxy.View
	for v == nil {
		if views := t.views(); len(views) > 0 && !views[0].Done.IsZero() {
			v = views[0]
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(seedEvery):
		}
	}
	var seeds []correlate.AffinitySeed
	for _, l := range affinityLists(v) {
		entries, err := recent.Read(l.Name)
		if err != nil {
			t.logger.Warn("the lists of session affinity cannot be read; of clients that were here before it is not known whether it held", "list", l.Name, "err", err)
			return nil
		}
		for _, e := range entries {
			seeds = append(seeds, correlate.AffinitySeed{Client: e.Client, Service: l.Service, Endpoint: l.Endpoint, Last: e.Last})
		}
		if len(seeds) > seedMost {
			t.logger.Warn("there are more clients in the lists of session affinity than can be kept; of the others it is not known whether it held", "kept", seedMost)
			break
		}
	}
	err := t.do(ctx, func(c *correlate.Correlator) {
		for _, s := range seeds {
			c.SeedAffinity(s)
		}
		if len(seeds) <= seedMost {
			c.SeededAffinity()
		}
	})
	if err != nil && ctx.Err() == nil {
		t.logger.Warn("session affinity of clients that were here before is not known", "err", err)
	}
	return nil
}

// held answers for the lists of clients: whether the source of a packet is in one,
// and not too old. What it found last is kept, for words about it.
type held struct {
	lists map[string]proxy.AffinityList
	now   time.Time
	found []affine
}

// affine is a client that is kept with an endpoint.
type affine struct {
	list proxy.AffinityList
	age  time.Duration
}

func newHeld(lists []proxy.AffinityList) *held {
	h := &held{lists: make(map[string]proxy.AffinityList, len(lists)), now: time.Now()}
	for _, l := range lists {
		h.lists[l.Name] = l
	}
	return h
}

// recent is liverules.Config.Recent.
func (h *held) recent(name string, p *xtables.Packet) xtables.Tri {
	l, ok := h.lists[name]
	if !ok {
		return xtables.No
	}
	entries, err := recent.Read(name)
	if err != nil {
		return xtables.Unknown
	}
	age, has := ageOf(entries, p.Src, h.now)
	switch {
	case !has || age > l.Timeout+recent.Slack:
		return xtables.No
	case age > l.Timeout-recent.Slack:
		return xtables.Unknown
	}
	h.found = append(h.found, affine{l, age})
	return xtables.Yes
}

func ageOf(entries []recent.Entry, client netip.Addr, now time.Time) (time.Duration, bool) {
	for _, e := range entries {
		if e.Client == client.Unmap() {
			return max(0, now.Sub(e.Last)), true
		}
	}
	return 0, false
}
