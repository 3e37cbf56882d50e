package relay

import (
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// direct counts the connections made straight to endpoints since the follower
// began, if it names Services to those of them.
func (f *follower) direct() (sum trace.Direct) {
	wanted := f.targets()
	for t, n := range f.s.cfg.Direct() {
		if wanted == nil || wanted[t] {
			sum = sum.Add(n.Since(f.straight[t]))
		}
	}
	return sum
}

// targets are the endpoints of the Services that the request names, nil for all.
func (f *follower) targets() map[trace.Target]bool {
	if !f.req.Filter.Names() {
		return nil
	}
	v := f.s.cfg.View()
	named := make(map[proxy.PortName]bool)
	for _, s := range services(v, &f.req.Filter) {
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

// named is a connection past Services by the name of the Service that was asked
// for, if the endpoint is one of that too.
func (f *follower) named(flow *trace.Flow) *trace.Flow {
	v := f.s.cfg.View()
	if f.settled.Match(flow) || v == nil || v.Snapshot == nil {
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
				if f.settled.Match(&other) {
					return &other
				}
			}
		}
	}
	return flow
}
