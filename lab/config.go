package lab

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"syscall"
)

// Config says what lab to make.
type Config struct {
	// Dir is the folder of manifests. The nodes' proxies watch it; the lab
	// itself reads it once, so a Pod or Node added later has no namespace.
	// If it is empty, the Scenario (DefaultScenario if empty) is written to a
	// folder below SocketDir, which lasts as long as the lab.
	Dir, Scenario string
	// SocketDir is where nodes and the lab put their sockets; it is made if
	// it is absent.
	SocketDir string
	// Self is the command that runs this binary, as kptrace; nil means
	// /proc/self/exe. A test gives its own binary, whose TestMain calls
	// RunPod when the arguments are "lab", "pod".
	Self []string
	// NoProxy leaves nodes without a proxy: a LAN with routed pods.
	NoProxy bool
	// Beside has kptrace only watch: each node runs "kptrace agent" beside a proxy
	// that does not trace and stands for anybody's kube-proxy.
	Beside bool
	// SignalProxy signals the kube-proxy of a lab with NoProxy, for incidents that
	// happen to it; nil if it has none.
	SignalProxy func(syscall.Signal) error
	// Edited is called after an incident has changed the manifests, and returns when
	// who has to know does; nil waits a second where something happens afterwards.
	Edited func(context.Context) error
	// ProxyArgs are more arguments for "kptrace proxy" on each node.
	ProxyArgs []string
	Options   Options
	// Report is called, one at a time, for each connection a client ended; it
	// must not block. Nil drops them.
	Report func(Report)
	// Output gets what the nodes' proxies say on stderr, each line with the
	// node's name before it; nil drops it.
	Output io.Writer
	Logger *slog.Logger
}

// manifestsDir is where a scenario is written below Config.SocketDir.
const manifestsDir = "manifests"

// NodeEnd says that a node's proxy ended by itself, and how; Err is nil if it
// said that all was well.
type NodeEnd struct {
	Node string
	Err  error
}

// ErrRunning says that a lab of this name runs already.
var ErrRunning = errors.New("a lab runs here already: end it with `kptrace lab down`, or give this one another --name")

// Faults that Lab.Fault knows.
const (
	FaultKill      = "kill"      // end the pod's program
	FaultBlackhole = "blackhole" // the pod answers nothing and nobody
	FaultRefuse    = "refuse"    // close the pod's ports
	FaultSlow      = "slow"      // wait before each answer
	FaultReset     = "reset"     // reset connections instead of answering
	FaultAbort     = "abort"     // as a client, reset each connection after asking
	FaultLarge     = "large"     // answer with 32 KiB
	FaultVanish    = "vanish"    // answer no ARP, so that nobody finds the pod
	FaultHeal      = "heal"      // undo all of it
)

// Faults lists the faults with what they do, for help texts.
func Faults() [][2]string {
	return [][2]string{
		{FaultKill, "end the pod's program; its kernel refuses connections from then on"},
		{FaultBlackhole, "leave every packet to the pod without an answer"},
		{FaultRefuse, "close the pod's ports"},
		{FaultSlow, "make the pod wait before each answer"},
		{FaultReset, "make the pod reset each connection instead of answering"},
		{FaultAbort, "make the pod, as a client, reset each connection after it has asked"},
		{FaultLarge, "make the pod answer with 32 KiB"},
		{FaultVanish, "make the pod answer no ARP, so that its node does not find it"},
		{FaultHeal, "undo all faults of the pod"},
	}
}
