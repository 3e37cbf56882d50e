package node

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/trace"
)

// serveHTTP answers requests on a port of the host address.
func serveHTTP(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", hostIP.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 30 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "ok")
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestRequests makes requests with and without a traceparent over one
// connection, in both flavours: the connection's Flow has those that have one, in
// their order, and what is in a body is not looked at.
func TestRequests(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			r := start(t, Config{
				Backend:      iptables.New(iptables.Config{Flavour: flavour, Trace: true, RequestGroup: 101}),
				RequestGroup: 101,
			})
			defer r.end()
			r.states <- snapshot(serveHTTP(t))
			var conn net.Conn
			eventually(t, 30*time.Second, "the Service answers", func() bool {
				var err error
				conn, err = net.DialTimeout("tcp", clusterIP.String()+":80", time.Second)
				return err == nil
			})
			conn.Close()

			var mu sync.Mutex
			flows := map[trace.FlowID]*trace.Flow{}
			client, err := relay.Dial(r.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			ctx, cancel := context.WithCancel(t.Context())
			header, ended := make(chan struct{}), make(chan error, 1)
			go func() {
				ended <- client.Follow(ctx, trace.Request{}, func(m trace.Message) error {
					mu.Lock()
					defer mu.Unlock()
					if m.Header != nil {
						close(header)
					}
					if m.Flow != nil {
						flows[m.Flow.ID] = m.Flow
					}
					return nil
				})
			}()
			<-header

			if conn, err = net.Dial("tcp", clusterIP.String()+":80"); err != nil {
				t.Fatal(err)
			}
			local := conn.LocalAddr().(*net.TCPAddr).AddrPort()
			answers := bufio.NewReader(conn)
			parent := func(n int) string { return fmt.Sprintf("00-%032x-%016x-01", n, n) }
			pad := strings.Repeat("x", 100)
			for _, request := range []string{
				"GET /1 HTTP/1.1\r\nHost: foo\r\nTraceparent: " + parent(1) + "\r\n\r\n",
				"GET /none HTTP/1.1\r\nHost: foo\r\nX-Pad: " + pad + "\r\n\r\n",
				"GET /2 HTTP/1.1\r\nHost: foo\r\nCookie: " + strings.Repeat(pad, 10) + "\r\ntraceparent: " + parent(2) + "\r\n\r\n",
				fmt.Sprintf("POST /body HTTP/1.1\r\nHost: foo\r\nContent-Length: %d\r\n\r\ntraceparent: %s\r\n", len(parent(9))+15, parent(9)),
				"GET /3 HTTP/1.1\r\nHost: foo\r\nTRACEPARENT: " + parent(3) + "\r\n\r\n",
			} {
				if _, err := conn.Write([]byte(request)); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(answers, nil)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}
			conn.Close()
			var f *trace.Flow
			eventually(t, 30*time.Second, "the connection's flow ends", func() bool {
				mu.Lock()
				defer mu.Unlock()
				for _, g := range flows {
					if g.Client.Addr == local && g.Ended {
						f = g
						return true
					}
				}
				return false
			})
			var got []string
			for i, c := range f.Carried {
				got = append(got, fmt.Sprintf("00-%s-%s-%02x", c.Trace, c.Span, c.Flags))
				if age := c.Time.Sub(f.Start); age < 0 || age > f.Duration+time.Second || i > 0 && c.Time.Before(f.Carried[i-1].Time) {
					t.Errorf("request %d is %v after the start", i, age)
				}
			}
			if want := []string{parent(1), parent(2), parent(3)}; strings.Join(got, " ") != strings.Join(want, " ") {
				t.Errorf("requests %q, want %q", got, want)
			}
			if f.TraceID().String() != parent(1)[3:35] {
				t.Errorf("trace %s", f.TraceID())
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
