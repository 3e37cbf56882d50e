package node

import (
	"fmt"

	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/proxy"
)

// relayCounters are the metrics of the userspace mode.
func relayCounters(s proxy.RelayStats) []prom.Counter {
	counter := func(name, help string, n uint64, labels ...string) prom.Counter {
		return prom.Counter{Name: "kptrace_userspace_" + name, Help: help, Value: float64(n), Labels: labels}
	}
	gauge := func(name, help string, n int, labels ...string) prom.Counter {
		return prom.Counter{Name: "kptrace_userspace_" + name, Help: help, Value: float64(n), Labels: labels, Gauge: true}
	}
	const dials = "Dials to endpoints by how they went; for UDP, first answers and refusals."
	out := []prom.Counter{
		gauge("connections_open", "TCP connections relayed at the moment.", s.Open),
		gauge("udp_sessions_open", "UDP clients with a session at the moment.", s.Sessions),
		gauge("listeners", "Ports at which the proxy listens, one for each Service port and family.", s.Listeners),
		gauge("affinity_clients", "Clients whose endpoint is remembered for session affinity.", s.AffinityClients),
		gauge("descriptors_in_use", "File descriptors in use for connections, sessions and ports.", s.Descriptors),
		gauge("descriptors_limit", "File descriptors there may be for connections, sessions and ports.", s.MaxDescriptors),
		counter("connections_accepted_total", "TCP connections accepted.", s.Accepted),
		counter("udp_sessions_total", "UDP sessions made.", s.SessionsMade),
		counter("datagrams_received_total", "Datagrams received from clients.", s.Datagrams),
		counter("dials_total", dials, s.Connected, "outcome", "connected"),
		counter("dials_total", dials, s.Refused, "outcome", "refused"),
		counter("dials_total", dials, s.Unreachable, "outcome", "unreachable"),
		counter("dials_total", dials, s.TimedOut, "outcome", "timeout"),
		counter("dials_total", dials, s.Failed, "outcome", "other"),
		counter("connections_retried_total", "Connections that reached an endpoint after one or more dials had failed.", s.Retried),
		counter("connections_unserved_total", "Connections that no endpoint took.", s.Unserved),
		counter("affinity_resets_total", "Clients that lost their endpoint because it could not be reached.", s.AffinityResets),
		counter("affinity_evictions_total", "Clients forgotten because there were too many.", s.AffinityEvicted),
		counter("bytes_total", "Bytes of payload relayed.", s.Out, "direction", "out"),
		counter("bytes_total", "Bytes of payload relayed.", s.In, "direction", "in"),
		counter("datagrams_dropped_total", "Datagrams dropped for want of room.", s.Dropped),
		counter("direct_connections_total", "Connections to a port of the proxy that no rule led there; they are closed.", s.Direct),
		counter("descriptor_waits_total", "Connections that waited for file descriptors.", s.Waits),
		counter("descriptor_exhausted_total", "Times the kernel or the limit refused a file descriptor.", s.Exhausted),
	}
	if s.PortRange != "" {
		out = append(out, gauge("ports_free", "Ports of --proxy-port-range that are left.", s.PortsFree))
	}
	return out
}

// relayWords is what status says of the userspace mode's work, behind the
// flavour and why it was chosen.
func relayWords(s proxy.RelayStats) string {
	text := fmt.Sprintf("; relays %d connections and %d UDP sessions at %d ports, with %d of %d descriptors",
		s.Open, s.Sessions, s.Listeners, s.Descriptors, s.MaxDescriptors)
	if s.PortRange != "" {
		text += fmt.Sprintf(", %d ports of %s free", s.PortsFree, s.PortRange)
	}
	if s.Waits+s.Dropped+s.Exhausted > 0 {
		text += fmt.Sprintf("; %d connections waited for descriptors, %d datagrams were dropped: raise the limit (ulimit -n)", s.Waits+s.Exhausted, s.Dropped)
	}
	return text
}
