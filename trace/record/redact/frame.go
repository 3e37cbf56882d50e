package redact

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// Frame replaces in what a source read; the Data returned is a copy. What it does
// not know is made zero, and a frame of a source it does not know is left out: ok is
// then false.
func (r *Redactor) Frame(f trace.Frame) (out trace.Frame, ok bool) {
	out = f
	if r.level == None {
		return out, true
	}
	out.Data = bytes.Clone(f.Data)
	switch f.Source {
	case trace.NFLog, trace.LegacyTrace:
		r.messages(out.Data, r.nflog)
	case trace.Conntrack:
		r.messages(out.Data, r.entry)
	case trace.NFTrace:
		r.messages(out.Data, r.nftrace)
	case trace.IPVS:
		out.Data = []byte(r.Virtual(string(out.Data)))
	case trace.Userspace:
		r.userspace(out.Data)
	case trace.Wire:
		r.wire(out.Data)
	case trace.Drops:
		r.drops(out.Data)
	default:
		return out, false
	}
	return out, true
}

func (r *Redactor) messages(data []byte, each func(nfnl.Attrs)) {
	for m := nfnl.NewMessages(data); m.Next(); {
		each(m.Attrs())
	}
}

// Attributes of linux/netfilter/nfnetlink_log.h.
const (
	logPayload = 9
	logPrefix  = 10
)

func (r *Redactor) nflog(a nfnl.Attrs) {
	// The header, mark, time and devices, and the two sequence numbers.
	keep := []uint16{1, 2, 3, 4, 5, 6, 7, 12, 13}
	for a.Next() {
		switch {
		case a.Type == logPayload:
			r.packet(a.Data)
		case a.Type == logPrefix:
			r.codeBytes(a.Data)
		case !slices.Contains(keep, a.Type):
			clear(a.Data)
		}
	}
}

// Attributes of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctTupleOrig  = 1
	ctTupleReply = 2
	ctTupleIP    = 1
)

func (r *Redactor) entry(a nfnl.Attrs) {
	// Status, protocol's state, timeout, mark, counters, use, id, zone, times.
	keep := []uint16{3, 4, 7, 8, 9, 10, 11, 12, 18, 20, 27}
	for a.Next() {
		switch {
		case a.Type == ctTupleOrig || a.Type == ctTupleReply:
			for part := nfnl.NewAttrs(a.Data); part.Next(); {
				if part.Type != ctTupleIP {
					continue
				}
				for ip := nfnl.NewAttrs(part.Data); ip.Next(); {
					r.addrBytes(ip.Data)
				}
			}
		case !slices.Contains(keep, a.Type):
			clear(a.Data)
		}
	}
}

// Attributes of linux/netfilter/nf_tables.h.
const (
	traceTable     = 1
	traceChain     = 2
	traceVerdict   = 5
	traceNetwork   = 8
	traceTransport = 9
	traceLast      = 21
	traceLink      = 7

	verdictChain = 2
)

func (r *Redactor) nftrace(a nfnl.Attrs) {
	var network, transport []byte
	for a.Next() {
		switch {
		case a.Type == traceTable || a.Type == traceChain:
			r.codeBytes(a.Data)
		case a.Type == traceVerdict:
			for v := nfnl.NewAttrs(a.Data); v.Next(); {
				if v.Type == verdictChain {
					r.codeBytes(v.Data)
				}
			}
		case a.Type == traceNetwork:
			network = a.Data
		case a.Type == traceTransport:
			transport = a.Data
		case a.Type == traceLink || a.Type > traceLast:
			clear(a.Data)
		}
	}
	switch {
	case len(network) >= 20 && network[0]>>4 == 4:
		r.transport(conntrack.Proto(network[9]), transport)
	case len(network) >= 40 && network[0]>>4 == 6:
		r.transport(conntrack.Proto(network[6]), transport)
	default:
		clear(transport)
	}
	r.packet(network)
}

// Offsets in an event of the userspace source, as it describes them.
const (
	relayAddrs    = 48
	relayAddr     = 18
	relayHead     = 120
	relayAddrsNum = 4
)

