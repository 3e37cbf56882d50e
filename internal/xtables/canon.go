package xtables

import (
	"slices"
	"strings"
)

// canon returns a copy of r in canonical form.
func (r *Rule) canon() *Rule {
	c := *r
	c.Matches = slices.Clone(r.Matches)
	for i := range c.Matches {
		c.Matches[i].Opts = slices.Clone(c.Matches[i].Opts)
	}
	c.TargetOpts = slices.Clone(r.TargetOpts)
	c.canonicalize()
	return &c
}

// canonicalize brings r to the form iptables-save prints. It replaces values
// but never writes into the slices of values, which rules may share.
func (r *Rule) canonicalize() {
	r.canonical = true
	for _, a := range [...]*Addr{&r.Src, &r.Dst} {
		if a.Prefix.IsValid() && a.Prefix.Bits() == 0 && !a.Not {
			*a = Addr{}
		} else if a.Prefix.IsValid() {
			a.Prefix = a.Prefix.Masked()
		}
	}
	for _, i := range [...]*Iface{&r.In, &r.Out} {
		if i.Name == "+" && !i.Not {
			*i = Iface{}
		}
	}
	if r.Proto.Name = protoName(r.Proto.Name); r.Proto.Name == "" {
		r.Proto = Proto{}
	}
	for i := range r.Matches {
		m := &r.Matches[i]
		ext := matchExtensions[m.Name]
		m.Opts = ext.order(m.Opts)
		if canon := matchCanon[m.Name]; canon != nil {
			m.Opts = canon(r.Family, m.Opts)
		}
		ext.quote(m.Opts)
	}
	ext := targetExtensions[r.Target]
	r.TargetOpts = ext.order(r.TargetOpts)
	if canon := targetCanon[r.Target]; canon != nil && !r.Goto {
		r.TargetOpts = canon(r.Family, r.TargetOpts)
	}
	ext.quote(r.TargetOpts)
}

// order replaces aliases and puts known options in the order of printing;
// options not known stay behind the one they followed.
func (e *extension) order(opts []Opt) []Opt {
	if e == nil || len(opts) == 0 {
		return opts
	}
	for i := range opts {
		if s, ok := e.opts[opts[i].Name]; ok {
			opts[i].Name = s.name
		}
	}
	if e.loose || len(opts) == 1 {
		return opts
	}
	rank := func(o *Opt) int {
		if s, ok := e.opts[o.Name]; ok {
			return s.rank
		}
		return 1 << 16
	}
	for i := 1; i < len(opts); i++ {
		for j := i; j > 0 && rank(&opts[j]) < rank(&opts[j-1]); j-- {
			opts[j], opts[j-1] = opts[j-1], opts[j]
		}
	}
	return opts
}

// quote decides which arguments are printed in quotes: strings of known options
// as iptables-save does, those of unknown ones as they were written, and whatever
// would not be read back as it is.
func (e *extension) quote(opts []Opt) {
	for i := range opts {
		o := &opts[i]
		if s, ok := e.option(o.Name); ok {
			o.Quoted = s.plain && len(o.Values) == 1 && !isPlain(o.Values[0])
			continue
		}
		for _, v := range o.Values {
			o.Quoted = o.Quoted || needsQuotes(v) || token{text: v}.isOption()
		}
	}
}

// canonFunc brings the ordered options of one extension to canonical values.
type canonFunc func(f Family, opts []Opt) []Opt

var matchCanon = map[string]canonFunc{
	"tcp":       canonPorts,
	"udp":       canonPorts,
	"udplite":   canonPorts,
	"sctp":      canonPorts,
	"icmp":      eachValue("icmp-type", icmpType),
	"icmp6":     eachValue("icmpv6-type", icmp6Type),
	"mark":      eachValue("mark", markText),
	"connmark":  eachValue("mark", markText),
	"state":     eachValue("state", stateList),
	"statistic": eachValue("probability", probabilityText),
	"recent":    canonRecent,
	"conntrack": canonConntrack,
	"addrtype":  canonAddrtype,
	"limit":     canonLimit,
	"connbytes": eachValue("connbytes", connbytesText),
	"set":       canonSet,
}

var targetCanon = map[string]canonFunc{
	"REJECT":   canonReject,
	"MARK":     canonXmark,
	"CONNMARK": canonConnmark,
	"DNAT":     eachValue("to-destination", natText),
	"SNAT":     eachValue("to-source", natText),
	"REDIRECT": eachValue("to-ports", func(s string) string { return portRange(s, '-') }),
	"NFLOG":    canonNflog,
	"LOG":      canonLog,
	"CT":       eachValue("ctevents", func(s string) string { return sortList(s, ctEvents) }),
}

// eachValue applies fix to the first argument of one option.
func eachValue(name string, fix func(string) string) canonFunc {
	return func(_ Family, opts []Opt) []Opt {
		for i := range opts {
			if opts[i].Name == name {
				opts[i].set(fix)
			}
		}
		return opts
	}
}

// set replaces the first argument by fix of it, without touching a shared
// slice.
func (o *Opt) set(fix func(string) string) {
	if len(o.Values) == 0 {
		return
	}
	if v := fix(o.Values[0]); v != o.Values[0] {
		o.Values = append([]string{v}, o.Values[1:]...)
	}
}

