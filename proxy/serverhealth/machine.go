package serverhealth

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// Sign is something seen of an endpoint.
type Sign uint8

// The signs: of a connection we made to see, then of clients' connections.
const (
	Answered  Sign = iota // it took our connection
	Refused               // it refused our connection
	Silent                // it did not answer in time
	Served                // it answers a client
	StuckSYN              // a client's SYN has no answer for a second or more
	ResetsSYN             // it refused a client
)

// String says what the sign is, as the end of "the endpoint".
func (s Sign) String() string {
	return [...]string{"answers", "refuses connections from the node", "does not answer the node",
		"answers clients", "leaves clients without an answer", "refuses clients"}[s%6]
}

// good reports whether the sign is that of life.
func (s Sign) good() bool { return s == Answered || s == Served }

// probe reports whether the sign is of a connection we made.
func (s Sign) probe() bool { return s <= Silent }

// Policy says when an endpoint is out and for how long. Zero fields mean the
// defaults.
type Policy struct {
	// Failures are how many of our connections in a row have to fail: 2.
	// Signs are how many of clients' have to, with none that was answered in
	// between: 3.
	Failures, Signs int
	// BackOff is how long an endpoint is out at least: 10 s. It doubles each
	// time that it is not better by then, up to MaxBackOff: 2 min.
	BackOff, MaxBackOff time.Duration
	// Keep is the share of a Service's endpoints that stays whatever they do,
	// rounded up: 0.5. One endpoint always stays.
	Keep float64
}

func (p Policy) withDefaults() Policy {
	p.Failures, p.Signs = cmp.Or(p.Failures, 2), cmp.Or(p.Signs, 3)
	p.BackOff, p.MaxBackOff = cmp.Or(p.BackOff, 10*time.Second), cmp.Or(p.MaxBackOff, 2*time.Minute)
	p.Keep = cmp.Or(p.Keep, 0.5)
	return p
}

// Group is a Service port and the endpoints that serve it.
type Group struct {
	Name      proxy.PortName
	Endpoints []netip.AddrPort
}

// Change is an endpoint that went out or came back.
type Change struct {
	Endpoint netip.AddrPort
	// Out says which; Reason why it went.
	Out    bool
	Reason string
	// Until is when it comes back at the earliest.
	Until time.Time
	// Kept says that it should be out and stays, for too few others are left
	// of Service.
	Kept     bool
	Services []proxy.PortName
}

// endpoint is what is known of one.
type endpoint struct {
	failures, signs int // in a row
	last            Sign
	out             bool
	reason          string
	until           time.Time
	backOff         time.Duration
	since           time.Time
	// kept was said; probed says that it is probed, so that it need not be
	// tried on clients.
	kept, probed bool
	groups       []int
}

// bad says why an endpoint should be out, "" if it should not.
func (e *endpoint) bad(p *Policy) string {
	switch {
	case e.failures >= p.Failures:
		return fmt.Sprintf("%s, %d times in a row", e.last, e.failures)
	case e.signs >= p.Signs:
		return fmt.Sprintf("%s, %d times in a row", e.last, e.signs)
	}
	return ""
}

// Machine decides which endpoints are out. It has no clock and no goroutine, and
// one user at a time.
type Machine struct {
	policy    Policy
	groups    []Group
	endpoints map[netip.AddrPort]*endpoint
	outs      uint64
	kept      uint64
}

// NewMachine returns a Machine that knows no endpoints.
func NewMachine(p Policy) *Machine {
	return &Machine{policy: p.withDefaults(), endpoints: map[netip.AddrPort]*endpoint{}}
}

// SetGroups says which endpoints there are. What is known of those that stay
// stays.
func (m *Machine) SetGroups(groups []Group) {
	m.groups = groups
	old := m.endpoints
	m.endpoints = make(map[netip.AddrPort]*endpoint, len(old))
	for i, g := range groups {
		for _, addr := range g.Endpoints {
			e := m.endpoints[addr]
			if e == nil {
				if e = old[addr]; e == nil {
					e = &endpoint{}
				}
				e.groups = nil
				m.endpoints[addr] = e
			}
			e.groups = append(e.groups, i)
		}
	}
}

