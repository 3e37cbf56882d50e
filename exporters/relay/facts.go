package relay

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (s *Server) node() string {
	if v := s.cfg.View(); v != nil && v.Snapshot != nil && v.Snapshot.Node.Name != "" {
		return v.Snapshot.Node.Name
	}
	return s.cfg.Status().Node
}

// header says what a request is about, or why it is about nothing.
func (s *Server) header(req *trace.Request) (*trace.Header, error) {
	st := s.cfg.Status()
	h := &trace.Header{Node: s.node(), Mode: st.Mode, Version: st.Version, Blind: s.blind(&st, req)}
	for _, u := range s.cfg.Unseen() {
		h.Notes = append(h.Notes, "not seen here: "+u)
	}
	h.Since, h.FailuresSince = s.cfg.History.Since()
	if !req.Since.IsZero() && req.Since.Before(h.Since) {
		note := fmt.Sprintf("asked for connections since %s: all are held since %s",
			clock(req.Since), clock(h.Since))
		if h.FailuresSince.Before(h.Since) {
			note += ", failed ones since " + clock(h.FailuresSince)
		}
		h.Notes = append(h.Notes, note)
	}
	if st.SyncError != "" {
		h.Notes = append(h.Notes, "the last sync failed: "+st.SyncError)
	}
	v := s.cfg.View()
	if v == nil || v.Snapshot == nil {
		if !req.Wait && req.Filter.Names() {
			return nil, status.Error(codes.Aborted, "kptrace has programmed no Services yet: try again, or add --wait")
		}
		h.Notes = append(h.Notes, "no Services are programmed yet")
		return h, nil
	}
	h.Mode = cmp.Or(v.Mode, h.Mode)
	h.Services = services(v, &req.Filter)
	var missing []error
	for _, sel := range req.Filter.Resources {
		if sel.Kind != trace.SelectService || strings.Contains(sel.Name, "*") || named(h.Services, sel) {
			continue
		}
		if sel.Port == (trace.Port{}) && len(req.Filter.Ports) > 0 {
			sel.Port = req.Filter.Ports[0]
		}
		err := toStatus(MissingService(v.Snapshot, sel))
		if req.Wait && status.Code(err) == codes.NotFound {
			h.Unknown = append(h.Unknown, sel.String())
			continue
		}
		missing = append(missing, err)
	}
	if len(missing) > 0 {
		if status.Code(missing[0]) == codes.NotFound || len(missing) == len(req.Filter.Resources) {
			return nil, missing[0]
		}
		for _, err := range missing {
			if status.Code(err) == codes.NotFound {
				return nil, err
			}
			h.Notes = append(h.Notes, status.Convert(err).Message())
		}
	}
	h.Notes = append(h.Notes, unknown(v.Snapshot, &req.Filter)...)
	return h, nil
}

// unknown says which namespaces and pods of a filter nobody here has heard of. They
// may still come, so it is no error.
func unknown(snap *proxy.Snapshot, filter *trace.Filter) (notes []string) {
	if ns := filter.Namespace; ns != "" && !slices.ContainsFunc(snap.Services, func(s proxy.Service) bool { return s.Name.Namespace == ns }) {
		var all []string
		for i := range snap.Services {
			all = append(all, snap.Services[i].Name.Namespace)
		}
		slices.Sort(all)
		note := fmt.Sprintf("namespace %s has no Services", ns)
		if all = slices.Compact(all); len(all) > 0 {
			note += ": there are some in " + shorten(all)
		}
		notes = append(notes, note)
	}
	for _, sel := range slices.Concat(filter.Resources, filter.From, filter.To) {
		if sel.Kind != trace.SelectPod || sel.Namespace == "" || strings.Contains(sel.Name, "*") || len(snap.PodAddrs(sel.Namespace, sel.Name)) > 0 {
			continue
		}
		notes = append(notes, MissingPod(snap, sel.Namespace, sel.Name).Error())
	}
	return notes
}

