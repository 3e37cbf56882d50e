// Package lab is a cluster in namespaces on this machine: nodes that run the
// kptrace binary itself, pods with built-in servers and clients, outside
// clients, and faults on request.
//
// Start makes it inside a sandbox (internal/netns): one network namespace per
// node, pod and outside client and one for the LAN between them, joined by
// veth pairs with routed pod networks. State is a folder of ordinary
// Kubernetes YAML. Nothing is named or mounted and every process is a child
// that dies with this one, so all of it vanishes with the process, however
// that ends.
//
// The pure half, usable everywhere, decides: Read makes a Cluster of
// manifests, Plan a Topology of a Cluster, Judge a Summary of what clients
// reported and what was shown. The Linux half carries it out.
//
// Every program in a pod tells the lab what happened to each connection it
// made (Report). That is the oracle against which kptrace's own account is
// held.
package lab
