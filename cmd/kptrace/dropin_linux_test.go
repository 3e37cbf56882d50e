package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// get asks a URL from inside the namespace. The code is 0 if nobody answers.
func (w *world) get(url string) (int, string, http.Header) {
	w.t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (c net.Conn, err error) {
			if e := w.ns.Do(func() error { c, err = net.DialTimeout(network, addr, time.Second); return nil }); e != nil {
				return nil, e
			}
			return c, err
		},
	}}
	res, err := client.Get(url)
	if err != nil {
		return 0, "", nil
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Error(err)
	}
	return res.StatusCode, string(body), res.Header
}

// gets waits until a URL answers with a code and a body that has all of want.
func (w *world) gets(url string, code int, want ...string) {
	w.t.Helper()
	var got int
	var body string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		got, body, _ = w.get(url)
		ok := got == code
		for _, s := range want {
			ok = ok && strings.Contains(body, s)
		}
		if ok {
			return
		}
	}
	w.t.Errorf("%s: %d\n%s\nwant %d and %q", url, got, body, code, want)
}

// local is a Service for which load balancers ask this node, and this node,
// with a taint if it is about to go.
func local(ready bool, taint string) map[string]string {
	return map[string]string{"local.yaml": fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: local, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.30
  externalTrafficPolicy: Local
  healthCheckNodePort: 31000
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: local-1, namespace: shop, labels: {kubernetes.io/service-name: local}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.1.1], nodeName: node1, conditions: {ready: %v}}]
---
apiVersion: v1
kind: Node
metadata: {name: node1}
spec: {taints: [%s]}
status: {addresses: [{type: InternalIP, address: 10.0.0.1}]}
`, ready, taint)}
}

// TestDropIn runs as a kube-proxy does, by a configuration file, and asks
// everything that people and load balancers ask a kube-proxy. A change of the
// file ends it; the rules stay.
func TestDropIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(local(true, ""))
	path := filepath.Join(w.dir, "config.yaml")
	text := `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: ipvs
hostnameOverride: node1
iptables: {minSyncPeriod: 10ms}
conntrack: {udpTimeout: 17s}
`
	writeFile(t, path, text)
	p := w.start("kptrace", "proxy", "--config", path, "--manifests", w.manifests, "--ipvs-scheduler=rr", "-v=2",
		"--metrics-check-every=50ms", "--metrics-check-max-rules=5")
	w.synced(p)

	w.gets("http://127.0.0.1:10256/healthz", 200, `"nodeEligible":true`, `"healthy":true`, `"IPv4":{`)
	w.gets("http://127.0.0.1:10256/livez", 200, `"healthy":true`)
	w.gets("http://127.0.0.1:10249/proxyMode", 200, "iptables")
	w.gets("http://127.0.0.1:10249/healthz", 200, "ok")
	w.gets("http://127.0.0.1:10249/configz", 200, `{"kubeproxy.config.k8s.io":{`, `"mode":"ipvs"`)
	if code, _, _ := w.get("http://127.0.0.1:10249/debug/pprof/"); code != 404 {
		t.Errorf("profiling answers %d without being asked for", code)
	}
	w.gets("http://127.0.0.1:10249/metrics", 200,
		`kptrace_proxy_mode_fallback{mode="iptables",wanted="ipvs"} 1`,
		`kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1`,
		`kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"}`,
		`kubeproxy_proxy_healthz_total{code="200"}`, "go_goroutines", "process_start_time_seconds")
	if got := w.run("", "cat", "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"); strings.TrimSpace(got) != "17" {
		t.Errorf("UDP timeout is %s", got)
	}

	// Found by looking at a few rules at a time.
	taken := func(verb string) {
		w.run("", "iptables-nft", "-t", "nat", verb, "PREROUTING", "-p", "tcp", "--dport", "30080", "-j", "DNAT", "--to-destination", "192.0.2.9")
	}
	taken("-I")
	w.gets("http://127.0.0.1:10249/metrics", 200, `kptrace_check_findings{code="nodeport-shadowed",severity="breaks"} 1`)
	taken("-D")
	w.gets("http://127.0.0.1:10249/metrics", 200, `kptrace_check_findings{code="nodeport-shadowed",severity="breaks"} 0`)

	w.gets("http://127.0.0.1:31000/", 200, `"namespace": "shop"`, `"localEndpoints": 1`, `"serviceProxyHealthy": true`)
	if _, _, h := w.get("http://127.0.0.1:31000/"); h.Get("X-Load-Balancing-Endpoint-Weight") != "1" {
		t.Errorf("weight %q", h.Get("X-Load-Balancing-Endpoint-Weight"))
	}
	w.write(local(false, "{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}"))
	w.gets("http://127.0.0.1:31000/", 503, `"localEndpoints": 0`)
	w.gets("http://127.0.0.1:10256/healthz", 503, `"nodeEligible":false`, `"healthy":true`)
	w.gets("http://127.0.0.1:10256/livez", 200)
	if err := os.Remove(filepath.Join(w.manifests, "local.yaml")); err != nil {
		t.Fatal(err)
	}
	w.gets("http://127.0.0.1:31000/", 0)

	for _, want := range []string{"Using iptables Proxier", "falling back to the iptables mode", "ignored because --config is given: --ipvs-scheduler"} {
		if !strings.Contains(p.err.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, p.err)
		}
	}
	writeFile(t, path, "") // a full disk
	p.await(p.err, "cannot be used: going on", 10*time.Second)
	writeFile(t, path, text+"oomScoreAdj: 5\n")
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("still there after its configuration changed")
	}
	if p.ExitCode() != 1 || !strings.Contains(p.err.String(), "configuration file was updated") {
		t.Errorf("ended with %d:\n%s", p.ExitCode(), p.err)
	}
	if rules := w.run("", "iptables-nft-save", "-t", "nat"); !strings.Contains(rules, "KUBE-SERVICES") {
		t.Errorf("the rules are gone:\n%s", rules)
	}
	w.must("proxy", "--cleanup")
	if rules := w.run("", "iptables-nft-save"); strings.Contains(rules, "KUBE-SERVICES") {
		t.Errorf("the rules stayed after --cleanup:\n%s", rules)
	}
}