func canonPorts(_ Family, opts []Opt) []Opt {
	out := opts[:0]
	for _, o := range opts {
		switch o.Name {
		case "sport", "dport":
			o.set(func(s string) string { return portRange(s, ':') })
			if o.Value() == "0:65535" && !o.Not {
				continue
			}
		case "syn":
			o.Name, o.Values = "tcp-flags", []string{"FIN,SYN,RST,ACK", "SYN"}
		case "tcp-flags":
			if len(o.Values) == 2 {
				mask, comp := tcpFlags(o.Values[0]), tcpFlags(o.Values[1])
				if mask == "NONE" && comp == "NONE" && !o.Not {
					continue
				}
				if mask != o.Values[0] || comp != o.Values[1] {
					o.Values = []string{mask, comp}
				}
			}
		}
		out = append(out, o)
	}
	return out
}

func canonRecent(f Family, opts []Opt) []Opt {
	if findOpt(opts, "name") == nil {
		opts = append(opts, Opt{Name: "name", Values: []string{"DEFAULT"}})
	}
	if findOpt(opts, "mask") == nil {
		mask := "255.255.255.255"
		if f == IPv6 {
			mask = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
		}
		opts = append(opts, Opt{Name: "mask", Values: []string{mask}})
	}
	if findOpt(opts, "rdest") == nil && findOpt(opts, "rsource") == nil {
		opts = append(opts, Opt{Name: "rsource"})
	}
	return matchExtensions["recent"].order(opts)
}

func canonConntrack(_ Family, opts []Opt) []Opt {
	for i := range opts {
		o := &opts[i]
		switch o.Name {
		case "ctstate":
			o.set(stateList)
		case "ctstatus":
			o.set(func(s string) string { return sortList(s, ctStatuses) })
		case "ctproto":
			o.set(protoNumber)
		case "ctdir":
			o.set(strings.ToUpper)
		case "ctorigsrc", "ctorigdst", "ctreplsrc", "ctrepldst":
			o.set(func(s string) string {
				return strings.TrimSuffix(strings.TrimSuffix(s, "/32"), "/128")
			})
		}
	}
	return opts
}

func canonAddrtype(_ Family, opts []Opt) []Opt {
	for i := range opts {
		opts[i].set(func(s string) string { return sortList(s, addrTypes) })
	}
	return opts
}

func canonLimit(_ Family, opts []Opt) []Opt {
	if findOpt(opts, "limit") == nil {
		opts = append(opts, Opt{Name: "limit", Values: []string{"3/hour"}})
	}
	opts = slices.DeleteFunc(opts, func(o Opt) bool {
		return o.Name == "limit-burst" && o.Value() == "5"
	})
	opts = matchExtensions["limit"].order(opts)
	return eachValue("limit", rateText)(0, opts)
}

func canonSet(_ Family, opts []Opt) []Opt {
	return slices.DeleteFunc(opts, func(o Opt) bool { // the default
		return (o.Name == "update-counters" || o.Name == "update-subcounters") && !o.Not
	})
}

func canonReject(f Family, opts []Opt) []Opt {
	if len(opts) == 0 {
		with := "icmp-port-unreachable"
		if f == IPv6 {
			with = "icmp6-port-unreachable"
		}
		return []Opt{{Name: "reject-with", Values: []string{with}}}
	}
	return eachValue("reject-with", func(s string) string { return rejectName(f, s) })(f, opts)
}

// xmark turns any option that sets a mark into --set-xmark.
func (o *Opt) xmark() {
	switch kind := o.Name; kind {
	case "set-xmark", "set-mark", "and-mark", "or-mark", "xor-mark":
		o.set(func(s string) string { return xmarkText(kind, s) })
		o.Name = "set-xmark"
	}
}

func canonXmark(_ Family, opts []Opt) []Opt {
	for i := range opts {
		opts[i].xmark()
	}
	return opts
}

func canonConnmark(_ Family, opts []Opt) []Opt {
	copying := false
	var out []Opt
	for _, o := range opts {
		switch o.Name {
		case "save-mark", "restore-mark":
			copying = true
		case "nfmask", "ctmask":
			o.set(hexText)
		case "mask":
			o.set(hexText)
			out = append(out, Opt{Name: "nfmask", Values: o.Values})
			o.Name = "ctmask"
		default:
			o.xmark()
		}
		out = append(out, o)
	}
	for _, mask := range [...]string{"nfmask", "ctmask"} {
		if copying && findOpt(out, mask) == nil {
			out = append(out, Opt{Name: mask, Values: []string{"0xffffffff"}})
		}
	}
	return targetExtensions["CONNMARK"].order(out)
}

func canonNflog(_ Family, opts []Opt) []Opt {
	return slices.DeleteFunc(opts, func(o Opt) bool {
		return o.Name == "nflog-group" && o.Value() == "0"
	})
}

func canonLog(_ Family, opts []Opt) []Opt {
	opts = eachValue("log-level", logLevel)(0, opts)
	return slices.DeleteFunc(opts, func(o Opt) bool {
		return o.Name == "log-level" && o.Value() == "4"
	})
}
