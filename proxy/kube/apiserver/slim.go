package apiserver

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// sharing makes what all endpoints have alike one thing: 50,000 of them name some
// hundred nodes and namespaces. Only one reflector uses it.
type sharing struct {
	texts   map[string]*string
	yes, no bool
}

// maxShared bounds the texts. Beyond it the sharing begins anew.
const maxShared = 20_000

func newSharing() *sharing { return &sharing{texts: map[string]*string{}, yes: true} }

// text returns a text equal to s, the same one for equal ones.
func (sh *sharing) text(s string) string { return *sh.pointer(&s) }

func (sh *sharing) pointer(p *string) *string {
	if p == nil {
		return nil
	}
	if have := sh.texts[*p]; have != nil {
		return have
	}
	if len(sh.texts) >= maxShared {
		clear(sh.texts)
	}
	sh.texts[*p] = p
	return p
}

func (sh *sharing) condition(p *bool) *bool {
	switch {
	case p == nil:
		return nil
	case *p:
		return &sh.yes
	}
	return &sh.no
}

// stripSlice drops of an EndpointSlice what nobody here reads, and shares what is
// alike.
func (sh *sharing) stripSlice(obj any) any {
	s, ok := stripObject(obj).(*discoveryv1.EndpointSlice)
	if !ok {
		return obj
	}
	s.Namespace, s.GenerateName, s.OwnerReferences = sh.text(s.Namespace), "", nil
	labels := s.Labels
	s.Labels = map[string]string{}
	for _, k := range [...]string{discoveryv1.LabelServiceName, corev1.IsHeadlessService} {
		if v, ok := labels[k]; ok {
			s.Labels[k] = v
		}
	}
	exact := make([]discoveryv1.Endpoint, len(s.Endpoints))
	for i := range s.Endpoints {
		ep := &s.Endpoints[i]
		exact[i] = discoveryv1.Endpoint{
			Addresses: ep.Addresses, Hints: ep.Hints, NodeName: sh.pointer(ep.NodeName), Zone: sh.pointer(ep.Zone),
			Conditions: discoveryv1.EndpointConditions{Ready: sh.condition(ep.Conditions.Ready),
				Serving: sh.condition(ep.Conditions.Serving), Terminating: sh.condition(ep.Conditions.Terminating)},
		}
		if r := ep.TargetRef; r != nil {
			exact[i].TargetRef = &corev1.ObjectReference{Kind: sh.text(r.Kind), Namespace: sh.text(r.Namespace), Name: r.Name, UID: r.UID}
		}
	}
	s.Endpoints = exact
	return s
}
