package proxy

import "strings"

// ObjectRef names an object of Kubernetes.
type ObjectRef struct {
	// Kind is as in manifests: Service, EndpointSlice, Pod, Node. Namespace is
	// empty for a Node.
	Kind, Namespace, Name string
}

// String returns "Service shop/foo" or "Node node1", as Problem.Object has it.
func (r ObjectRef) String() string {
	if r.Namespace == "" {
		return r.Kind + " " + r.Name
	}
	return r.Kind + " " + r.Namespace + "/" + r.Name
}

// ParseObjectRef reads what String wrote. It reports false for anything else.
func ParseObjectRef(s string) (ObjectRef, bool) {
	kind, name, ok := strings.Cut(s, " ")
	if !ok || kind == "" || name == "" || strings.Contains(name, " ") {
		return ObjectRef{}, false
	}
	namespace, rest, namespaced := strings.Cut(name, "/")
	if !namespaced {
		return ObjectRef{Kind: kind, Name: name}, true
	}
	if namespace == "" || rest == "" || strings.Contains(rest, "/") {
		return ObjectRef{}, false
	}
	return ObjectRef{Kind: kind, Namespace: namespace, Name: rest}, true
}

// EventType is the type of a Kubernetes Event.
type EventType string

// The types of Events that Kubernetes knows.
const (
	EventNormal  EventType = "Normal"
	EventWarning EventType = "Warning"
)

// ObjectEvent is something to be found at a Kubernetes object, by kubectl
// describe or kubectl get events.
type ObjectEvent struct {
	Object ObjectRef
	Type   EventType
	// Reason is why, Action what was tried: words in UpperCamelCase for
	// programs, at most 128 bytes.
	Reason, Action string
	// Note says it to people, at most 1,024 bytes.
	Note string
	// Shared says that every node of a cluster would say the same: it is
	// written once for all of them.
	Shared bool
}
