// Package dataplane finds out who else handles packets to Services in this network
// namespace, past the rules that a kube-proxy writes: by the names of eBPF
// programs, devices and chains, which projects have of their own, and by
// flowtables.
//
// A sign says that somebody can translate or carry packets, not that he does:
// Cilium has programs at devices also where a kube-proxy does Services.
package dataplane

import "strings"

// Sign is a thing that tells of a data plane.
type Sign struct {
	// Who is the project, What the thing that it was known by.
	Who, What string
	// Sure says that it handles Services.
	Sure bool
}

// String returns "Cilium (eBPF program cil_from_netdev at eth0)".
func (s Sign) String() string { return s.Who + " (" + s.What + ")" }

// device tells whose a device is, and whether who makes it handles Services.
func device(name string) (who string, sure bool) {
	switch name {
	case "cilium_host":
		return "Cilium", false
	case "bpfin.cali":
		return "Calico's eBPF data plane", true
	case "antrea-gw0":
		return "Antrea's AntreaProxy", false
	case "ovn-k8s-mp0":
		return "OVN-Kubernetes", true
	}
	return "", false
}

// Program tells whose an eBPF program is by its name, of which the kernel keeps 15
// letters, and whether it translates connections to Services as they are made. It is
// empty for others' programs.
func Program(name string) (who string, sure bool) {
	for _, p := range []struct{ prefix, who string }{
		{"cil_", "Cilium"}, {"bpf_lxc", "Cilium"}, {"bpf_netdev", "Cilium"}, {"bpf_host", "Cilium"},
		{"calico_", "Calico's eBPF data plane"}, {"cali_", "Calico's eBPF data plane"},
	} {
		if strings.HasPrefix(name, p.prefix) {
			return p.who, strings.Contains(name, "connect") || strings.Contains(name, "_sock")
		}
	}
	return "", false
}

// Chain tells which mesh redirects connections by a chain of nat, empty for other
// chains.
func Chain(name string) (who string) {
	switch {
	case strings.HasPrefix(name, "ISTIO_"):
		return "Istio"
	case strings.HasPrefix(name, "PROXY_INIT_"):
		return "Linkerd"
	}
	return ""
}
