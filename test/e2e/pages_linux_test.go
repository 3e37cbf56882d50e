//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// page is an answer.
type page struct {
	code  int
	media string
	body  string
}

// get asks a server in a namespace.
func get(t *testing.T, ns *netns.NS, url, accept string) (page, error) {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = ns.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	res, err := client.Do(req)
	if err != nil {
		return page{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	media, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	return page{res.StatusCode, media, string(body)}, err
}

// TestPages asks upstream and kptrace for everything that kube-proxy serves: the
// same paths answer with the same codes and kinds of content, /configz says the
// same, /flagz has every flag of upstream, and no metric of kube-proxy's own is
// missing or of another type.
func TestPages(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{RBAC: true})
	o := &objects{}
	o.add("foo", "http:80", "a,b", nodePort)
	o.create(t, c.client)
	theirs, ours := newNode(t, c), newNode(t, c)
	flags := []string{"--profiling", "--cluster-cidr=10.244.0.0/16", "--v=2"}
	startUpstream(t, c, theirs, xtables.NFT, flags...)
	startKptrace(t, c, ours, xtables.NFT, flags...)
	const at = "http://127.0.0.1:10249"
	for _, ns := range []*netns.NS{theirs, ours} {
		eventually(t, "a first sync", func() error {
			p, err := get(t, ns, at+"/metrics", "")
			if err == nil && !strings.Contains(p.body, `sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"} `) {
				err = fmt.Errorf("%d", p.code)
			}
			return err
		})
	}
	both := func(url, accept string) (a, b page) {
		t.Helper()
		a, err := get(t, theirs, url, accept)
		if err == nil {
			b, err = get(t, ours, url, accept)
		}
		if err != nil {
			t.Fatal(err)
		}
		if a.code != b.code || a.code == 200 && a.media != b.media {
			t.Errorf("%s, accepting %q: upstream %d %s, kptrace %d %s: %s", url, accept, a.code, a.media, b.code, b.media, b.body)
		}
		return a, b
	}
	for _, path := range []string{
		"/healthz", "/healthz/ping", "/healthz?verbose", "/proxyMode", "/metrics/slis", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/symbol",
		"/debug/pprof/heap", "/nothing", "/configz", "/flagz", "/statusz",
	} {
		a, b := both(at+path, "")
		if (strings.HasPrefix(path, "/healthz") || path == "/proxyMode") && a.body != b.body {
			t.Errorf("%s: upstream %q, kptrace %q", path, a.body, b.body)
		}
	}
	for _, path := range []string{"/healthz", "/livez"} {
		both("http://127.0.0.1:10256"+path, "")
	}

	a, b := both(at+"/configz", "")
	if diff := cmp.Diff(object(t, a.body), object(t, b.body)); diff != "" {
		t.Errorf("/configz (-upstream +kptrace):\n%s", diff)
	}
	for path, kind := range map[string]string{"/flagz": "Flagz", "/statusz": "Statusz"} {
		for _, accept := range []string{"*/*", "application/json", "application/json;v=v1beta1;g=config.k8s.io;as=" + kind, "application/json;v=v1;g=config.k8s.io;as=" + kind} {
			a, b := both(at+path, accept)
			if a.media != "application/json" || a.code != 200 {
				continue
			}
			x, y := object(t, a.body), object(t, b.body)
			for key := range x {
				if _, ok := y[key]; !ok {
					t.Errorf("%s: no %q in %s", path, key, b.body)
				}
			}
			if kind == "Statusz" {
				if diff := cmp.Diff(x["paths"], y["paths"]); diff != "" {
					t.Errorf("/statusz (-upstream +kptrace):\n%s", diff)
				}
				continue
			}
			flags, _ := y["flags"].(map[string]any)
			for name := range x["flags"].(map[string]any) {
				if _, ok := flags[name]; !ok {
					t.Errorf("kptrace proxy has no flag --%s", name)
				}
			}
		}
	}
	for _, path := range []string{"/metrics", "/metrics/slis"} {
		a, b := both(at+path, "")
		have := types(b.body)
		for name, kind := range types(a.body) {
			if strings.HasPrefix(name, "kubeproxy_") || path == "/metrics/slis" {
				if have[name] != kind {
					t.Errorf("%s: %s is a %q, upstream's is a %s", path, name, have[name], kind)
				}
			}
		}
	}
}

// types are those of the metrics in a text.
func types(text string) map[string]string {
	all := map[string]string{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 4 && f[1] == "TYPE" {
			all[f[2]] = f[3]
		}
	}
	return all
}

func object(t *testing.T, text string) map[string]any {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return o
}
