// Package liverules understands iptables rules that a kube-proxy has written,
// ours or another one, from what iptables-save prints: which Services there are
// on which addresses, which endpoints each leads to and with what odds, what a
// rule is for and whose it is, and what would become of a packet.
//
//	rs, err := xtables.Parse(xtables.IPv4, dump)
//	p := liverules.New(liverules.Config{}, rs)
//	for _, s := range p.Services() { … }           // addresses, endpoints, odds
//	leaves := p.Leaves(packet)                     // every way it can go
//	why := p.Purpose("nat", "KUBE-SVC-…", rule)    // "take 10.1.0.2:8080 by chance"
//
// It goes by chain names, comments, statistics and targets, as kube-proxy 1.19
// to 1.36 writes them. A [Program] is a proxy.Program, so that whoever works
// with the rules of our own modes can work with these. It knows nothing of
// endpoints that are in no rule: readiness, zones and the like come from the API.
//
// Nothing here reads the kernel, and nothing is guessed: a match that cannot be
// evaluated from the text alone is an assumption of the walk.
package liverules
