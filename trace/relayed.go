package trace

import (
	"slices"
	"strconv"
	"time"
)

// Relay puts the userspace proxy into the path of the packet that opened a
// connection, behind what that packet met: where it was accepted, what was picked
// and dialled. It may be called again as the flow goes on.
func (p *Path) Relay(f *Flow) {
	at := slices.IndexFunc(p.Hops, func(h Hop) bool { return h.Kind == HopUserspace })
	if at < 0 {
		at = len(p.Hops)
	}
	end := at
	for end < len(p.Hops) && p.Hops[end].Kind == HopUserspace {
		end++
	}
	p.Hops = slices.Concat(p.Hops[:at], relayHops(f), p.Hops[end:])
}

// Leg adds what the proxy's own packet to the endpoint met, once: one sent again
// adds nothing.
func (p *Path) Leg(leg *Path) {
	if n := len(p.Hops); n == 0 || p.Hops[n-1].Kind != HopUserspace {
		return
	}
	p.Hops, p.Left = slices.Concat(p.Hops, leg.Hops), leg.Left
	if leg.Incomplete && !p.Incomplete {
		p.Incomplete, p.Note = true, leg.Note
	}
}

// relayHops is what the proxy did with a connection, as its flow tells.
func relayHops(f *Flow) []Hop {
	listener := f.Reply.Src()
	hop := func(purpose string) Hop { return Hop{Kind: HopUserspace, Source: Userspace, Purpose: purpose} }
	accepted := hop("the proxy takes it")
	if !f.Reply.IsZero() {
		accepted.Purpose = "accepted at " + listener.String()
	}
	hops := []Hop{accepted}
	for i := range f.Attempts {
		a := &f.Attempts[i]
		if i == len(f.Attempts)-1 {
			if s := affinityWords(f); s != "" {
				hops = append(hops, hop(s))
			}
		}
		pick := hop(pickWords(f, i))
		pick.Time = a.Start
		hops = append(hops, pick, dialled(f, a))
	}
	if len(f.Attempts) == 0 && f.Outcome == Rejected {
		none := hop("no endpoint that could be dialled")
		none.Verdict = "reject"
		hops = append(hops, none)
	}
	return hops
}

func pickWords(f *Flow, i int) string {
	name := nameOf(&f.Attempts[i].Endpoint)
	switch n := f.Decision.Candidates; {
	case i > 0:
		return "pick another: " + name
	case n > 1 && f.Decision.Affinity != AffinityHit:
		return "pick one of " + strconv.Itoa(n) + ": " + name
	}
	return "pick " + name
}

// affinityWords says what affinity did for the last pick.
func affinityWords(f *Flow) string {
	client, d := f.Client.Addr.Addr().String(), &f.Decision
	switch d.Affinity {
	case AffinityHit:
		return "affinity: " + client + " was sent there " + d.AffinityAge.Round(time.Millisecond).String() + " before"
	case AffinityNew:
		return "affinity: no entry for " + client
	case AffinityExpired:
		return "affinity: the entry for " + client + " had expired, " + d.AffinityAge.Round(time.Millisecond).String() + " old"
	case AffinityReset:
		return "affinity: the entry for " + client + " was given up, its endpoint did not answer"
	}
	return ""
}

// dialled is how a try ended.
func dialled(f *Flow, a *Attempt) Hop {
	h := Hop{Kind: HopUserspace, Source: Userspace, Purpose: "dial " + a.Endpoint.Addr.String() + ": " + a.Outcome}
	if a.Latency >= 0 {
		h.Purpose += " after " + a.Latency.Round(time.Microsecond).String()
		if !a.Start.IsZero() {
			h.Time = a.Start.Add(a.Latency)
		}
	}
	if a.Outcome != tryEstablished {
		return h
	}
	if seen := f.Decision.SourceSeen; seen.IsValid() {
		h.Changes = append(h.Changes, Change{Field: "src", Before: f.Client.Addr.String(), After: seen.String()})
	}
	if !f.Reply.IsZero() {
		h.Changes = append(h.Changes, Change{Field: "dst", Before: f.Reply.Src().String(), After: a.Endpoint.Addr.String()})
	}
	return h
}

// tryEstablished is the Outcome of an Attempt that was answered.
const tryEstablished = "established"

// nameOf names an endpoint with its address.
func nameOf(p *Peer) string {
	if p.Pod != "" {
		return p.Pod + " " + p.Addr.String()
	}
	return p.Addr.String()
}
