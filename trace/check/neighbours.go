package check

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/internal/dataplane"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// Listener is a program that holds an NFLOG group.
type Listener struct {
	Group   uint16
	PID     int
	Command string
}

// defaultMark is the mark by which a kube-proxy asks for masquerading, where rules
// do not tell.
const defaultMark = 0x4000

// neighbours looks at what other programs on the node do to Service packets and to
// their reports.
func (c *checker) neighbours() {
	marks := c.marks()
	groups := c.groups()
	for i := range c.Dumps {
		d := &c.Dumps[i]
		for _, t := range d.Rules.Tables {
			for _, ch := range t.Chains {
				switch liverules.Owner(t.Name, ch.Name, nil) {
				case "kube-proxy", "kubelet", "kubelet or kube-proxy", "kptrace":
					continue
				}
				for n, r := range ch.Rules {
					c.marked(t.Name, ch.Name, n+1, r, marks)
					c.logged(t.Name, ch.Name, n+1, r, groups)
				}
				if who := dataplane.Chain(ch.Name); who != "" && t.Name == "nat" && len(ch.Rules) > 0 {
					c.once("handled-elsewhere", who, "", "chains of nat (%s) send connections to %s first, which picks endpoints itself", ch.Name, who)
				}
			}
		}
	}
	c.listeners(groups)
	served := c.live != nil && c.live.Mode() != "" || c.nftMode()
	for _, s := range c.Planes {
		if served && !s.Sure {
			continue // Cilium has programs at devices also where it leaves Services alone
		}
		f := c.once("handled-elsewhere", s.Who, "", "%s seems to handle Services, past the rules of a kube-proxy: known by its %s", s.Who, s.What)
		if f != nil && served {
			f.Severity, f.Fix = Risk, "let one of the two do Services"
			f.Message = fmt.Sprintf("%s handles Services (%s), and a kube-proxy has rules for them too", s.Who, s.What)
		}
	}
	for _, name := range c.Flowtables {
		c.add("flow-offload", name, "", "established connections in this flowtable pass no rules: of these kptrace sees neither FIN nor RST, but their end in connection tracking")
	}
}

// marks are the bits of a packet's mark that rules of a kube-proxy or kubelet go
// by, and what each does.
func (c *checker) marks() map[uint32]string {
	bits := map[uint32]string{}
	for i := range c.Dumps {
		rs := c.Dumps[i].Rules
		if ch := rs.Chain("nat", "KUBE-MARK-MASQ"); ch != nil {
			for _, r := range ch.Rules {
				if value, _, ok := setMark(r); ok && value != 0 {
					bits[value] = "masquerade"
				}
			}
		}
		if ch := rs.Chain("filter", "KUBE-FIREWALL"); ch != nil {
			for _, r := range ch.Rules {
				if m := r.Match("mark"); m != nil && r.Target == "DROP" && m.Opt("mark") != nil {
					if value, _, ok := parseMark(m.Opt("mark").Value()); ok && value != 0 {
						bits[value] = "drop"
					}
				}
			}
		}
	}
	if len(bits) == 0 && c.nftMode() {
		bits[defaultMark] = "masquerade"
	}
	return bits
}

// marked looks for a rule that changes a bit which a kube-proxy goes by.
func (c *checker) marked(table, chain string, index int, r *xtables.Rule, bits map[uint32]string) {
	value, mask, ok := setMark(r)
	how := "sets"
	if !ok {
		if value, mask, ok = restored(r); !ok {
			return
		}
		how = "restores from the connection's mark"
	}
	for _, bit := range sortedBits(bits) {
		switch {
		case how == "sets" && value&bit == bit:
		case mask&bit != 0 && how != "sets":
		case mask&bit != 0:
			how = "clears"
		default:
			continue
		}
		owner := liverules.Owner(table, chain, r)
		f := c.once("mark-overlap", table+"/"+chain, "give the other program marks that leave out "+hex(bit),
			"rule %d%s %s the bit %s of packets' marks, by which rules of a kube-proxy %s", index, of(owner), how, hex(bit), bits[bit])
		if f != nil {
			f.Owner, f.Evidence = owner, []string{r.Line(chain)}
		}
		return
	}
}

