package liverules

import (
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
)

// owners tells programs by the names of their chains, the longer prefix first
// where one begins with the other.
var owners = []struct{ prefix, owner string }{
	{"KUBE-ROUTER-", "kube-router"}, {"KUBE-POD-FW-", "NetworkPolicy (kube-router)"},
	{"KUBE-NWPLCY-", "NetworkPolicy (kube-router)"},
	{"KUBE-KUBELET-", "kubelet"}, {"KUBE-IPTABLES-HINT", "kubelet"}, {"KUBE-FIREWALL", "kubelet or kube-proxy"},
	{"KUBE-", "kube-proxy"}, {"KPTRACE", "kptrace"},
	{"cali-tw-", "NetworkPolicy (Calico)"}, {"cali-fw-", "NetworkPolicy (Calico)"},
	{"cali-pi-", "NetworkPolicy (Calico)"}, {"cali-po-", "NetworkPolicy (Calico)"},
	{"cali-", "Calico"}, {"CILIUM_", "Cilium"}, {"OLD_CILIUM_", "Cilium"},
	{"ANTREA-", "Antrea"}, {"WEAVE-NPC", "NetworkPolicy (Weave)"}, {"WEAVE-", "Weave"}, {"FLANNEL-", "flannel"},
	{"AWS-", "the AWS VPC CNI"}, {"OPENSHIFT-", "OpenShift"}, {"IP-MASQ", "ip-masq-agent"},
	{"CNI-ISOLATION-", "the CNI firewall plugin"}, {"CNI-ADMIN", "the CNI firewall plugin"}, {"CNI-FORWARD", "the CNI firewall plugin"},
	{"CNI-HOSTPORT-", "the CNI portmap plugin (hostPort)"}, {"CNI-DN-", "the CNI portmap plugin (hostPort)"},
	{"CNI-SN-", "the CNI portmap plugin (hostPort)"}, {"CNI-", "a CNI plugin"},
	{"DOCKER", "Docker"}, {"NETAVARK", "Podman"}, {"LIBVIRT_", "libvirt"}, {"LXC", "LXC"},
	{"ISTIO_", "Istio"}, {"PROXY_INIT_", "Linkerd"}, {"f2b-", "fail2ban"}, {"ts-", "Tailscale"},
	{"ufw6-", "ufw"}, {"ufw-", "ufw"}, {"NOTRACK-", "NodeLocal DNSCache"},
	{"INPUT_ZONES", "firewalld"}, {"FORWARD_IN_ZONES", "firewalld"}, {"FORWARD_OUT_ZONES", "firewalld"},
	{"INPUT_direct", "firewalld"}, {"FORWARD_direct", "firewalld"}, {"OUTPUT_direct", "firewalld"},
	{"FORWARD_POLICIES", "firewalld"}, {"PREROUTING_ZONES", "firewalld"}, {"POSTROUTING_ZONES", "firewalld"},
	{"PREROUTING_direct", "firewalld"}, {"POSTROUTING_direct", "firewalld"},
	{"FWDI_", "firewalld"}, {"FWDO_", "firewalld"}, {"FWD_", "firewalld"}, {"IN_", "firewalld"}, {"OUT_", "firewalld"},
}

// PolicyOwner tells who is known to set the policy of a built-in chain of filter, by
// what else he has there; empty where nobody is.
func PolicyOwner(rs *xtables.Ruleset, chain string) string {
	for _, o := range []struct{ chain, owner string }{
		{"ufw-before-forward", "ufw"}, {"ufw6-before-forward", "ufw"}, {"DOCKER", "Docker"}, {"DOCKER-USER", "Docker"},
	} {
		if rs.Chain("filter", o.chain) != nil && (chain == "FORWARD" || o.owner == "ufw") {
			return o.owner
		}
	}
	return ""
}

// TableOwner tells whose a table of nf_tables is, empty where its name does not say so.
func TableOwner(table string) string {
	for _, o := range []struct{ prefix, owner string }{
		{"firewalld", "firewalld"}, {"calico", "Calico"}, {"docker-bridges", "Docker"}, {"netavark", "Podman"}, {"libvirt_network", "libvirt"},
		{"f2b-table", "fail2ban"}, {"flannel-", "flannel"}, {"kindnet", "kindnet"}, {"kube-network-policies", "NetworkPolicy (kube-network-policies)"},
		{"kube-router", "kube-router"}, {"istio-", "Istio"}, {"cni_", "a CNI plugin"}, {"incus", "Incus"}, {"lxc", "LXC"}, {"lxd", "LXD"}, {"kube-proxy", "kube-proxy"},
	} {
		if strings.HasPrefix(table, o.prefix) {
			return o.owner
		}
	}
	return ""
}

// Owner tells by whose hand a rule in a chain is, empty where neither the
// chain's name, nor where the rule leads, nor its comment says so. A nil rule
// asks for the chain itself.
func Owner(table, chain string, r *xtables.Rule) string {
	for _, o := range owners {
		if strings.HasPrefix(chain, o.prefix) {
			return o.owner
		}
	}
	if r == nil {
		return ""
	}
	for _, o := range owners {
		if strings.HasPrefix(r.Target, o.prefix) {
			return o.owner
		}
	}
	c := r.Comment()
	switch {
	case strings.HasPrefix(c, "cali:"):
		return "Calico"
	case strings.HasPrefix(c, "NodeLocal DNS Cache"):
		return "NodeLocal DNSCache"
	case strings.HasPrefix(c, "flanneld"):
		return "flannel"
	case strings.HasPrefix(c, "cilium"):
		return "Cilium"
	case strings.HasPrefix(c, "kubernetes"), strings.HasPrefix(c, "kptrace"):
		return strings.ReplaceAll(strings.Fields(strings.ReplaceAll(c, ":", " "))[0], "kubernetes", "kube-proxy")
	case strings.Contains(c, "docker"), r.In.Name == "docker0", r.Out.Name == "docker0", strings.HasPrefix(r.In.Name, "br-"), strings.HasPrefix(r.Out.Name, "br-"):
		return "Docker"
	case strings.HasPrefix(r.In.Name, "virbr"), strings.HasPrefix(r.Out.Name, "virbr"):
		return "libvirt"
	}
	return ""
}
