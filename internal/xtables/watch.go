package xtables

// WatchConfig says what a Watch looks at.
type WatchConfig struct {
	Flavour Flavour
	Family  Family
	// Netns is a descriptor of the network namespace; 0 means ours.
	Netns int
	// LockFile is the lock of iptables-legacy, /run/xtables.lock if empty.
	LockFile string
	// Tables are the tables we keep, all of which exist from the first Settle
	// on.
	Tables []string
	// Ours tells the chains we keep from those of others.
	Ours func(table, chain string) bool
	// Targets are texts of which one is in every name of a chain we keep: a
	// rule removed from a chain of others concerns us if it led there.
	Targets []string
}

// Suspicion is what a Watch makes of what it saw.
type Suspicion uint8

// The degrees of suspicion.
const (
	// Quiet: nobody else wrote to our tables.
	Quiet Suspicion = iota
	// Doubt: somebody may have; only comparing whole tables can tell.
	Doubt
	// Written: somebody wrote to a table of ours; what, only comparing whole
	// tables can tell.
	Written
	// Certain: somebody changed rules of ours.
	Certain
)

// Sight is what a look brought.
type Sight struct {
	Suspicion Suspicion
	// What says for people what was seen.
	What string
}

// note raises a suspicion; the strongest and then the first one stays.
func (s *Sight) note(x Suspicion, what string) {
	if x > s.Suspicion {
		*s = Sight{x, what}
	}
}
