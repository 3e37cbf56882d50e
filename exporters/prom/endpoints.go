package prom

// EndpointHealth is what checking endpoints has found out (kptrace proxy
// --server-health).
type EndpointHealth struct {
	// Out is how many get no new connections now.
	Out int
	// Outs counts how often one was taken out, Kept how often one stayed that
	// should have been, because too few others of its Service were left.
	Outs, Kept uint64
	// Answered and Failed count our own connections, Freed half-open ones of
	// clients that were let go.
	Answered, Failed, Freed uint64
}

func collectEndpointHealth(s sender, h EndpointHealth) {
	s.gauge("kptrace_endpoints_out", "Endpoints that get no new connections because they do not answer.", float64(h.Out))
	s.counter("kptrace_endpoint_outs_total", "How often an endpoint was taken out because it did not answer.", float64(h.Outs))
	s.counter("kptrace_endpoint_outs_refused_total", "How often an endpoint that did not answer stayed, because too few others of its Service were left.", float64(h.Kept))
	const probes = "Connections made to endpoints to see whether they answer, by result."
	s.counter("kptrace_endpoint_probes_total", probes, float64(h.Answered), "result", "answered")
	s.counter("kptrace_endpoint_probes_total", probes, float64(h.Failed), "result", "failed")
	s.counter("kptrace_endpoint_connections_freed_total", "Half-open connections to endpoints taken out that were removed from conntrack, so that the client's next SYN goes elsewhere.", float64(h.Freed))
}
