// Package beside lets kptrace watch a kube-proxy that it did not start. Its
// Backend programs no Service: it reads what is live, says what that means, and
// keeps rules that report the life of connections in chains of its own.
//
// What the live rules mean depends on who wrote them:
//
//   - kube-proxy in iptables mode, of either flavour: the rules themselves say
//     where packets go and with what odds ([liverules.Program]).
//   - kube-proxy in nftables or IPVS mode: its rules are not read here; where packets
//     should go is predicted by our own mode of the same kind from the same
//     state (Config.Predict), and where they went the kernel reports.
//
// The reports are those of the IPVS mode: a first packet is reported as it is
// addressed to a Service, and once more behind the translation. A packet of which
// the second report does not come was refused or dropped in between, which
// connection tracking never shows. The rules' number does not grow with the
// Services: addresses are in two ipsets.
package beside
