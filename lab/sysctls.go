package lab

// hostSysctls let a namespace take packets however they came: filters of the
// reverse path and redirects would only explain the lab, not Services.
func hostSysctls() []Sysctl {
	return []Sysctl{
		{"net/ipv4/conf/all/rp_filter", "0", false},
		{"net/ipv4/conf/default/rp_filter", "0", false},
		{"net/ipv4/conf/all/send_redirects", "0", false},
		{"net/ipv4/conf/default/send_redirects", "0", false},
	}
}

func nodeSysctls(opt Options) []Sysctl {
	list := append(hostSysctls(), Sysctl{"net/ipv4/ip_forward", "1", false})
	if opt.Bridge {
		list = append(list, Sysctl{"net/bridge/bridge-nf-call-iptables", "1", false})
	}
	if opt.KernelTimeouts {
		return list
	}
	for _, s := range []struct{ name, seconds string }{
		{"tcp_timeout_syn_sent", "10"},
		{"tcp_timeout_syn_recv", "10"},
		{"tcp_timeout_fin_wait", "5"},
		{"tcp_timeout_close_wait", "10"},
		{"tcp_timeout_last_ack", "5"},
		{"tcp_timeout_time_wait", "5"},
		{"tcp_timeout_close", "2"},
		{"udp_timeout", "4"},
		{"udp_timeout_stream", "8"},
		{"icmp_timeout", "4"},
	} {
		// Absent until the module is loaded, where it is one.
		list = append(list, Sysctl{"net/netfilter/nf_conntrack_" + s.name, s.seconds, true})
	}
	return list
}

// clientSysctls let a pod open many connections a second to one address
// without running out of ports.
func clientSysctls() []Sysctl {
	return append(hostSysctls(),
		Sysctl{"net/ipv4/ip_local_port_range", "10000 65000", true},
		Sysctl{"net/ipv4/tcp_tw_reuse", "1", true},
		Sysctl{"net/ipv4/tcp_max_tw_buckets", "2048", true},
		Sysctl{"net/ipv4/tcp_fin_timeout", "5", true},
		Sysctl{"net/ipv4/tcp_orphan_retries", "1", true}, // what a fault left open
		Sysctl{"net/core/somaxconn", "4096", true},
	)
}
