package umlguest

import (
	"io"
	"os"
	"time"
)

// Kernel is the program that Debian's package user-mode-linux installs.
const Kernel = "linux.uml"

// DefaultMemory is the guest's memory in MiB where Spec.Memory is zero. The
// host gives only what the guest has touched.
const DefaultMemory = 768

// Spec describes one run of our own binary in a guest.
type Spec struct {
	// Args are the arguments after the program's name, which is kept.
	Args []string
	// Env is appended to our environment; the last value of a name wins.
	Env []string
	// Dir is the working directory; empty means ours.
	Dir string
	// Stdin, Stdout and Stderr are the program's; nil means nothing is read
	// or kept. The program sees pipes, never a terminal.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Share lists folders of the host that the program may write to, at
	// their own paths. Everything else is read-only, but /run, /tmp and /dev
	// are the guest's own where that hides nothing the program needs.
	Share []string
	// Modules are loaded beside the usual ones (see Modules).
	Modules []string
	// Memory is the guest's, in MiB; zero means DefaultMemory.
	Memory int
	// Forward lists signals that Run catches while the program runs and
	// hands on to it.
	Forward []os.Signal
	// Grace is how long the program may take to end after the context has
	// ended and it was sent SIGTERM; then the guest is killed. Zero means
	// five seconds, negative kills at once.
	Grace time.Duration
	// Booted is called, where it is not nil, once the guest is up and its
	// modules are loaded.
	Booted func(Info)
}

// Info is what a guest says about itself.
type Info struct {
	// Release is the kernel's, as uname -r prints it.
	Release string `json:"release"`
	// CPUs is how many it has: one.
	CPUs int `json:"cpus"`
	// Missing are modules that could not be loaded, with the reason.
	Missing map[string]string `json:"missing,omitempty"`
}

// Modules are what a guest always loads: IPVS with all schedulers, the packet
// filter, conntrack with its netlink interface, ipset, and the links that a
// node and its pods are made of.
func Modules() []string {
	return []string{
		"ip_vs", "ip_vs_rr", "ip_vs_wrr", "ip_vs_lc", "ip_vs_wlc", "ip_vs_dh", "ip_vs_sh",
		"ip_vs_sed", "ip_vs_nq", "ip_vs_lblc", "ip_vs_lblcr", "ip_vs_mh", "ip_vs_fo", "ip_vs_ovf",
		"dummy", "veth", "bridge", "br_netfilter", "sctp",
		"iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw",
		"ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw",
		"nf_conntrack_netlink", "nfnetlink_log", "nfnetlink_acct", "nf_log_syslog",
		"ip_set_hash_ip", "ip_set_hash_net", "ip_set_hash_ipport", "ip_set_hash_ipportip",
		"ip_set_hash_ipportnet", "ip_set_bitmap_port", "xt_set", "xt_ipvs",
		"xt_NFLOG", "xt_TRACE", "xt_MASQUERADE", "xt_REDIRECT", "xt_nat", "xt_mark",
		"xt_comment", "xt_conntrack", "xt_statistic", "xt_recent", "xt_addrtype", "xt_physdev",
		"xt_multiport", "xt_limit", "xt_connmark", "xt_connbytes", "xt_nfacct", "xt_tcpudp",
		"xt_sctp", "xt_string", "ipt_REJECT", "ip6t_REJECT",
	}
}