func (r *Redactor) userspace(b []byte) {
	for len(b) >= relayHead {
		n := int(binary.LittleEndian.Uint16(b))
		if n < relayHead || n > len(b) {
			break
		}
		for i := range relayAddrsNum {
			at := relayAddrs + i*relayAddr
			r.addrBytes(b[at : at+16])
		}
		r.codeBytes(b[relayHead:n])
		b = b[n:]
	}
	clear(b)
}

const (
	wireHead  = 16
	etherMACs = 12
	etherLen  = 14
)

func (r *Redactor) wire(b []byte) {
	for len(b) >= wireHead {
		n := int(binary.BigEndian.Uint32(b))
		if n < wireHead || n > len(b) {
			break
		}
		if p := b[wireHead:n]; len(p) >= etherLen {
			clear(p[:etherMACs])
			r.packet(p[etherLen:])
		} else {
			clear(p)
		}
		b = b[n:]
	}
	clear(b)
}

const (
	dropHead      = 16
	oldDropRecord = dropHead + 64 // in earlier recordings
	dropRecord    = oldDropRecord + 32
)

func (r *Redactor) drops(b []byte) {
	size := dropRecord
	if len(b)%dropRecord != 0 && len(b)%oldDropRecord == 0 {
		size = oldDropRecord
	}
	for ; len(b) >= size; b = b[size:] {
		r.packet(b[dropHead:oldDropRecord])
	}
	clear(b)
}

// codeBytes replaces the name of a chain or a tag in its place. One that has other
// names in it, as those of nftables mode have, becomes one that says nothing.
func (r *Redactor) codeBytes(b []byte) {
	text := string(bytes.TrimRight(b, "\x00"))
	out := r.codes(text)
	if len(out) == len(text) {
		copy(b, out)
	}
	if s := r.said(r.Addresses(out)); s != out {
		for i := range text {
			b[i] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[r.code(text, 32)[i%32]&31]
		}
	}
}

// blurred is how many bytes are replaced together: those by which datagrams are told
// apart (see trace.ParseHeader), so that one that was cut short stays the same.
const blurred = 12

// blur makes of bytes others of which nothing can be told but whether they are the
// same.
func (r *Redactor) blur(b []byte) {
	for part := range slices.Chunk(b, blurred) {
		m := hmac.New(sha256.New, r.key)
		m.Write([]byte{'p'})
		m.Write(part)
		copy(part, m.Sum(nil))
	}
}

// packet replaces in a packet, from its IP header on: addresses, and all that is
// behind the transport's header. Checksums, from which addresses could be told,
// become zero.
func (r *Redactor) packet(b []byte) {
	var head int
	var proto conntrack.Proto
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		head, proto = int(b[0]&15)*4, conntrack.Proto(b[9])
		if head < 20 || head > len(b) {
			clear(b[20:])
			head = 20
		}
		b[10], b[11] = 0, 0
		r.addrBytes(b[12:16])
		r.addrBytes(b[16:20])
		clear(b[20:head])
		if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 { // a later fragment
			r.blur(b[head:])
			return
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		head, proto = 40, conntrack.Proto(b[6])
		r.addrBytes(b[8:24])
		r.addrBytes(b[24:40])
	default:
		clear(b)
		return
	}
	r.transport(proto, b[head:])
}

func (r *Redactor) transport(proto conntrack.Proto, b []byte) {
	const icmpHead = 8
	keep, sum := 0, 0
	switch proto {
	case conntrack.TCP:
		keep, sum = 20, 16
		if len(b) > 12 {
			keep = max(20, int(b[12]>>4)*4)
		}
	case conntrack.UDP:
		keep, sum = 8, 6
	case conntrack.SCTP:
		keep, sum = 12, 8
	case conntrack.ICMP, conntrack.ICMPv6:
		if len(b) >= icmpHead {
			b[2], b[3] = 0, 0
			r.packet(b[icmpHead:]) // what it is about, if it is an error
			return
		}
	}
	for i := sum; sum > 0 && i < min(len(b), sum+2); i++ {
		b[i] = 0
	}
	if keep < len(b) {
		r.blur(b[keep:])
	}
}
