package check

// Code is a kind of finding.
type Code struct {
	Name     string
	Severity Severity
	// Meaning is one sentence.
	Meaning string
}

// Codes lists all kinds of findings.
func Codes() []Code {
	return []Code{
		{"service-missing", Breaks, "a Service of the API is not in the rules"},
		{"service-refused", Breaks, "the rules refuse a Service that has endpoints"},
		{"service-not-refused", Risk, "the rules lead to endpoints of a Service that has none any more"},
		{"service-extra", Risk, "the rules have a Service that the API does not have"},
		{"endpoint-gone", Breaks, "the rules send connections to an endpoint that is none any more"},
		{"endpoint-missing", Risk, "an endpoint of the API gets no connections, for no rule leads to it"},
		{"shortcut-missing", Risk, "pods or the node do not get all endpoints by an outside address whose policy is Local"},
		{"odds-missing", Breaks, "a part of the connections to a Service is sent nowhere, for rules are missing"},
		{"odds-uneven", Risk, "the endpoints of a Service do not get the same share"},
		{"chain-empty", Breaks, "a chain of a Service leads to no endpoint"},
		{"target-missing", Breaks, "a rule leads to a chain that is not there"},
		{"entry-missing", Breaks, "no built-in chain leads to the chain that handles Services"},
		{"masquerade-missing", Breaks, "packets are marked to be masqueraded and nothing masquerades them"},
		{"chain-unused", Note, "a chain of a Service is there and nothing leads to it"},
		{"rule-altered", Risk, "rules are not as the proxy that owns them writes them"},
		{"element-missing", Risk, "a set or map of nftables mode lacks an element of a Service"},
		{"element-extra", Risk, "a set or map of nftables mode has an element of no Service"},
		{"affinity-wrong", Risk, "clients are kept with endpoints otherwise than a Service's session affinity says"},
		{"ranges-wrong", Breaks, "who may use a load balancer is not what a Service's source ranges say"},
		{"rules-behind", Risk, "the rules are older than what the API says"},
		{"sync-failed", Breaks, "the last attempt to program the kernel failed"},
		{"nodeport-shadowed", Breaks, "another rule takes a node port before the Service can"},
		{"forward-dropped", Breaks, "packets to a Service's endpoints are dropped on their way through the node"},
		{"forward-policy", Note, "the policy of FORWARD is DROP, and what accepts service traffic is not known for certain"},
		{"foreign-drop", Note, "a rule of somebody else's can drop service traffic"},
		{"not-tracked", Breaks, "packets to a Service are kept from connection tracking, so that no rule of nat sees them"},
		{"both-flavours", Breaks, "both flavours of iptables have live rules of a kube-proxy"},
		{"both-flavours-used", Note, "both flavours of iptables have rules, and every packet passes both"},
		{"two-proxies", Breaks, "two proxies program Services on this node"},
		{"not-nat", Breaks, "IPVS reaches a server otherwise than by NAT, so that the pod gets packets for an address it does not have"},
		{"mode-leftover", Risk, "rules or devices of another mode of kube-proxy are left"},
		{"ip-forward", Breaks, "the node does not forward packets"},
		{"rp-filter", Note, "strict reverse path filtering drops replies that come back by another interface"},
		{"bridge-nf-call", Risk, "packets between pods on one bridge do not pass the rules"},
		{"conntrack-full", Breaks, "the table of connections is full: new ones are dropped"},
		{"conntrack-near-full", Risk, "the table of connections is nearly full"},
		{"conntrack-stale", Breaks, "entries keep UDP clients at endpoints that are gone"},
		{"conntrack-clash", Note, "first packets were lost since two raced for one entry"},
		{"affinity-full", Risk, "a list of clients with session affinity is full, so that clients are forgotten"},
		{"mark-overlap", Risk, "a rule of somebody else's changes the mark by which a kube-proxy masquerades or drops packets"},
		{"nflog-held", Risk, "another program holds the NFLOG group that kptrace's rules report to"},
		{"nflog-shared", Note, "a rule of somebody else's reports to the NFLOG group that kptrace reads"},
		{"handled-elsewhere", Note, "something else than the rules of a kube-proxy may handle Services: eBPF, a mesh"},
		{"flow-offload", Note, "a flowtable carries established connections past all rules"},
		{"nothing", Breaks, "no proxy has rules here"},
	}
}

func severity(code string) Severity {
	for _, c := range Codes() {
		if c.Name == code {
			return c.Severity
		}
	}
	panic("check: unknown code " + code) // a slip in this package
}
