package nftables

import (
	"net/netip"
	"strconv"
	"strings"
)

// Listed is a rule with the handle by which the kernel knows it.
type Listed struct {
	// Family is as nft prints it: "ip", "ip6", "inet".
	Family, Table, Chain string
	Handle               uint64
	// Number is its place in the chain, from 1, Text the rule as nft prints it.
	Number uint64
	Text   string
}

// List reads the rules of all tables from what nft -a list prints. Lines that it
// does not understand are left out.
func List(text string) []Listed {
	var out []Listed
	var at Listed
	line, depth := "", 0
	for l := range strings.Lines(text) {
		l = strings.TrimSpace(l)
		if line != "" {
			l = line + " " + l // a list over several lines
			line = ""
		}
		body, handle := cutHandle(l)
		f := strings.Fields(body)
		switch {
		case len(f) == 0:
		case depth == 0 && f[0] == "table" && len(f) > 3:
			at, depth = Listed{Family: f[1], Table: f[2]}, 1
		case depth == 1 && f[len(f)-1] == "{":
			depth, at.Chain, at.Number = 2, "", 0
			if f[0] == "chain" && len(f) > 2 {
				at.Chain = f[1]
			}
		case depth > 0 && body == "}":
			depth--
		case depth == 2 && at.Chain != "" && handle > 0:
			at.Handle, at.Text = handle, body
			at.Number++
			out = append(out, at)
		case depth == 2 && at.Chain != "" && strings.Count(l, "{") > strings.Count(l, "}"):
			line = l
		}
	}
	return out
}

// cutHandle takes the handle from the end of a line, 0 if there is none.
func cutHandle(l string) (body string, handle uint64) {
	const mark = " # handle "
	i := strings.LastIndex(l, mark)
	if i < 0 {
		return l, 0
	}
	n, err := strconv.ParseUint(l[i+len(mark):], 10, 64)
	if err != nil {
		return l, 0
	}
	return l[:i], n
}

// Effect is what a rule does to a packet where the kernel, reporting that it was
// met, says only "accept" or "drop": translate it, or tell its sender. Empty where it
// does neither.
func Effect(text string) string {
	ws := words(text)
	for i, w := range ws {
		switch w {
		case "reject":
			if i == 0 || ws[i-1] != "jump" && ws[i-1] != "goto" {
				return w
			}
		case "dnat", "snat", "masquerade", "redirect":
			if i == 0 || ws[i-1] != "status" { // that is a match
				return w
			}
		}
	}
	return ""
}

// Meaning says what a rule of kube-proxy's tables meant for a packet, empty where
// that is not known. target is the chain it led to, if any; name puts an endpoint
// into words.
func Meaning(chain, text, target string, name func(netip.AddrPort) string) string {
	in, n, own, _ := parseName(chain)
	kind, to, ep, _ := parseName(target)
	share := shareOf(text)
	switch {
	case kind == "endpoint" && strings.Contains(text, "@affinity-"):
		return "affinity: it was sent to " + name(ep) + " before"
	case kind == "endpoint" && share != "":
		return "pick " + share + ": " + name(ep)
	case kind == "external":
		return "outside address of " + to.String()
	case kind == "firewall":
		return "see whether the source ranges of " + to.String() + " let it in"
	case kind == "local":
		return "endpoints of " + to.String() + " on this node only"
	case strings.Contains(text, "@service-nodeports") && kind == "service":
		return "node port of " + to.String()
	case strings.Contains(text, "@service-ips") && kind == "service":
		return "cluster IP of " + to.String()
	case kind == "service":
		return "endpoints of " + to.String()
	case strings.Contains(text, "@no-endpoint-") && target != "":
		return "its Service has no endpoints"
	case in == "endpoint" && strings.HasPrefix(text, "update @affinity-"):
		return "affinity: remember that the client was sent to " + name(own)
	case in == "endpoint" && Effect(text) == "dnat":
		return "DNAT to " + name(own)
	case Effect(text) == "dnat" && share != "":
		return "pick " + share + ", and DNAT to it"
	case in == "firewall" && strings.HasSuffix(text, "drop"):
		return "drop it, for its source is outside the source ranges of " + n.String()
	case strings.Contains(text, "@hairpin-connections"):
		return "masquerade it, for the client is the endpoint itself"
	case chain == "masquerading" && Effect(text) == "masquerade":
		return "replace its source by the node's address"
	}
	if s := commentOf(text); s != "" {
		return s
	}
	return chains[target]
}

// chains say what is looked for in the chains that serve all.
var chains = map[string]string{ //nolint:gochecknoglobals // a table
	"services":                 "see whether it is for a Service",
	"firewall-check":           "see whether a load balancer's source ranges keep it out",
	"service-endpoints-check":  "see whether it is for a Service without endpoints",
	"nodeport-endpoints-check": "see whether it is for the node port of a Service without endpoints",
	"cluster-ips-check":        "see whether it is for a cluster IP that nobody has",
	"masquerading":             "see whether it is to be masqueraded",
}

// shareOf says of how many a rule picks one by chance, "" where it does not.
func shareOf(text string) string {
	ws := words(text)
	for i := 0; i+4 < len(ws); i++ {
		if has(ws[i:], "numgen", "random", "mod") && (ws[i+4] == "map" || ws[i+4] == "vmap") {
			n, err := strconv.Atoi(ws[i+3])
			if err != nil || n < 1 {
				return ""
			}
			return "1 of " + ws[i+3] + ", p = " + strconv.FormatFloat(1/float64(n), 'f', 3, 64)
		}
	}
	return ""
}

func commentOf(text string) string {
	_, s, _ := strings.Cut(text, ` comment "`)
	s, _, _ = strings.Cut(s, `"`)
	return s
}
