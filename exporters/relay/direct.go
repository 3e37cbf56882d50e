package relay

import (
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// direct counts the connections made straight to endpoints since the follower
// began, if it names Services to those of them.
func (f *follower) direct() (sum trace.Direct) {
	since := make(map[trace.Target]trace.Direct)
	for t, n := range f.s.cfg.Direct() {
		since[t] = n.Since(f.straight[t])
	}
	return SumDirect(f.s.cfg.View(), &f.req.Filter, since)
}

// named is a connection past Services by the name of the Service that was asked
// for, if the endpoint is one of that too.
func (f *follower) named(flow *trace.Flow) *trace.Flow {
	return NameDirect(f.s.cfg.View(), &f.settled, flow)
}

// SumDirect adds up connections made straight to endpoints: where a filter names
// Services, those to theirs in a generation.
func SumDirect(v *proxy.View, filter *trace.Filter, counts map[trace.Target]trace.Direct) (sum trace.Direct) {
	wanted := targets(v, filter)
	for t, n := range counts {
		if wanted == nil || wanted[t] {
			sum = sum.Add(n)
		}
	}
	return sum
}

// targets are the endpoints of the Services that a filter names, nil for all.
func targets(v *proxy.View, filter *trace.Filter) map[trace.Target]bool {
	if !filter.Names() {
		return nil
	}
	named := make(map[proxy.PortName]bool)
	for _, s := range services(v, filter) {
		named[s.Name] = true
	}
	wanted := make(map[trace.Target]bool)
	if len(named) == 0 {
		return wanted
	}
	for i := range v.Snapshot.Services {
		if s := &v.Snapshot.Services[i]; named[s.Name] {
			for j := range s.Endpoints {
				wanted[trace.Target{Proto: s.Name.Proto, Addr: s.Endpoints[j].Addr}] = true
			}
		}
	}
	return wanted
}

// NameDirect is a connection made straight to an endpoint by the name of a Service
// that a filter selects, if the endpoint is one of that too.
func NameDirect(v *proxy.View, filter *trace.Filter, flow *trace.Flow) *trace.Flow {
	if filter.Match(flow) || v == nil || v.Snapshot == nil {
		return flow
	}
	for i := range v.Snapshot.Services {
		s := &v.Snapshot.Services[i]
		if s.Name.Proto != flow.Tuple.Proto() || s.Name == flow.Service.Name {
			continue
		}
		for j := range s.Endpoints {
			if s.Endpoints[j].Addr == flow.Backend.Addr {
				other := *flow
				other.Service.Name = s.Name
				if filter.Match(&other) {
					return &other
				}
			}
		}
	}
	return flow
}
