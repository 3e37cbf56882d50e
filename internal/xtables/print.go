package xtables

import (
	"strconv"
	"strings"
)

// String returns the rule as iptables-save 1.8.9 prints it, after "-A CHAIN ".
// It is the rule's identity: equal rules have equal text.
func (r *Rule) String() string { return string(r.AppendText(make([]byte, 0, 192))) }

// Line returns "-A chain" and the rule's text: a line for iptables-restore.
func (r *Rule) Line(chain string) string {
	b := make([]byte, 0, 224)
	b = append(b, "-A "...)
	b = append(b, chain...)
	return string(appendRule(b, r))
}

// appendRule appends a space and the rule, or nothing if the rule is empty.
func appendRule(b []byte, r *Rule) []byte {
	n := len(b)
	if b = r.AppendText(append(b, ' ')); len(b) == n+1 {
		b = b[:n]
	}
	return b
}

// AppendText appends what String returns to b.
func (r *Rule) AppendText(b []byte) []byte {
	if !r.canonical {
		r = r.canon()
	}
	start := len(b)
	b = appendAddr(b, "-s ", r.Src, r.Family)
	b = appendAddr(b, "-d ", r.Dst, r.Family)
	b = appendName(b, "-i ", r.In.Name, r.In.Not)
	b = appendName(b, "-o ", r.Out.Name, r.Out.Not)
	b = appendName(b, "-p ", r.Proto.Name, r.Proto.Not)
	if r.Frag != "" {
		b = append(append(b, r.Frag...), ' ')
	}
	for i := range r.Matches {
		m := &r.Matches[i]
		b = append(b, "-m "...)
		b = append(b, m.Name...)
		b = append(b, ' ')
		b = appendOpts(b, m.Opts)
	}
	if r.Target != "" {
		if r.Goto {
			b = append(b, "-g "...)
		} else {
			b = append(b, "-j "...)
		}
		b = append(b, r.Target...)
		b = append(b, ' ')
	}
	b = appendOpts(b, r.TargetOpts)
	if len(b) > start {
		b = b[:len(b)-1] // the last space
	}
	return b
}

func appendAddr(b []byte, flag string, a Addr, f Family) []byte {
	if a.IsZero() {
		return b
	}
	if a.Not {
		b = append(b, "! "...)
	}
	b = append(b, flag...)
	if a.Text != "" {
		b = append(b, a.Text...)
	} else {
		b = appendIP(b, a.Prefix.Addr())
		b = append(b, '/')
		b = strconv.AppendInt(b, int64(a.Prefix.Bits()), 10)
	}
	return append(b, ' ')
}

func appendName(b []byte, flag, name string, not bool) []byte {
	if name == "" {
		return b
	}
	if not {
		b = append(b, "! "...)
	}
	b = append(b, flag...)
	b = append(b, name...)
	return append(b, ' ')
}

func appendOpts(b []byte, opts []Opt) []byte {
	for i := range opts {
		o := &opts[i]
		if o.Not {
			b = append(b, "! "...)
		}
		b = append(b, "--"...)
		b = append(b, o.Name...)
		b = append(b, ' ')
		for _, v := range o.Values {
			if o.Quoted || needsQuotes(v) {
				b = appendQuoted(b, v)
			} else {
				b = append(b, v...)
			}
			b = append(b, ' ')
		}
	}
	return b
}

// needsQuotes reports whether a value would not come back as it is if it were
// printed bare. The plain strings of known options are judged by isPlain.
func needsQuotes(v string) bool {
	return v == "" || v == "!" || strings.ContainsAny(v, " \t\r\"\\'")
}

// isPlain reports whether xtables_save_string of libxtables prints s bare.
func isPlain(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '_' && c != '-' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return s != ""
}

func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); i++ {
		if c := s[i]; c == '"' || c == '\\' || c == '\'' {
			b = append(b, '\\')
		}
		b = append(b, s[i])
	}
	return append(b, '"')
}

// String returns the ruleset as iptables-save prints it, without comments.
func (rs *Ruleset) String() string {
	var b []byte
	for _, t := range rs.Tables {
		b = t.AppendText(b, false)
	}
	return string(b)
}

// AppendText appends the table as iptables-save prints it, with the counters
// of the rules if asked for, ready for iptables-restore. Chains that were never
// declared come last.
func (t *Table) AppendText(b []byte, counters bool) []byte {
	b = append(b, '*')
	b = append(b, t.Name...)
	b = append(b, '\n')
	for _, c := range t.Chains {
		if c.Policy == "" {
			continue
		}
		b = append(b, ':')
		b = append(b, c.Name...)
		b = append(b, ' ')
		b = append(b, c.Policy...)
		b = append(b, ' ')
		b = appendCounters(b, c.Counters)
		b = append(b, '\n')
	}
	for _, declared := range [...]bool{true, false} {
		for _, c := range t.Chains {
			if (c.Policy != "") != declared {
				continue
			}
			for _, r := range c.Rules {
				if counters {
					b = append(appendCounters(b, r.Counters), ' ')
				}
				b = append(b, "-A "...)
				b = append(b, c.Name...)
				b = append(appendRule(b, r), '\n')
			}
		}
	}
	return append(b, "COMMIT\n"...)
}

func appendCounters(b []byte, c Counters) []byte {
	b = append(b, '[')
	b = strconv.AppendUint(b, c.Packets, 10)
	b = append(b, ':')
	b = strconv.AppendUint(b, c.Bytes, 10)
	return append(b, ']')
}
