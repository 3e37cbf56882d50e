package text

import (
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// ExplainJSON is what would become of a packet, as explain -o json prints it.
type ExplainJSON struct {
	SchemaVersion int        `json:"schemaVersion"`
	Rules         string     `json:"rules,omitempty"`
	Proto         string     `json:"proto"`
	From          PeerJSON   `json:"from"`
	To            string     `json:"to"`
	Cases         []CaseJSON `json:"cases"`
	Notes         []string   `json:"notes,omitempty"`
}

// CaseJSON is what holds under some conditions; mostly there is one case,
// without conditions.
type CaseJSON struct {
	If []ConditionJSON `json:"if,omitempty"`
	// Verdict is forward, reject, drop, pass, or "depends" where ways differ.
	Verdict           string         `json:"verdict"`
	Service           *ServiceJSON   `json:"service"`
	Mode              proxy.Mode     `json:"mode,omitempty"`
	Algorithm         string         `json:"algorithm,omitempty"`
	Policy            string         `json:"policy,omitempty"`
	AffinityTimeoutMs *Millis        `json:"affinityTimeoutMs,omitempty"`
	Choices           []ChoiceJSON   `json:"choices"`
	Ways              []WayJSON      `json:"ways,omitempty"`
	Excluded          []ExcludedEnds `json:"excluded,omitempty"`
	// Odds is what the odds of all choices and ways add up to: 1, unless rules
	// are missing.
	Odds float64 `json:"odds"`
}

// ConditionJSON is something that could not be evaluated.
type ConditionJSON struct {
	What  string `json:"what"`
	Rule  string `json:"rule,omitempty"`
	Holds bool   `json:"holds"`
}

// ChoiceJSON is an endpoint that can be picked.
type ChoiceJSON struct {
	Endpoint    PeerJSON  `json:"endpoint"`
	Probability float64   `json:"probability"`
	Ways        []WayJSON `json:"ways"`
}

// WayJSON is one way a packet can go.
type WayJSON struct {
	If         []ConditionJSON `json:"if,omitempty"`
	Verdict    string          `json:"verdict"`
	Reason     trace.Reason    `json:"reason,omitempty"`
	Owner      string          `json:"owner,omitempty"`
	Masquerade string          `json:"masquerade,omitempty"`
	Path       PathJSON        `json:"path"`
}

// ExcludedEnds is an endpoint that is no candidate, and why: not-ready, terminating,
// not-local, other-zone, other-node, out, affinity, endpoint-missing, endpoint-gone;
// port-mismatch is for all there could be and has no endpoint.
type ExcludedEnds struct {
	Endpoint *PeerJSON `json:"endpoint,omitempty"`
	Code     string    `json:"code"`
	Why      string    `json:"why"`
}

func excludedJSON(all []explain.Excluded) []ExcludedEnds {
	var out []ExcludedEnds
	for i := range all {
		x := &all[i]
		j := ExcludedEnds{Code: x.Code, Why: x.Why}
		if x.Endpoint.Addr.IsValid() {
			p := peerJSON(&x.Endpoint)
			j.Endpoint = &p
		}
		out = append(out, j)
	}
	return out
}

// ToExplainJSON converts an answer.
func ToExplainJSON(a *explain.Answer) ExplainJSON {
	from := a.From
	out := ExplainJSON{
		SchemaVersion: SchemaVersion, Rules: a.Rules, Proto: a.Packet.Proto.String(), From: peerJSON(&from),
		To: addrPort(a.Packet.Dst), Notes: a.Notes, Cases: []CaseJSON{},
	}
	for i := range a.Cases {
		c := &a.Cases[i]
		j := CaseJSON{
			If: conditionsJSON(c.If), Verdict: "depends", Mode: c.Mode, Algorithm: c.Algorithm, Policy: c.Policy,
			Choices: []ChoiceJSON{}, Ways: waysJSON(c.Ways), Odds: round(c.Odds(), 1e6),
		}
		if v, same := c.Verdict(); same {
			j.Verdict = v.String()
		}
		if c.Service != (proxy.PortName{}) {
			j.Service = &ServiceJSON{Namespace: c.Service.Namespace, Name: c.Service.Name, Port: c.Service.Port,
				IP: addr(a.Packet.Dst), PortNumber: a.Packet.Dst.Port(), Via: c.Via}
		}
		if c.Affinity > 0 {
			j.AffinityTimeoutMs = millis(c.Affinity)
		}
		for k := range c.Choices {
			x := &c.Choices[k]
			j.Choices = append(j.Choices, ChoiceJSON{peerJSON(&x.Endpoint), round(x.Probability, 1e6), waysJSON(x.Ways)})
		}
		j.Excluded = excludedJSON(c.Excluded)
		out.Cases = append(out.Cases, j)
	}
	return out
}

func conditionsJSON(conds []explain.Condition) []ConditionJSON {
	var out []ConditionJSON
	for _, c := range conds {
		out = append(out, ConditionJSON{c.What, c.Text, c.Holds})
	}
	return out
}

func waysJSON(ways []explain.Way) []WayJSON {
	var out []WayJSON
	for i := range ways {
		w := &ways[i]
		j := WayJSON{If: conditionsJSON(w.If), Verdict: w.Verdict.String(), Reason: w.Reason, Owner: w.Owner,
			Masquerade: w.Masquerade, Path: ToPathJSON(&w.Path)}
		if w.Unsure {
			j.Verdict = "unknown"
		}
		out = append(out, j)
	}
	return out
}
