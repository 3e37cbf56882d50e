package correlate

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

const (
	// leftAsk is how often the entry of a UDP flow is looked at whose endpoint left.
	leftAsk = int64(time.Second)
	// leftMost bounds how many flows are looked at for that in a generation.
	leftMost = 1024
)

// endpointsLeft has the entries of UDP flows looked at soon whose endpoints are not in
// the newest generation any more: nobody but their entries keeps their clients there.
func (c *Correlator) endpointsLeft() {
	views := c.decider.refresh()
	if c.cfg.Ask == nil || len(views) == 0 || views[0] == c.newest {
		return
	}
	first := c.newest == nil
	if c.newest = views[0]; first || !rulesPick(views[0].Mode) {
		return
	}
	found := 0
	for r := c.live.first; r != nil && found < leftMost; r = r.next {
		if r.orig.Proto() != conntrack.UDP || r.phase != open || r.relayed || r.left {
			continue
		}
		s := c.decider.service(views[0], r.f.Service.Name, r.f.Service.Addr.Addr().Is6())
		if s == nil || !r.f.Backend.Addr.IsValid() || stateOf(s, r.f.Backend.Addr) != nil {
			continue
		}
		found++
		r.left, r.stateDue = true, c.now+1
		c.arm(r)
	}
}

// askLeft is when such a flow's entry is looked at again; 0 for others.
func (r *rec) askLeft(now int64) int64 {
	switch {
	case !r.left:
		return 0
	case r.f.Reason == trace.StaleEntry: // known, and may yet be answered
		return now + askAgain
	}
	return now + leftAsk
}