// MissingPod says that nobody here knows a pod, and which one may be meant: an
// ErrNotFound.
func MissingPod(snap *proxy.Snapshot, namespace, name string) error {
	var here, elsewhere []string
	for _, p := range snap.Pods {
		switch {
		case p.Namespace == namespace:
			here = append(here, p.Name)
		case p.Name == name:
			elsewhere = append(elsewhere, p.Namespace)
		}
	}
	slices.Sort(here)
	slices.Sort(elsewhere)
	hint := "its address would do"
	if near := trace.Similar(name, slices.Compact(here)); len(elsewhere) > 0 {
		hint = fmt.Sprintf("it exists in namespace %s: add -n %s", elsewhere[0], elsewhere[0])
	} else if len(near) > 0 {
		hint = fmt.Sprintf("did you mean pod/%s?", near[0])
	}
	return NotFound("no pod %s/%s is known here: %s", namespace, name, hint)
}

func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// services lists the Services that the filter names.
func services(v *proxy.View, filter *trace.Filter) []trace.ServiceInfo {
	if v == nil || v.Snapshot == nil {
		return nil
	}
	var list []trace.ServiceInfo
	for i := range v.Snapshot.Services {
		svc := &v.Snapshot.Services[i]
		ways := []uint16{svc.Port}
		if svc.NodePort != 0 {
			ways = append(ways, svc.NodePort)
		}
		if !slices.ContainsFunc(ways, func(port uint16) bool {
			return filter.MatchService(trace.ServiceRef{Name: svc.Name, Addr: netip.AddrPortFrom(svc.ClusterIP, port)})
		}) {
			continue
		}
		info := trace.ServiceInfo{
			Name: svc.Name, Type: svc.Type, ClusterIP: svc.ClusterIP, Port: svc.Port, NodePort: svc.NodePort,
			Total: len(svc.Endpoints), Affinity: svc.Affinity,
		}
		for _, ep := range svc.Endpoints {
			if _, out := v.Overlay.Out[ep.Addr]; ep.Ready && !ep.Terminating && !out {
				info.Ready++
			}
		}
		list = append(list, info)
	}
	return list
}

// named reports whether sel is among services.
func named(list []trace.ServiceInfo, sel trace.Selector) bool {
	filter := trace.Filter{Resources: []trace.Selector{sel}}
	return slices.ContainsFunc(list, func(s trace.ServiceInfo) bool {
		return filter.MatchService(trace.ServiceRef{Name: s.Name, Addr: netip.AddrPortFrom(s.ClusterIP, s.Port)}) ||
			s.NodePort != 0 && filter.MatchService(trace.ServiceRef{Name: s.Name, Addr: netip.AddrPortFrom(s.ClusterIP, s.NodePort)})
	})
}

// MissingService says why there is nothing to say of a Service, and what the user
// may have meant: an ErrNotFound, or an ErrNoDecisions where it exists and no proxy
// decides about it.
func MissingService(snap *proxy.Snapshot, sel trace.Selector) error {
	in := func(ns string) bool { return sel.Namespace == "" || sel.Namespace == ns }
	full := sel.Name
	if sel.Namespace != "" {
		full = sel.Namespace + "/" + sel.Name
	}
	for _, k := range snap.Skipped {
		if k.Name == sel.Name && in(k.Namespace) {
			return &answer{fmt.Sprintf("Service %s/%s has no decisions to show: %s", k.Namespace, k.Name, skipReason(k.Reason)), ErrNoDecisions}
		}
	}
	var here, elsewhere, names, ports []string
	for i := range snap.Services {
		n := snap.Services[i].Name
		switch {
		case in(n.Namespace) && n.Name == sel.Name:
			ports = append(ports, cmp.Or(n.Port, fmt.Sprint(snap.Services[i].Port)))
		case n.Name == sel.Name:
			elsewhere = append(elsewhere, n.Namespace)
		case in(n.Namespace):
			here = append(here, n.Name)
		}
		names = append(names, n.Namespace+"/"+n.Name)
	}
	here, elsewhere, ports = slices.Compact(here), slices.Compact(elsewhere), slices.Compact(ports)
	text := fmt.Sprintf("no Service %s", full)
	switch near := trace.Similar(sel.Name, here); {
	case len(ports) > 0:
		text = fmt.Sprintf("Service %s has no port %s: it has %s", full, sel.Port, strings.Join(ports, ", "))
	case len(elsewhere) > 0:
		text += fmt.Sprintf(": it exists in namespace %s: add -n %s", strings.Join(elsewhere, ", "), elsewhere[0])
	case len(near) > 0:
		text += ": did you mean svc/" + strings.Join(near, " or svc/") + "?"
	case len(here) > 0:
		text += fmt.Sprintf(": namespace %s has %s", sel.Namespace, shorten(here))
	case len(names) > 0:
		text += fmt.Sprintf(": namespace %s has no Services; there are %s", sel.Namespace, shorten(slices.Compact(names)))
	default:
		text += ": there are no Services at all"
	}
	for _, p := range snap.Problems {
		if strings.HasSuffix(p.Object, " "+full) {
			text += "; a problem with it: " + p.Error()
		}
	}
	return &answer{text, ErrNotFound}
}

