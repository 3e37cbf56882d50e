// Package kube turns Kubernetes objects into a proxy.Snapshot. It is the home
// of the Kubernetes types: no other part of the proxy knows them.
//
// Convert is pure. A bad object, or a bad field of one, becomes a
// proxy.Problem that names it; everything else is converted.
package kube
