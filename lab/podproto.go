package lab

import "time"

// podSpec is what a pod's program is told first.
type podSpec struct {
	ID      string   `json:"id"`
	Addr    string   `json:"addr"`
	Serves  []Port   `json:"serves,omitempty"`
	Traffic []Target `json:"traffic,omitempty"`
}

// order is a line to a pod's program. Each is answered by a word with the
// same Seq, once it is carried out.
type order struct {
	Seq int `json:"seq"`
	// Do is one of the do words.
	Do    string        `json:"do"`
	Spec  *podSpec      `json:"spec,omitempty"`
	Delay time.Duration `json:"delay,omitempty"`
	On    bool          `json:"on,omitempty"`
}

const (
	doSpec   = "spec"   // take the spec and serve
	doStart  = "start"  // begin to connect
	doStop   = "stop"   // make no more connections; answered when all ended
	doRefuse = "refuse" // close the listeners
	doListen = "listen" // open them again
	doSlow   = "slow"   // wait Delay before each answer
	doReset  = "reset"  // reset connections instead of answering, if On
	doAbort  = "abort"  // as a client, reset each connection after asking, if On
	doLarge  = "large"  // answer with much, if On
)

// word is a line from a pod's program.
type word struct {
	// Seq is the order it answers; Err is why that failed.
	Seq int    `json:"seq,omitempty"`
	Err string `json:"err,omitempty"`
	// Report is a connection that ended.
	Report *Report `json:"report,omitempty"`
}