func shorten(names []string) string {
	const most = 8
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

func skipReason(code string) string {
	switch code {
	case "headless":
		return "it is headless (clusterIP: None): clients get all endpoint addresses by DNS and choose one themselves, no proxy is involved"
	case "ExternalName":
		return "it is of type ExternalName: a DNS alias that no connection passes through"
	case "service-proxy-name":
		return "its label service.kubernetes.io/service-proxy-name gives it to another proxy"
	}
	return code
}

// blind lists what cannot be seen here.
func (s *Server) blind(st *Status, req *trace.Request) []string {
	list := []string{"clients on other nodes, unless their connection enters by a node port here"}
	if !req.Direct {
		list = append([]string{"connections made straight to an endpoint's address, past the Service, but for their number: --direct shows them"}, list...)
	}
	list = append(list, st.Blind...)
	for _, src := range st.Sources {
		if src.Note != "" {
			list = append(list, src.Source.String()+": "+src.Note)
		}
	}
	return list
}

// idle gathers the facts from which a follower's silence can be explained.
func (s *Server) idle(f *follower, now time.Time) *trace.Idle {
	st := s.cfg.Status()
	v := s.cfg.View()
	i := &trace.Idle{
		For: now.Sub(f.lastSent), Synced: st.Synced, SyncError: st.SyncError, Others: f.others,
		Sources: st.Sources, Blind: s.blind(&st, &f.req), Services: services(v, &f.req.Filter),
		Direct: f.direct(),
	}
	names := make([]proxy.PortName, len(i.Services))
	for k := range i.Services {
		names[k] = i.Services[k].Name
	}
	i.Findings = s.cfg.Findings(names)
	if v != nil && v.Program != nil {
		for _, r := range v.Program.Index() {
			if !f.req.Filter.Names() || r.Service.Name != "" && slices.ContainsFunc(i.Services, func(s trace.ServiceInfo) bool {
				return s.Name == r.Service
			}) {
				i.Rules++
			}
		}
	}
	if last := s.cfg.History.Query(f.settled, time.Time{}, 1); len(last) > 0 {
		i.Last = last[0].Start
	}
	return i
}

// existing lists the flows open now that the filter selects, by endpoint.
func (s *Server) existing(req *trace.Request) []*trace.Flow {
	var flows []*trace.Flow
	s.cfg.Live(func(f *trace.Flow) bool {
		if !f.Ended && req.Filter.Match(f) && (req.Direct || !f.Direct()) {
			flows = append(flows, f)
		}
		return true
	})
	slices.SortFunc(flows, func(a, b *trace.Flow) int {
		return cmp.Or(
			a.Service.Name.Compare(b.Service.Name),
			a.Backend.Addr.Compare(b.Backend.Addr),
			trace.CompareFlows(a, b),
		)
	})
	return flows
}
