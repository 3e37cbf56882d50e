// Package features says what this kernel, its tools and this user can do, by
// doing it: every probe makes a fresh network namespace, loads the rule or
// opens the socket that kptrace would, sends a packet, and looks at what
// comes. Nothing is concluded from version numbers or build options.
//
// Probing needs the capabilities of a sandbox (internal/netns); where the
// host forbids that, Unavailable makes the same list from the refusal.
package features
