// Package e2e holds tests against a real control plane: etcd, kube-apiserver
// and upstream kube-proxy, built from their published modules. They run by
// `make e2e`, with the build tag e2e, for the programs take minutes to build
// when nobody has built them before. Like all tests they need no root.
package e2e
