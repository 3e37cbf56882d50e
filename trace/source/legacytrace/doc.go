// Package legacytrace reads what iptables-legacy tells of packets that a TRACE
// rule marked. The kernel logs every rule that matched through nf_log, which,
// told so by the sysctl net.netfilter.nf_log.2 (and .10 for IPv6), hands it to
// group 0 of nfnetlink_log. The prefix of a report is
// "TRACE: table:chain:rule|return|policy:number ".
//
// go-nflog opens, binds and configures the socket; it is read here. The kernel does
// not batch these reports, whatever is configured.
//
// Everything else in the namespace that logs through nf_log without choosing a
// group arrives here as well while the sysctl is set, and is counted as foreign.
package legacytrace
