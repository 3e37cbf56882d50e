package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// apiServer serves lists of objects as an API server does, and lets watches wait.
type apiServer struct {
	*httptest.Server
	lists atomic.Pointer[map[string]string] // items by the last word of the path
}

func newAPIServer(t *testing.T, lists map[string]string) (s *apiServer, kubeconfig string) {
	t.Helper()
	s = &apiServer{}
	s.lists.Store(&lists)
	kinds := map[string]string{
		"services": "v1 Service", "nodes": "v1 Node", "pods": "v1 Pod",
		"endpointslices": "discovery.k8s.io/v1 EndpointSlice", "servicecidrs": "networking.k8s.io/v1 ServiceCIDR",
	}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		version, kind, ok := strings.Cut(kinds[name], " ")
		switch q := r.URL.Query(); {
		case !ok:
			http.NotFound(w, r)
		case q.Get("sendInitialEvents") != "":
			http.Error(w, "not by this server", http.StatusBadRequest) // they list then
		case q.Get("watch") != "":
			<-r.Context().Done()
		default:
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"apiVersion":%q,"kind":"%sList","metadata":{"resourceVersion":"1"},"items":[%s]}`, version, kind, (*s.lists.Load())[name])
		}
	}))
	t.Cleanup(s.Close)
	kubeconfig = filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: %q}}], "+
		"contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {token: t}}]}", s.URL)
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return s, kubeconfig
}

// TestCheckKubeconfig compares rules with what an API server says, and has them
// explained with its names.
func TestCheckKubeconfig(t *testing.T) {
	t.Parallel()
	service := func(name, ip string) string {
		return fmt.Sprintf(`{"metadata":{"namespace":"shop","name":%q},"spec":{"clusterIP":%q,"clusterIPs":[%q],"ports":[{"name":"http","port":80,"protocol":"TCP"}]}}`, name, ip, ip)
	}
	slice := func(name string, endpoints ...string) string {
		return fmt.Sprintf(`{"metadata":{"namespace":"shop","name":"%s-1","labels":{"kubernetes.io/service-name":%q}},"addressType":"IPv4",`+
			`"ports":[{"name":"http","port":8080,"protocol":"TCP"}],"endpoints":[%s]}`, name, name, strings.Join(endpoints, ","))
	}
	endpoint := func(last string, ready bool) string {
		return fmt.Sprintf(`{"addresses":["10.244.1.%s"],"nodeName":"node1","conditions":{"ready":%t},"targetRef":{"kind":"Pod","namespace":"shop","name":"foo-%s"}}`, last, ready, last)
	}
	const (
		node = `{"metadata":{"name":"node1"},"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}`
		pod  = `{"metadata":{"namespace":"shop","name":"web","uid":"1"},"spec":{"nodeName":"node1"},"status":{"podIP":"10.244.1.9","podIPs":[{"ip":"10.244.1.9"}]}}`
	)
	healthy := map[string]string{"nodes": node, "pods": pod, "services": service("foo", "10.96.0.10"),
		"endpointslices": slice("foo", endpoint("2", true), endpoint("3", true), endpoint("4", false))}
	server, kubeconfig := newAPIServer(t, healthy)
	api := []string{"--kubeconfig", kubeconfig, "--node", "node1"}

	code, rules, talk := call(t.Context(), newProxyCmd(), append(api, "--trace=false", "--dry-run")...)
	if code != 0 {
		t.Fatalf("exit %d: %s", code, talk)
	}
	check := func(want int) string {
		t.Helper()
		cmd := newCheckCmd()
		cmd.SetIn(strings.NewReader(rules))
		code, out, talk := call(t.Context(), cmd, append(api, "--rules", "-")...)
		if code != want {
			t.Errorf("exit %d, want %d: %s%s", code, want, out, talk)
		}
		return out
	}
	if out := check(0); out != "" {
		t.Errorf("rules as the API wants them: %s", out)
	}

	_, out, talk := call(t.Context(), newExplainCmd(), append(api, "svc/foo", "-n", "shop", "--from", "pod/web")...)
	for _, want := range []string{"from shop/web (node1)", "pod shop/foo-2 on node1", "10.244.1.4:8080  pod shop/foo-4 on node1: not ready", "rules that kptrace would write for the API server"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in: %s%s", want, out, talk)
		}
	}

	// Since the rules were written a Service came and an endpoint went.
	server.lists.Store(&map[string]string{"nodes": node, "pods": pod, "services": service("foo", "10.96.0.10") + "," + service("bar", "10.96.0.11"),
		"endpointslices": slice("foo", endpoint("2", true)) + "," + slice("bar", endpoint("2", true))})
	out = check(exitProblem)
	for _, want := range []string{"service-missing", "shop/bar:http", "endpoint-gone", "10.244.1.3:8080"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in: %s", want, out)
		}
	}
}
