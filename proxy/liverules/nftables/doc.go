// Package nftables understands the rules that a kube-proxy in nftables mode has
// written, from what `nft list ruleset` prints: which Services there are on which
// addresses, which endpoints each leads to and with what odds, and what would become
// of a packet.
//
//	p, err := nftables.Parse(nftables.Config{}, text)
//	for _, s := range p.Services() { … }
//	o := p.Walk(packet)
//
// It evaluates the expressions that kube-proxy 1.31 to 1.36 writes, in its own tables
// (kube-proxy of ip and ip6). A rule with any other expression is taken not to match,
// and counted: see Program.Unknown. Rules of iptables beside them are walked where
// Config.Beside has them.
package nftables
