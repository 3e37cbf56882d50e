package stack

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy"
)

const (
	// arriveTime is how long spans may take to Jaeger; a queue that was full
	// for an outage takes its time.
	arriveTime = 60 * time.Second
	// clockSlack is how far a time that the kernel took may lie outside of what
	// a client measured around it.
	clockSlack = 20 * time.Millisecond
	// sampledReports is how many of the clients' connections are looked up.
	sampledReports = 60
	// outageConnections are made while the collector is away, over outageTime.
	outageConnections = 40
	outageTime        = 10 * time.Second
)

// CheckTracing holds what Jaeger has against what the lab's clients reported,
// makes requests with a traceparent of its own if joined, and takes the
// collector away for a while. Traffic must have stopped.
func (s *Stack) CheckTracing(ctx context.Context, reports []lab.Report, joined bool) []Result {
	var results []Result
	add := func(name string, detail string, err error) {
		results = append(results, result(name, err, "%s", detail))
	}
	detail, err := s.checkCounts(ctx)
	add("every span sent is in Jaeger", detail, err)
	detail, err = s.checkReports(ctx, reports)
	add("connections have their traces", detail, err)
	if joined {
		detail, err = s.checkJoined(ctx)
		add("the application's trace has the connection", detail, err)
	}
	detail, err = s.checkOutage(ctx)
	add("the collector may go away", detail, err)
	return results
}

// exports sums up what the nodes' exporters have done.
func (s *Stack) exports(ctx context.Context) (sum relay.Export, failing int, err error) {
	for i := range s.Lab().Cluster().Nodes {
		c, err := relay.Dial(s.Lab().NodeSocket(s.Lab().Cluster().Nodes[i].Name))
		if err != nil {
			return sum, 0, err
		}
		st, err := c.Status(ctx)
		c.Close()
		if err != nil {
			return sum, 0, err
		}
		for _, e := range st.Exports {
			if e.Signal != "traces" {
				continue
			}
			sum.Seen += e.Seen
			sum.Unsampled += e.Unsampled
			sum.Dropped += e.Dropped
			sum.Queued += e.Queued
			sum.Sent += e.Sent
			sum.Failed += e.Failed
			sum.Rejected += e.Rejected
			if !e.Failing.IsZero() {
				failing++
			}
		}
	}
	return sum, failing, nil
}

// until tries f until it succeeds or ctx or the time to arrive is over.
func until(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, arriveTime)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// checkCounts wants every connection sent, and as many spans in Jaeger as the
// collector took and the nodes sent.
func (s *Stack) checkCounts(ctx context.Context) (detail string, err error) {
	err = until(ctx, func() error {
		e, _, err := s.exports(ctx)
		if err != nil {
			return err
		}
		if e.Seen == 0 || e.Sent != e.Seen {
			return fmt.Errorf("of %d connections %d were sent: %d wait, %d dropped, %d failed", e.Seen, e.Sent, e.Queued, e.Dropped, e.Failed)
		}
		sent, err := s.prometheusSum(ctx, `sum(kptrace_otlp_items_total{signal="traces"})`)
		if err != nil {
			return err
		}
		page, err := s.page(ctx, Collector, "/metrics")
		if err != nil {
			return err
		}
		took := sumOf(page, "otelcol_receiver_accepted_spans", "")
		client := s.Dialer(s.first().Name, loopback(jaegerSelfPort))
		if page, err = get(ctx, client, "http://jaeger/metrics"); err != nil {
			return err
		}
		stored := sumOf(page, "jaeger_collector_spans_saved_by_svc_total", `result="ok",svc="kptrace"`)
		detail = fmt.Sprintf("%d connections: %.0f spans sent, %.0f taken by the collector, %.0f kept by Jaeger", e.Sent, sent, took, stored)
		if sent == 0 || sent != took || took != stored {
			return errors.New(detail)
		}
		return nil
	})
	return detail, err
}

