package correlate

import (
	"fmt"
	"net/netip"

	"github.com/kptrace/kptrace/trace"
)

// icmpError puts an ICMP error into words: "host unreachable from 10.0.0.1".
// port says that it is the port that is unreachable, fatal that it is an error
// at all and not advice on the packet size or the route.
func icmpError(e *trace.Event) (text string, port, fatal bool) {
	if e.Tuple.Is4() {
		text, port = icmp4(e.ICMPType, e.ICMPCode)
	} else {
		text, port = icmp6(e.ICMPType, e.ICMPCode)
	}
	if text == "" {
		return "", false, false
	}
	if from := netip.AddrFrom16(e.ICMPFrom).Unmap(); !from.IsUnspecified() {
		text += " from " + from.String()
	}
	return text, port, true
}

// tooBig reports whether an ICMP error says that a packet exceeds the MTU of a link.
func tooBig(e *trace.Event) bool {
	if e.Tuple.Is4() {
		return e.ICMPType == 3 && e.ICMPCode == 4
	}
	return e.ICMPType == 2
}

// icmp4 names the errors of RFC 792 and RFC 1812, empty for what is none.
func icmp4(kind, code uint8) (text string, port bool) {
	switch {
	case kind == 11:
		return "time exceeded", false
	case kind == 12:
		return "parameter problem", false
	case kind != 3 || code == 4:
		return "", false
	}
	switch code {
	case 0, 6, 8, 11:
		return "net unreachable", false
	case 1, 7, 12:
		return "host unreachable", false
	case 2:
		return "protocol unreachable", false
	case 3:
		return "port unreachable", true
	case 9, 10, 13:
		return "administratively prohibited", false
	}
	return fmt.Sprintf("unreachable (code %d)", code), false
}

// icmp6 names the errors of RFC 4443, empty for what is none.
func icmp6(kind, code uint8) (text string, port bool) {
	switch kind {
	case 3:
		return "time exceeded", false
	case 4:
		return "parameter problem", false
	case 1:
	default:
		return "", false
	}
	switch code {
	case 0:
		return "net unreachable", false
	case 1, 5, 6:
		return "administratively prohibited", false
	case 2, 3:
		return "host unreachable", false
	case 4:
		return "port unreachable", true
	}
	return fmt.Sprintf("unreachable (code %d)", code), false
}
