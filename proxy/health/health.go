package health

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// DefaultTimeout is twice kube-proxy's default syncPeriod.
const DefaultTimeout = time.Minute

// Family names an address family as Kubernetes does.
type Family string

// The families.
const (
	IPv4 Family = "IPv4"
	IPv6 Family = "IPv6"
)

// Source is what the answers are made of.
type Source struct {
	// Stats is the Syncer's.
	Stats func() proxy.SyncStats
	// Eligible says whether the node should get traffic from load balancers:
	// it exists, is not being deleted and the autoscaler does not drain it.
	// Nil means it should.
	Eligible func() bool
	// Timeout is how long a change may wait for the kernel before the proxy
	// counts as unhealthy: twice the sync period. Zero means DefaultTimeout.
	Timeout time.Duration
	// Families are the address families that the proxy programs.
	Families []Family
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// State is the body of the answers of /healthz and /livez, as kube-proxy
// gives it.
type State struct {
	// LastUpdated is the last time at which nothing waited for the kernel:
	// the present in a healthy proxy, the end of the last good sync in
	// another.
	LastUpdated time.Time `json:"lastUpdated"`
	CurrentTime time.Time `json:"currentTime"`
	// NodeEligible is given by /healthz only.
	NodeEligible *bool `json:"nodeEligible,omitempty"`
	// Healthy speaks of the proxy alone, not of the node.
	Healthy bool                   `json:"healthy"`
	Status  map[Family]FamilyState `json:"status,omitempty"`
}

// FamilyState is the State of one address family.
type FamilyState struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// State judges the proxy at this moment. It is healthy until a change has
// waited for the kernel for the Timeout; a failed sync leaves its changes
// waiting. Before the first Snapshot nothing can wait, and the status of
// families is empty, as kube-proxy's is.
func (s *Source) State() State {
	now := s.now()
	st := s.Stats()
	healthy := st.PendingSince.IsZero() || now.Sub(st.PendingSince) < s.timeout()
	state := State{LastUpdated: st.LastSuccess, CurrentTime: now, Healthy: healthy}
	if st.LastSuccess.IsZero() && healthy {
		return state
	}
	state.Status = map[Family]FamilyState{}
	for _, f := range s.Families {
		state.Status[f] = FamilyState{LastUpdated: st.LastSuccess, Healthy: healthy}
	}
	return state
}

// Healthy reports whether the proxy itself works.
func (s *Source) Healthy() bool { return s.State().Healthy }

func (s *Source) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

func (s *Source) timeout() time.Duration {
	if s.Timeout == 0 {
		return DefaultTimeout
	}
	return s.Timeout
}

// Answered is told which code a probe got.
type Answered func(code int)

// Healthz answers 200 if the proxy is healthy and the node is eligible for
// traffic from load balancers, else 503.
func (s *Source) Healthz(answered Answered) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		state := s.State()
		eligible := s.Eligible == nil || s.Eligible()
		state.NodeEligible = &eligible
		answer(w, state, state.Healthy && eligible, answered)
	})
}

// Livez answers 200 if the proxy is healthy, else 503: a node that is being
// drained needs no restart of its proxy.
func (s *Source) Livez(answered Answered) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		state := s.State()
		answer(w, state, state.Healthy, answered)
	})
}

// Mux has both under their paths.
func (s *Source) Mux(healthz, livez Answered) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("/healthz", s.Healthz(healthz))
	mux.Handle("/livez", s.Livez(livez))
	return mux
}

func answer(w http.ResponseWriter, state State, good bool, answered Answered) {
	code := http.StatusOK
	if good {
		// Readers of old releases take a recent time for a living proxy.
		state.LastUpdated = state.CurrentTime
	} else {
		code = http.StatusServiceUnavailable
	}
	if answered != nil {
		answered(code)
	}
	body, err := json.Marshal(state)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(body)
}
