// Package redact replaces what tells whose cluster something is about: names of
// namespaces, Services, pods, workloads and nodes, and addresses. What it replaces it
// replaces everywhere by the same, in text, in rules, in state and in the bytes that
// sources read, so that rules still match, chains still have the names of their
// Services, and a recording replays to the same decisions.
//
//	r := redact.New(redact.Names, key)
//	r.Learn(snapshot)            // whose names there are
//	text := r.Rules(saved)       // iptables-save, still readable by it
//	err := r.Recording(dst, src) // a recording, still replayable
//
// Addresses keep their prefixes: two that share their first n bits share them
// afterwards too, and a range that held an address holds its replacement. Nobody
// without the key, which is not kept, can go back; what such a mapping does not hide
// is how many there are and how they group.
package redact
