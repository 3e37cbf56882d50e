package lab

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// Failures of a connection, as the client's kernel told it.
const (
	// FailRefused is ECONNREFUSED: an RST, or an ICMP error of a REJECT rule.
	FailRefused = "refused"
	// FailTimeout is no answer within the client's patience.
	FailTimeout = "timeout"
	// FailReset is ECONNRESET: an RST after the connection was made.
	FailReset = "reset"
	// FailUnreachable is EHOSTUNREACH or ENETUNREACH.
	FailUnreachable = "unreachable"
)

// Report is what a client says of one connection that has ended: the oracle
// against which a Flow is held.
type Report struct {
	// Client is "namespace/pod".
	Client string `json:"client"`
	// Start is when connect was called, by the wall clock; End when all was
	// over.
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
	// URL is the target as it was written.
	URL    string          `json:"url"`
	Proto  conntrack.Proto `json:"proto"`
	Local  netip.AddrPort  `json:"local"`
	Remote netip.AddrPort  `json:"remote"`
	// Server is the pod that answered, "namespace/pod", and Seen the client's
	// address as it saw it; empty where none answered.
	Server string         `json:"server,omitempty"`
	Seen   netip.AddrPort `json:"seen"`
	// Err is one of the Fail words, or the error's text; empty if all went
	// well.
	Err string `json:"err,omitempty"`
	// Established is how long connect took; for UDP, how long the first
	// answer took. It is -1 where there was none.
	Established time.Duration `json:"established"`
}

// Tuple is the connection's key, as the client made it.
func (r *Report) Tuple() conntrack.Tuple {
	return conntrack.NewTuple(r.Proto, r.Local, r.Remote)
}