func sortedBits(m map[uint32]string) []uint32 {
	var all []uint32
	for b := range m {
		all = append(all, b)
	}
	slices.Sort(all)
	return all
}

func hex(n uint32) string { return fmt.Sprintf("0x%x", n) }

// setMark reads what a rule makes of a packet's mark: the bits it sets, and those
// it changes.
func setMark(r *xtables.Rule) (value, mask uint32, ok bool) {
	if r.Target != "MARK" {
		return 0, 0, false
	}
	for _, name := range []string{"set-xmark", "set-mark", "or-mark"} {
		text, has := r.TargetOpt(name)
		if !has {
			continue
		}
		value, mask, ok = parseMark(text)
		if name == "or-mark" {
			mask = value
		}
		return value, mask, ok
	}
	return 0, 0, false
}

// restored reads which bits of a packet's mark a rule takes from its connection.
func restored(r *xtables.Rule) (value, mask uint32, ok bool) {
	if r.Target != "CONNMARK" {
		return 0, 0, false
	}
	if _, has := r.TargetOpt("restore-mark"); !has {
		return 0, 0, false
	}
	mask = ^uint32(0)
	for _, name := range []string{"nfmask", "mask"} {
		if text, has := r.TargetOpt(name); has {
			if m, _, ok := parseMark(text); ok {
				mask = m
			}
		}
	}
	return 0, mask, true
}

// parseMark reads "0x4000/0x4000"; without a mask it is all bits.
func parseMark(text string) (value, mask uint32, ok bool) {
	v, m, has := strings.Cut(text, "/")
	a, err := strconv.ParseUint(v, 0, 32)
	if err != nil {
		return 0, 0, false
	}
	if !has {
		return uint32(a), ^uint32(0), true
	}
	b, err := strconv.ParseUint(m, 0, 32)
	return uint32(a), uint32(b), err == nil
}

// groups are the NFLOG groups to which rules of kptrace's report.
func (c *checker) groups() map[uint16]bool {
	all := map[uint16]bool{}
	for i := range c.Dumps {
		for _, t := range c.Dumps[i].Rules.Tables {
			for _, ch := range t.Chains {
				for _, r := range ch.Rules {
					if prefix, has := r.TargetOpt("nflog-prefix"); has {
						if _, ours := proxy.ParseTag(prefix); ours {
							all[groupOf(r)] = true
						}
					}
				}
			}
		}
	}
	return all
}

func groupOf(r *xtables.Rule) uint16 {
	text, _ := r.TargetOpt("nflog-group")
	n, _ := strconv.ParseUint(text, 10, 16) // none is 0
	return uint16(n)
}

// logged looks for a rule of others that reports to a group of ours.
func (c *checker) logged(table, chain string, index int, r *xtables.Rule, groups map[uint16]bool) {
	if r.Target != "NFLOG" || !groups[groupOf(r)] {
		return
	}
	if prefix, _ := r.TargetOpt("nflog-prefix"); prefix != "" {
		if _, ours := proxy.ParseTag(prefix); ours {
			return
		}
	}
	owner := liverules.Owner(table, chain, r)
	f := c.once("nflog-shared", table+"/"+chain, "give kptrace another group: --nflog-group", "rule %d%s reports to NFLOG group %d, which kptrace reads: only one program can", index, of(owner), groupOf(r))
	if f != nil {
		f.Owner, f.Evidence = owner, []string{r.Line(chain)}
	}
}

// listeners looks for programs that hold a group of ours.
func (c *checker) listeners(groups map[uint16]bool) {
	for _, l := range c.Listeners {
		if !groups[l.Group] || l.Command == "kptrace" || c.PID != 0 && l.PID == c.PID {
			continue
		}
		who := l.Command
		if who == "" {
			who = "a program that cannot be seen from here"
		}
		if l.PID != 0 {
			who += fmt.Sprintf(" (process %d)", l.PID)
		}
		f := c.once("nflog-held", strconv.Itoa(int(l.Group)), "give kptrace another group: --nflog-group", "%s holds NFLOG group %d, to which kptrace's rules report: kptrace sees no packets", who, l.Group)
		if f != nil {
			f.Owner = l.Command
		}
	}
}
