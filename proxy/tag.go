package proxy

import (
	"fmt"
	"strings"
)

// MaxTagLen is the longest tag in bytes: xt_NFLOG holds 64 with its NUL, and
// iptables-legacy cuts a longer one without a word
// (linux/netfilter/xt_NFLOG.h).
const MaxTagLen = 63

const tagVersion = "kp1"

// TagKind says what a tagged rule reports.
type TagKind uint8

// The kinds of tagged rules. The first group decides, the second reports the
// life of a connection.
const (
	TagNone    TagKind = iota
	TagPick            // an endpoint was picked; before DNAT
	TagMiss            // no affinity entry matched; between recheck and balancing
	TagReject          // before a REJECT of ours
	TagDrop            // before a DROP of ours
	TagSyn             // a SYN of a connection already translated: a retransmit
	TagSynAck          // the answer to a SYN
	TagFin             // the first or second FIN
	TagRst             // an RST
	TagICMP            // an ICMP error about a translated connection
	TagReply           // the first answer of a UDP flow
	TagRequest         // a request that names the span which sent it
	TagInvalid         // a segment that connection tracking takes for INVALID
)

var tagKinds = [...]string{
	TagNone: "", TagPick: "pick", TagMiss: "miss", TagReject: "reject", TagDrop: "drop",
	TagSyn: "syn", TagSynAck: "synack", TagFin: "fin", TagRst: "rst", TagICMP: "icmp", TagReply: "reply",
	TagRequest: "request", TagInvalid: "invalid",
}

// String returns the kind as it stands in a tag.
func (k TagKind) String() string {
	if int(k) < len(tagKinds) {
		return tagKinds[k]
	}
	return fmt.Sprintf("kind%d", uint8(k))
}

// The ids of the tags of rules that serve all Services, in the IPVS mode and
// beside other kube-proxies. The first packet of a connection, or
// a SYN sent again, is reported twice: as it is addressed to a virtual server
// (TagSyn) and after IPVS has picked a real one, or rules have translated it
// (TagPick, whose Rule names no Endpoint and no Service: it is one for all). Both go to the same group, so
// that one follows the other.
const (
	IDVirtual    = "vip"
	IDScheduled  = "ipvs"
	IDTranslated = "dnat"
)

// Tag is the contract between who writes a rule and who reads its reports: it
// travels in the NFLOG prefix. It holds no generation number, or every rule
// would change with it.
type Tag struct {
	Kind TagKind
	// ID tells rules of one kind apart, such as the hash in a chain's name;
	// empty for kinds that need none. It must not contain a colon.
	ID string
}

// String returns the tag as an NFLOG prefix: "kp1:pick:SXIVWICOYRO3J4NJ".
func (t Tag) String() string {
	if t.ID == "" {
		return tagVersion + ":" + t.Kind.String()
	}
	return tagVersion + ":" + t.Kind.String() + ":" + t.ID
}

// Validate reports whether the tag survives a trip through the kernel.
func (t Tag) Validate() error {
	if t.Kind == TagNone || int(t.Kind) >= len(tagKinds) {
		return fmt.Errorf("proxy: tag %q: unknown kind", t)
	}
	for _, r := range t.ID {
		if r <= ' ' || r > '~' || r == ':' || r == '"' || r == '\\' {
			return fmt.Errorf("proxy: tag %q: character %q not allowed in an id", t, r)
		}
	}
	if s := t.String(); len(s) > MaxTagLen {
		return fmt.Errorf("proxy: tag %q is %d bytes, the kernel keeps %d", s, len(s), MaxTagLen)
	}
	return nil
}

// ParseTag reads a tag back from an NFLOG prefix; ok is false for prefixes
// that are not ours.
func ParseTag(prefix string) (t Tag, ok bool) {
	rest, ok := strings.CutPrefix(prefix, tagVersion+":")
	if !ok {
		return Tag{}, false
	}
	kind, id, _ := strings.Cut(rest, ":")
	for k, name := range tagKinds {
		if k != 0 && name == kind {
			t = Tag{Kind: TagKind(k), ID: id}
			return t, t.Validate() == nil
		}
	}
	return Tag{}, false
}
