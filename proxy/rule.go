package proxy

import "net/netip"

// Rule says what one tagged rule in the kernel means.
type Rule struct {
	Tag Tag
	// Table and Chain say where the rule stands.
	Table, Chain string
	// Service is the Service port it belongs to; zero for rules that serve all.
	Service PortName
	// Endpoint is the endpoint that a TagPick rule stands for; not valid where
	// the rule stands for all, see IDScheduled.
	Endpoint netip.AddrPort
	// Purpose is one sentence for people: "pick 10.1.0.2:8080 for shop/foo:http".
	Purpose string
	// Reason is a stable code for rules that refuse: "no-endpoints",
	// "no-local-endpoints".
	Reason string
}

// Index finds rules by tag. It is immutable once published. Since tags are
// made of names and not of generations, a tag means the same in every Index
// that knows it.
type Index map[string]*Rule

// Lookup finds the rule whose tag is the given NFLOG prefix. It does not
// allocate.
func (x Index) Lookup(prefix []byte) *Rule { return x[string(prefix)] }

// Add puts r in the index, and reports a tag that would not survive the kernel.
func (x Index) Add(r *Rule) error {
	if err := r.Tag.Validate(); err != nil {
		return err
	}
	x[r.Tag.String()] = r
	return nil
}
