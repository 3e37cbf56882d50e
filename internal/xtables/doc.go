// Package xtables knows iptables rules: how iptables-save prints them, what a
// packet would meet on its way through them, in what two sets of them differ,
// and how to put them into the kernel.
//
// The model ([Ruleset], [Table], [Chain], [Rule]) is text made comparable: a
// rule is brought to the one form in which iptables-save 1.8.9 prints it, so a
// rule that we render and the same rule read back are equal. Extensions this
// package has never heard of are kept word for word.
//
//	rs, err := xtables.Parse(xtables.IPv4, dump)      // a save or restore text
//	r, err := xtables.ParseRule(xtables.IPv4, "-m tcp -p tcp --dport 80 -j REJECT")
//	line := r.Line("KUBE-SERVICES")                   // what restore reads, as save prints it
//	diffs := xtables.Diff(have, want, owned)
//	leaves := xtables.NewWalker(rs).Walk(packet, stations, oracles)
//	report, err := runner.Apply(ctx, plan)            // iptables-restore, in pieces
//
// Rules are not to be changed once they are in a Ruleset; all reading methods
// are then safe for concurrent use.
//
// Both flavours (iptables-nft and iptables-legacy) and both families print the
// same text for the same rule, bar the version in the comment line; tests hold
// this package against the real programs.
package xtables
