//go:build tools

// Package etcd pins the etcd server that the tests run beside kube-apiserver.
// The server's module is itself a main package, so nothing else is needed.
package etcd

import _ "go.etcd.io/etcd/server/v3"