// Note takes in a sign of an endpoint. Signs of others do not matter.
func (m *Machine) Note(addr netip.AddrPort, s Sign, now time.Time) {
	e := m.endpoints[addr]
	if e == nil {
		return
	}
	e.probed = e.probed || s.probe()
	switch {
	case s == Answered:
		e.failures, e.signs = 0, 0
	case s == Served:
		e.signs = 0
	case s.probe():
		e.failures++
	default:
		e.signs++
	}
	if !s.good() {
		e.last = s
	}
}

// Tick brings the decision up to date and returns what is out, with what
// changed. The Overlay is new if something changed, and must not be changed.
func (m *Machine) Tick(now time.Time) (proxy.Overlay, []Change) {
	var changes []Change
	addrs := make([]netip.AddrPort, 0, len(m.endpoints))
	for addr := range m.endpoints {
		addrs = append(addrs, addr)
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	left := make([]int, len(m.groups)) // endpoints that are in
	for i, g := range m.groups {
		for _, addr := range g.Endpoints {
			if !m.endpoints[addr].out {
				left[i]++
			}
		}
	}
	for _, addr := range addrs { // first those that may come back
		if e := m.endpoints[addr]; e.out && m.returns(e, now) {
			e.out, e.failures, e.signs = false, 0, 0
			for _, g := range e.groups {
				left[g]++
			}
			changes = append(changes, Change{Endpoint: addr, Reason: e.reason, Services: m.names(e)})
		}
	}
	for _, addr := range addrs {
		e := m.endpoints[addr]
		reason := e.bad(&m.policy)
		switch {
		case e.out:
		case reason == "":
			e.kept = false
		case !m.spares(e, left):
			if !e.kept {
				e.kept = true
				m.kept++
				changes = append(changes, Change{Endpoint: addr, Reason: reason, Kept: true, Services: m.names(e)})
			}
		default:
			m.takeOut(e, reason, now)
			for _, g := range e.groups {
				left[g]--
			}
			changes = append(changes, Change{Endpoint: addr, Out: true, Reason: reason, Until: e.until, Services: m.names(e)})
		}
	}
	o := proxy.Overlay{}
	for _, addr := range addrs {
		if e := m.endpoints[addr]; e.out {
			if o.Out == nil {
				o.Out = map[netip.AddrPort]proxy.Outage{}
			}
			o.Out[addr] = proxy.Outage{Reason: e.reason, Until: e.until}
		}
	}
	return o, changes
}

// returns reports whether an endpoint's time is up and it may be tried: by our
// own connections where we make any, else by clients.
func (m *Machine) returns(e *endpoint, now time.Time) bool {
	if now.Before(e.until) {
		return false
	}
	if e.probed && e.failures > 0 {
		e.backOff = min(2*e.backOff, m.policy.MaxBackOff)
		e.until = now.Add(e.backOff)
		return false
	}
	return true
}

func (m *Machine) takeOut(e *endpoint, reason string, now time.Time) {
	// One that fails again soon after it came back is out for longer.
	if e.backOff == 0 || now.Sub(e.until) > 4*e.backOff {
		e.backOff = m.policy.BackOff
	} else {
		e.backOff = min(2*e.backOff, m.policy.MaxBackOff)
	}
	e.out, e.reason, e.until, e.since, e.kept = true, reason, now.Add(e.backOff), now, false
	e.signs = 0
	m.outs++
}

// spares reports whether all groups of an endpoint do without it.
func (m *Machine) spares(e *endpoint, left []int) bool {
	for _, g := range e.groups {
		keep := max(1, int(math.Ceil(m.policy.Keep*float64(len(m.groups[g].Endpoints)))))
		if left[g]-1 < keep {
			return false
		}
	}
	return true
}

func (m *Machine) names(e *endpoint) []proxy.PortName {
	var out []proxy.PortName
	for _, g := range e.groups {
		out = append(out, m.groups[g].Name)
	}
	return out
}

// Stats says what a Machine decided.
type Stats struct {
	// Out counts endpoints that are out now, Outs how often one went out, and
	// Kept how often one that should have stayed for want of others.
	Out        int
	Outs, Kept uint64
}

// Stats counts.
func (m *Machine) Stats() Stats {
	s := Stats{Outs: m.outs, Kept: m.kept}
	for _, e := range m.endpoints {
		if e.out {
			s.Out++
		}
	}
	return s
}