func (s *Stack) prometheusSum(ctx context.Context, expr string) (float64, error) {
	q, err := s.Prometheus()
	if err != nil {
		return 0, err
	}
	list, err := q.Query(ctx, expr)
	if err != nil || len(list) != 1 {
		return 0, errors.Join(fmt.Errorf("stack: %s has %d values", expr, len(list)), err)
	}
	return list[0].Value, nil
}

// checkReports looks connections of the clients up in Jaeger, evenly spread.
func (s *Stack) checkReports(ctx context.Context, reports []lab.Report) (string, error) {
	step := max(1, len(reports)/sampledReports)
	var wrong []error
	looked, failed := 0, 0
	for i := 0; i < len(reports); i += step {
		r := &reports[i]
		if !r.Local.IsValid() || r.Local.Port() == 0 {
			continue
		}
		looked++
		if r.Err != "" {
			failed++
		}
		if err := s.checkReport(ctx, r); err != nil {
			wrong = append(wrong, fmt.Errorf("%s from %s to %s, %s: %w", r.Client, r.Local, r.URL, r.Start.Format(time.TimeOnly), err))
		}
	}
	if looked == 0 {
		return "", errors.New("no client reported a connection")
	}
	if len(wrong) > 5 {
		wrong = append(wrong[:5], fmt.Errorf("and %d more", len(wrong)-5))
	}
	return fmt.Sprintf("%d of %d connections looked up, %d of them failed ones: tree, pod, times, status", looked, len(reports), failed), errors.Join(wrong...)
}

func (s *Stack) checkReport(ctx context.Context, r *lab.Report) error {
	tags, err := json.Marshal(map[string]string{"source.address": r.Local.Addr().String(), "source.port": fmt.Sprint(r.Local.Port())})
	if err != nil {
		return err
	}
	list, err := s.traces(ctx, "/api/traces", url.Values{
		"service": {"kptrace"}, "tags": {string(tags)}, "limit": {"20"},
		"start": {fmt.Sprint(r.Start.Add(-5 * time.Second).UnixMicro())}, "end": {fmt.Sprint(r.End.Add(5 * time.Second).UnixMicro())},
	})
	if err != nil {
		return err
	}
	for _, spans := range list {
		root := rootOf(spans, "")
		if root == nil {
			continue
		}
		if d := time.UnixMicro(root.Start).Sub(r.Start); d < -clockSlack || time.UnixMicro(root.Start).After(r.End.Add(clockSlack)) {
			continue // another one from the same port
		}
		return holds(r, root, spans)
	}
	return fmt.Errorf("none of %d traces from there is it", len(list))
}

