package lab

import (
	"io"
	"log/slog"
)

// Config says what lab to make.
type Config struct {
	// Dir is the folder of manifests. The nodes' proxies watch it; the lab
	// itself reads it once, so a Pod or Node added later has no namespace.
	Dir string
	// SocketDir is where nodes and the lab put their sockets; it is made if
	// it is absent. See SocketDir.
	SocketDir string
	// Self is the command that runs this binary, as kptrace; nil means
	// /proc/self/exe. A test gives its own binary, whose TestMain calls
	// RunPod when the arguments are "lab", "pod".
	Self []string
	// NoProxy leaves nodes without a proxy: a LAN with routed pods.
	NoProxy bool
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

// Faults that Lab.Fault knows.
const (
	FaultKill      = "kill"      // end the pod's program
	FaultBlackhole = "blackhole" // the pod answers nothing and nobody
	FaultRefuse    = "refuse"    // close the pod's ports
	FaultSlow      = "slow"      // wait before each answer
	FaultHeal      = "heal"      // undo all of it
)

// Faults lists the faults with what they do, for help texts.
func Faults() [][2]string {
	return [][2]string{
		{FaultKill, "end the pod's program; its kernel refuses connections from then on"},
		{FaultBlackhole, "leave every packet to the pod without an answer"},
		{FaultRefuse, "close the pod's ports"},
		{FaultSlow, "make the pod wait before each answer"},
		{FaultHeal, "undo all faults of the pod"},
	}
}
