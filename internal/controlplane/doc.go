// Package controlplane runs etcd and kube-apiserver on loopback for tests. It
// needs no root: ports are free ones of the caller's network namespace,
// certificates and tokens are made for the run, and both programs die with the
// process that started them. Ready in about 4 s, with 310 MB.
//
// There is no controller-manager and no scheduler: who uses it writes
// EndpointSlices and Nodes himself. The API server does allocate cluster IPs
// and node ports.
//
// scripts/controlplane.sh builds the programs from their published modules, in
// the versions that test/controlplane pins, and prints their folder.
package controlplane