// holds compares a trace with what its client knows.
func holds(r *lab.Report, root *jaegerSpan, spans []jaegerSpan) error {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if r.Server != "" {
		if got := root.tag("destination.k8s.namespace.name") + "/" + root.tag("destination.k8s.pod.name"); got != r.Server {
			say("went to %s, answered by %s", got, r.Server)
		}
	}
	if got := root.tag("source.k8s.namespace.name") + "/" + root.tag("source.k8s.pod.name"); got != r.Client && got != "/" {
		say("is from %s", got)
	}
	if got := root.tag("network.peer.address"); got != r.Remote.Addr().String() {
		say("dialled %s, not %s", got, r.Remote.Addr())
	}
	if isError := root.tag("error") == "true"; isError != (r.Err != "") {
		say("error is %v, the client has %q", isError, r.Err)
	}
	count := map[string]int{}
	for i := range spans {
		sp := &spans[i]
		if sp != root && sp.parent() != root.ID {
			say("%s is no child of the connection", sp.Name)
		}
		count[strings.Fields(sp.Name)[0]]++
		if sp.Start < root.Start || sp.Start+sp.Duration > root.Start+root.Duration+2 {
			say("%s lies outside of the connection", sp.Name)
		}
	}
	if count["connection"] != 1 || count["decision"] != 1 {
		say("spans %v", count)
	}
	// In userspace mode the client knows the proxy only, which takes its
	// connection before it has reached a pod, or although it reaches none.
	relayed := root.tag("kptrace.mode") == string(proxy.Userspace)
	if r.Established >= 0 && r.Proto == conntrack.TCP && !(relayed && r.Err != "") {
		if count["attempt"] == 0 || count["established"] != 1 {
			say("spans %v of an established connection", count)
		}
		for i := range spans {
			if sp := &spans[i]; sp.Name == "established" && !relayed {
				if at := time.UnixMicro(sp.Start); at.After(r.Start.Add(r.Established + clockSlack)) {
					say("established %v after the client knew", at.Sub(r.Start.Add(r.Established)))
				}
			}
		}
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	return nil
}

// rootOf finds kptrace's span of the connection, below a parent.
func rootOf(spans []jaegerSpan, parent string) *jaegerSpan {
	for i := range spans {
		if strings.HasPrefix(spans[i].Name, "connection") && spans[i].parent() == parent {
			return &spans[i]
		}
	}
	return nil
}

// checkJoined is an application: it makes a connection with two requests that
// name spans of its own, exports these, and finds the connection below the
// first, with a link to the second.
func (s *Stack) checkJoined(ctx context.Context) (string, error) {
	pod, service, err := s.someClient()
	if err != nil {
		return "", err
	}
	first, second := newSpan("GET /"), newSpan("GET /second")
	first.start = time.Now()
	if err := s.request(ctx, pod, service, first, second); err != nil {
		return "", err
	}
	first.end = time.Now()
	second.start, second.end = first.start, first.end
	if err := s.exportSpans(ctx, first, second); err != nil {
		return "", err
	}
	var detail string
	err = until(ctx, func() error {
		list, err := s.traces(ctx, "/api/traces/"+first.trace, nil)
		if err != nil {
			return err
		}
		if len(list) != 1 {
			return fmt.Errorf("%d traces of id %s", len(list), first.trace)
		}
		root := rootOf(list[0], first.span)
		if root == nil {
			return fmt.Errorf("no connection below the application's span; spans: %v", names(list[0]))
		}
		linked := false
		for _, r := range root.References {
			linked = linked || r.Type == "FOLLOWS_FROM" && r.Trace == second.trace && r.Span == second.span
		}
		if !linked {
			return fmt.Errorf("no link to the second request: %+v", root.References)
		}
		at := time.UnixMicro(root.Start)
		if at.Before(first.start.Add(-clockSlack)) || at.After(first.end.Add(clockSlack)) {
			return fmt.Errorf("the connection began at %v, the application's span at %v", at, first.start)
		}
		detail = fmt.Sprintf("%s > %s > pod %s, and a link to the second request", "GET /", root.Name, root.tag("destination.k8s.pod.name"))
		return nil
	})
	return detail, err
}

func names(spans []jaegerSpan) (list []string) {
	for i := range spans {
		list = append(list, spans[i].Name)
	}
	return list
}

// someClient picks a pod with a client and the Service it connects to by HTTP.
func (s *Stack) someClient() (pod string, service netip.AddrPort, err error) {
	for _, svc := range s.Lab().Cluster().Services {
		if svc.Name != "foo" {
			continue
		}
		for _, p := range s.Lab().Cluster().Pods {
			if len(p.Traffic) > 0 && !p.External {
				return lab.PodSpace(p.Namespace, p.Name), netip.AddrPortFrom(svc.ClusterIP, svc.Number), nil
			}
		}
	}
	return "", service, errors.New("stack: the scenario has no Service foo and client")
}

// appSpan is a span of an application that is not kptrace.
type appSpan struct {
	trace, span, name string
	start, end        time.Time
}

func newSpan(name string) *appSpan {
	var b [24]byte
	_, _ = rand.Read(b[:]) // never fails
	return &appSpan{trace: hex.EncodeToString(b[:16]), span: hex.EncodeToString(b[16:]), name: name}
}

func (a *appSpan) header() string { return "traceparent: 00-" + a.trace + "-" + a.span + "-01\r\n" }

// request sends two requests over one connection from a pod. The lab's servers
// answer one request a connection; to them the second one is a header of the
// first.
func (s *Stack) request(ctx context.Context, pod string, service netip.AddrPort, first, second *appSpan) error {
	var conn net.Conn
	var err error
	if into := s.Lab().Do(pod, func() error {
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", service.String())
		return nil
	}); into != nil || err != nil {
		return errors.Join(into, err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: foo\r\n"+first.header()+"X-More: "); err != nil {
		return err
	}
	time.Sleep(20 * time.Millisecond) // a packet of its own
	if _, err := io.WriteString(conn, "GET /second HTTP/1.1\r\n"+second.header()+"\r\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err == nil && !bytes.HasPrefix(answer, []byte("HTTP/1.1 200 ")) {
		err = fmt.Errorf("stack: the pod answers %.60q", answer)
	}
	return err
}

// exportSpans sends an application's spans to the collector, as OTLP in JSON.
func (s *Stack) exportSpans(ctx context.Context, list ...*appSpan) error {
	var spans []map[string]any
	for _, a := range list {
		spans = append(spans, map[string]any{
			"traceId": a.trace, "spanId": a.span, "name": a.name, "kind": 3,
			"startTimeUnixNano": fmt.Sprint(a.start.UnixNano()), "endTimeUnixNano": fmt.Sprint(a.end.UnixNano()),
		})
	}
	body, err := json.Marshal(map[string]any{"resourceSpans": []any{map[string]any{
		"resource":   map[string]any{"attributes": []any{map[string]any{"key": "service.name", "value": map[string]any{"stringValue": "web"}}}},
		"scopeSpans": []any{map[string]any{"spans": spans}},
	}}})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://collector/v1/traces", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	client := s.Dialer(s.first().Name, netip.AddrPortFrom(s.first().Addr, otlpHTTPPort))
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("stack: the collector answers %s", res.Status)
	}
	return nil
}

// checkOutage kills the collector, makes connections, which must work, and
// wants all of them in Jaeger once it is back.
func (s *Stack) checkOutage(ctx context.Context) (string, error) {
	pod, service, err := s.someClient()
	if err != nil {
		return "", err
	}
	before, _, err := s.exports(ctx)
	if err != nil {
		return "", err
	}
	if err := s.stop(Collector); err != nil {
		return "", err
	}
	began := time.Now()
	for i := range outageConnections {
		if err := s.request(ctx, pod, service, newSpan("GET /"), newSpan("GET /second")); err != nil {
			return "", fmt.Errorf("connection %d without a collector: %w", i+1, err)
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-time.After(outageTime / outageConnections):
		}
	}
	err = until(ctx, func() error {
		e, failing, err := s.exports(ctx)
		if err == nil && (failing == 0 || e.Seen < before.Seen+outageConnections || e.Queued == 0) {
			err = fmt.Errorf("%d nodes say that they cannot send, %d new connections, %d wait", failing, e.Seen-before.Seen, e.Queued)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if err := s.startCollector(ctx); err != nil {
		return "", err
	}
	away := time.Since(began)
	var detail string
	err = until(ctx, func() error {
		e, failing, err := s.exports(ctx)
		if err != nil {
			return err
		}
		detail = fmt.Sprintf("away for %v: %d connections worked, all %d were sent when it was back, none dropped", away.Round(time.Second), outageConnections, e.Seen-before.Seen)
		if failing > 0 || e.Sent != e.Seen || e.Dropped+e.Failed != before.Dropped+before.Failed {
			return fmt.Errorf("after an outage of %v: seen %d, sent %d, dropped %d, failed %d, %d nodes still fail",
				away.Round(time.Second), e.Seen, e.Sent, e.Dropped, e.Failed, failing)
		}
		return nil
	})
	return detail, err
}
