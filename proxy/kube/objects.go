package kube

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Objects is what a Snapshot is made of, from wherever it came.
type Objects struct {
	Services []corev1.Service
	Slices   []discoveryv1.EndpointSlice
	Pods     []corev1.Pod
	Nodes    []corev1.Node
	// Origin names the file an object came from by kind/namespace/name;
	// empty for objects of an API server.
	Origin map[string]string
}

// file finds the origin of an object by the name that a Problem gives it.
func (o *Objects) file(object string) string {
	kind, name, _ := strings.Cut(object, " ")
	namespace, rest, ok := strings.Cut(name, "/")
	if !ok {
		namespace, rest = "", name
	}
	return o.Origin[Key(kind, namespace, rest)]
}

// Key is the key of Origin.
func Key(kind, namespace, name string) string { return kind + "/" + namespace + "/" + name }
