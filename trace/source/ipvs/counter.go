package ipvs

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// counterKey names a virtual server, or a server of it.
type counterKey struct {
	proto           conntrack.Proto
	virtual, server netip.AddrPort
}

// counter follows what the kernel counts. Connections and packets are read as
// 32 bits, which wrap around; a server that was made anew counts from zero.
type counter struct {
	last, total trace.Traffic
	begun       bool
}

func (c counter) add(now trace.Traffic) counter {
	if !c.begun {
		return counter{now, now, true}
	}
	// Bytes do not wrap: if they went down, it is a new one.
	fresh := now.BytesIn < c.last.BytesIn || now.BytesOut < c.last.BytesOut
	grow := func(total *uint64, last, now uint64) {
		switch {
		case fresh:
			*total += now
		default:
			*total += uint64(uint32(now) - uint32(last)) //nolint:gosec // wraps as the kernel's does
		}
	}
	t := c.total
	grow(&t.Connections, c.last.Connections, now.Connections)
	grow(&t.PacketsIn, c.last.PacketsIn, now.PacketsIn)
	grow(&t.PacketsOut, c.last.PacketsOut, now.PacketsOut)
	if fresh {
		t.BytesIn += now.BytesIn
		t.BytesOut += now.BytesOut
	} else {
		t.BytesIn += now.BytesIn - c.last.BytesIn
		t.BytesOut += now.BytesOut - c.last.BytesOut
	}
	return counter{now, t, true}
}
