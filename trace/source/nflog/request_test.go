package nflog

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
)

const traceparentExample = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

// segment is a TCP packet over IPv4 or IPv6 with a payload and a timestamp
// option.
func segment(six bool, payload string) []byte {
	tcp := make([]byte, 32, 32+len(payload))
	binary.BigEndian.PutUint16(tcp, 40312)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	tcp[12], tcp[13] = 8<<4, 0x18
	tcp = append(tcp, payload...)
	if six {
		ip := make([]byte, 40)
		ip[0], ip[6] = 6<<4, 6
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
		src, dst := netip.MustParseAddr("fd00::5").As16(), netip.MustParseAddr("fd00::10").As16()
		copy(ip[8:], src[:])
		copy(ip[24:], dst[:])
		return append(ip, tcp...)
	}
	ip := make([]byte, 20)
	ip[0], ip[9] = 0x45, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(tcp)))
	copy(ip[12:], []byte{10, 244, 1, 5})
	copy(ip[16:], []byte{10, 96, 0, 10})
	return append(ip, tcp...)
}

func TestParseRequest(t *testing.T) {
	ap := netip.MustParseAddrPort
	request := "GET / HTTP/1.1\r\nHost: foo\r\nTraceParent:  " + traceparentExample + " \r\nAccept: */*\r\n\r\n"
	for six, want := range map[bool]conntrack.Tuple{
		false: conntrack.NewTuple(conntrack.TCP, ap("10.244.1.5:40312"), ap("10.96.0.10:80")),
		true:  conntrack.NewTuple(conntrack.TCP, ap("[fd00::5]:40312"), ap("[fd00::10]:80")),
	} {
		tuple, c, ok := ParseRequest(segment(six, request))
		if !ok || tuple != want || c.Trace.String() != traceparentExample[3:35] || !c.Sampled() {
			t.Errorf("%v %+v %v", tuple, c, ok)
		}
	}
	for name, text := range map[string]string{
		"in the body":      "POST / HTTP/1.1\r\nHost: foo\r\n\r\ntraceparent: " + traceparentExample + "\r\n",
		"no request":       "traceparent: " + traceparentExample + "\r\n\r\n",
		"middle of one":    "x\r\ntraceparent: " + traceparentExample + "\r\n\r\n",
		"cut off":          "GET / HTTP/1.1\r\ntraceparent: " + traceparentExample[:40],
		"no value":         "GET / HTTP/1.1\r\ntraceparent:\r\n\r\n",
		"another header":   "GET / HTTP/1.1\r\nx-traceparent: " + traceparentExample + "\r\n\r\n",
		"in the target":    "GET /traceparent:" + traceparentExample + " HTTP/1.1\r\nHost: foo\r\n\r\n",
		"of HTTP/2":        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"damaged":          "GET / HTTP/1.1\r\ntraceparent: " + strings.Replace(traceparentExample, "-", "+", 1) + "\r\n\r\n",
		"nothing":          "",
		"an answer":        "HTTP/1.1 200 OK\r\ntraceparent: " + traceparentExample + "\r\n\r\n",
		"a lower method":   "get / HTTP/1.1\r\ntraceparent: " + traceparentExample + "\r\n\r\n",
		"no method at all": " / HTTP/1.1\r\ntraceparent: " + traceparentExample + "\r\n\r\n",
	} {
		if _, c, ok := ParseRequest(segment(false, text)); ok {
			t.Errorf("%s: %+v", name, c)
		}
	}
	whole := segment(false, request)
	for n := range whole {
		_, c, ok := ParseRequest(whole[:n])
		if complete := strings.Contains(string(whole[:n]), " \r\n"); ok != complete {
			t.Errorf("%d bytes: %v, %+v", n, ok, c)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	for _, six := range []bool{false, true} {
		f.Add(segment(six, "GET / HTTP/1.1\r\ntraceparent: "+traceparentExample+"\r\n\r\n"))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, c, ok := ParseRequest(b); ok && !strings.Contains(string(b), c.Trace.String()) {
			t.Errorf("%+v is not in the packet", c)
		}
	})
}
