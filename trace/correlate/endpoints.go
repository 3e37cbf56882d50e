package correlate

import (
	"slices"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// endpointIndex tells whose an endpoint is in the newest generation. It goes from
// one generation to the next by what differs: made anew, 50,000 endpoints cost some
// 30 ms.
type endpointIndex struct {
	of *proxy.Snapshot
	// first is the Service port of an endpoint, the first by name; more are the
	// others, in order, where several have it.
	first map[trace.Target]proxy.PortName
	more  map[trace.Target][]proxy.PortName
}

// follow goes on to a generation, and says whether that is another one.
func (x *endpointIndex) follow(s *proxy.Snapshot) bool {
	if x.of == s {
		return false
	}
	var old []proxy.Service
	if x.of != nil {
		old = x.of.Services
	}
	x.of = s
	if x.first == nil || !slices.IsSortedFunc(old, byName) || !slices.IsSortedFunc(s.Services, byName) {
		x.first, x.more, old = make(map[trace.Target]proxy.PortName), make(map[trace.Target][]proxy.PortName), nil
	}
	now := s.Services
	for len(old) > 0 || len(now) > 0 {
		switch c := compareNext(old, now); {
		case c < 0:
			x.change(&old[0], nil)
			old = old[1:]
		case c > 0:
			x.change(nil, &now[0])
			now = now[1:]
		default:
			x.change(&old[0], &now[0])
			old, now = old[1:], now[1:]
		}
	}
	return true
}

// byName orders Services as a Snapshot does.
func byName(a, b proxy.Service) int {
	if n := a.Name.Compare(b.Name); n != 0 {
		return n
	}
	return a.ClusterIP.Compare(b.ClusterIP)
}

func compareNext(a, b []proxy.Service) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return byName(a[0], b[0])
}

// change takes a Service port from one generation to the next; nil is where it is
// not there.
func (x *endpointIndex) change(from, to *proxy.Service) {
	var old, now []proxy.Endpoint
	if from != nil {
		old = from.Endpoints
	}
	if to != nil {
		now = to.Endpoints
	}
	if len(old) > 0 && len(old) == len(now) && &old[0] == &now[0] {
		return // the same list
	}
	for len(old) > 0 && len(now) > 0 && old[0].Addr == now[0].Addr {
		old, now = old[1:], now[1:]
	}
	for len(old) > 0 && len(now) > 0 && old[len(old)-1].Addr == now[len(now)-1].Addr {
		old, now = old[:len(old)-1], now[:len(now)-1]
	}
	for i := range old {
		x.remove(target(from, old[i]), from.Name)
	}
	for i := range now {
		x.add(target(to, now[i]), to.Name)
	}
}

func target(s *proxy.Service, e proxy.Endpoint) trace.Target {
	return trace.Target{Proto: s.Name.Proto, Addr: e.Addr}
}

func (x *endpointIndex) add(t trace.Target, name proxy.PortName) {
	first, has := x.first[t]
	if !has {
		x.first[t] = name
		return
	}
	if name.Compare(first) < 0 {
		x.first[t], name = name, first
	}
	list := x.more[t]
	i, _ := slices.BinarySearchFunc(list, name, proxy.PortName.Compare)
	x.more[t] = slices.Insert(list, i, name)
}

func (x *endpointIndex) remove(t trace.Target, name proxy.PortName) {
	list := x.more[t]
	i := slices.Index(list, name)
	switch {
	case x.first[t] != name && i >= 0:
		list = slices.Delete(list, i, i+1)
	case x.first[t] != name:
		return
	case len(list) > 0:
		x.first[t] = list[0]
		list = slices.Delete(list, 0, 1)
	default:
		delete(x.first, t)
	}
	if len(list) > 0 {
		x.more[t] = list
	} else {
		delete(x.more, t)
	}
}
