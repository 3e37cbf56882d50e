package main

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// get makes one connection in the lab, from pod web, and returns which pod
// answered.
func (d *desk) get(url string) (pod string, err error) {
	d.t.Helper()
	code, out, talk := d.kptrace("lab", "exec", "pod/web", "-n", "shop", "--", "kptrace", "lab", "get", url, "--timeout", "2s")
	if code != 0 {
		return "", errors.New(strings.TrimSpace(talk))
	}
	name, _, _ := strings.Cut(out, " ") // "shop/foo-1 10.244.1.10:41234"
	_, pod, _ = strings.Cut(name, "/")
	return pod, nil
}

// endpointsOf replaces the endpoints in the slice of Service foo.
func endpointsOf(text string, pods ...string) string {
	ips := map[string]string{"foo-1": "10.244.1.21", "foo-2": "10.244.1.22", "foo-3": "10.244.1.23", "foo-4": "10.244.1.24"}
	head, _, _ := strings.Cut(text, "endpoints:\n")
	head += "endpoints:"
	if len(pods) == 0 {
		return head + " []\n"
	}
	for _, p := range pods {
		head += "\n- {addresses: [" + ips[p] + "], nodeName: node1, targetRef: {kind: Pod, name: " + p + ", namespace: shop}}"
	}
	return head + "\n"
}

// TestEdit is the acceptance of the main job, in three terminals: a lab, a
// follower, and somebody who connects and edits.
func TestEdit(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	_, dir := d.labUp(nil, "--no-traffic")
	follow := d.start("kptrace", "follow", "svc/foo", "-n", "shop", "-o", "jsonl")
	time.Sleep(300 * time.Millisecond) // jsonl has no header to wait for
	const url = "http://10.96.0.10"

	made := 0
	next := func(limit time.Duration) flowLine { // the flow of one more connection
		t.Helper()
		eventually(t, limit, "follow shows the connection", func() bool { return len(flows(t, follow.out.String())) > made })
		f := flows(t, follow.out.String())[made]
		made++
		return f
	}
	pod, err := d.get(url)
	if err != nil {
		t.Fatal(err)
	}
	f := next(3 * time.Second)
	if f.pod() != pod || f.Outcome != "closed" || f.Decision.Candidates != 3 || f.Client.Pod != "web" {
		t.Errorf("%s answered; shown is %+v", pod, f)
	}
	time.Sleep(1500 * time.Millisecond)
	if n := len(flows(t, follow.out.String())); n != 1 {
		t.Errorf("one connection gave %d lines:\n%s", n, follow.out)
	}

	path := filepath.Join(dir, "30-foo.yaml")
	original := readFile(t, path)
	// until connects until ok, and requires that from a second after an edit
	// on; all connections are shown, each with its true endpoint.
	until := func(what string, candidates int, ok func(pod string, err error) bool) flowLine {
		t.Helper()
		edited := time.Now()
		for {
			late := time.Since(edited) > time.Second
			pod, err := d.get(url)
			f := next(3 * time.Second)
			if f.pod() != pod {
				t.Errorf("%s answered; shown is %+v", pod, f)
			}
			switch {
			case ok(pod, err) && f.Decision.Candidates == candidates:
				return f
			case late:
				t.Fatalf("%s: not so a second after the edit: %q, %v, %+v", what, pod, err, f)
			}
		}
	}
	writeFile(t, path, endpointsOf(original, "foo-4"))
	until("foo-4 alone", 1, func(pod string, err error) bool { return pod == "foo-4" })
	for range 3 {
		if pod, err := d.get(url); pod != "foo-4" {
			t.Errorf("%s answers, %v; want foo-4", pod, err)
		}
		if f := next(3 * time.Second); f.pod() != "foo-4" || f.Decision.Candidates != 1 {
			t.Errorf("shown is %+v", f)
		}
	}
	writeFile(t, path, endpointsOf(original, "foo-2", "foo-4"))
	until("two endpoints", 2, func(_ string, err error) bool { return err == nil })

	writeFile(t, path, endpointsOf(original))
	f = until("no endpoints", 0, func(_ string, err error) bool { return err != nil })
	if f.Outcome != "rejected" || f.Reason != "no-endpoints" || f.Backend != nil {
		t.Errorf("without endpoints: %+v", f)
	}
	writeFile(t, path, original)
	until("all back", 3, func(_ string, err error) bool { return err == nil })

	if code := follow.stop(syscall.SIGINT); code != 0 {
		t.Errorf("follow ended with %d: %s", code, follow.err)
	}
	if n := len(flows(t, follow.out.String())); n != made {
		t.Errorf("%d lines of %d connections", n, made)
	}
}

// TestExec is the plumbing of lab exec: input, output, exit codes, signals.
func TestExec(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.labUp(nil, "--no-traffic")
	run := func(stdin string, args ...string) (int, string, string) {
		t.Helper()
		c := d.startWith(exec.Spec{Path: "kptrace", Args: append([]string{"lab", "exec", "pod/web", "-n", "shop", "--"}, args...),
			Stdin: strings.NewReader(stdin)})
		return c.end(20 * time.Second), c.out.String(), c.err.String()
	}
	big := strings.Repeat("0123456789abcdef", 1<<14)
	if code, out, _ := run(big, "cat"); code != 0 || out != big {
		t.Errorf("cat: exit %d, %d bytes of %d", code, len(out), len(big))
	}
	if code, out, talk := run("", "sh", "-c", "echo out; echo err >&2; exit 7"); code != 7 || out != "out\n" || talk != "err\n" {
		t.Errorf("exit %d, %q, %q; want 7", code, out, talk)
	}
	if code, _, _ := run("", "sh", "-c", "kill -9 $$"); code != 128+9 {
		t.Errorf("killed by 9: exit %d", code)
	}
	if code, _, talk := run("", "no-such-program"); code != 127 || !strings.Contains(talk, "no-such-program") {
		t.Errorf("absent: exit %d, %q", code, talk)
	}
	if code, out, _ := run("", "sh", "-c", "cat /proc/net/fib_trie"); code != 0 || !strings.Contains(out, "10.244.1.10") || strings.Contains(out, "172.18.0.11") {
		t.Errorf("not in pod web: %d\n%s", code, out)
	}
	if code, _, talk := d.kptrace("lab", "exec", "pod/nobody", "--", "true"); code != 1 || !strings.Contains(talk, "pod/shop/web") {
		t.Errorf("absent pod: exit %d, %q; want the pods there are", code, talk)
	}
	if out := d.must("lab", "exec", "node/node1", "--", "cat", "/proc/net/fib_trie"); !strings.Contains(out, "172.18.0.11") {
		t.Errorf("not on node1:\n%s", out)
	}
	c := d.start("kptrace", "lab", "exec", "pod/web", "-n", "shop", "--", "sh", "-c", "trap 'echo bye; exit 5' INT; echo up; while :; do sleep 0.05; done")
	c.await(c.out, "up", 10*time.Second)
	if code := c.stop(syscall.SIGINT); code != 5 || !strings.Contains(c.out.String(), "bye") {
		t.Errorf("Ctrl-C of the program: exit %d, %s%s", code, c.out, c.err)
	}
}

// status is kptrace status -o json of the only node.
func (d *desk) status() statusJSON {
	d.t.Helper()
	var s struct{ Nodes []statusJSON }
	if err := json.Unmarshal([]byte(d.must("status", "-o", "json")), &s); err != nil || len(s.Nodes) != 1 {
		d.t.Fatalf("%v, %d nodes", err, len(s.Nodes))
	}
	return s.Nodes[0]
}

// TestBadInput drops broken manifests into the folder of a running lab: each
// is named, everything else goes on, and repairing it suffices.
func TestBadInput(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	up, dir := d.labUp(nil, "--no-traffic", "-v")
	const service = "apiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: shop}\nspec: "
	for _, tt := range []struct{ name, text, object, field, word string }{
		{"malformed service", service + "{clusterIP: 10.96.0.99, ports: [{name: http, port: 70000}]}\n", "Service shop/bad", "spec.ports[0].port", "70000"},
		{"bad cluster ip", service + "{clusterIP: 10.96.0.999, ports: [{name: http, port: 80}]}\n", "Service shop/bad", "spec.clusterIP", "10.96.0.999"},
		{"duplicate node port", service + "{type: NodePort, clusterIP: 10.96.0.99, ports: [{name: http, port: 80, nodePort: 30080}]}\n", "Service shop/bad", "spec.ports[].nodePort", "shop/front"},
		{"endpoint without port", "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: bad-1, namespace: shop, labels: {kubernetes.io/service-name: foo}}\n" +
			"addressType: IPv4\nports: [{name: http}]\nendpoints: [{addresses: [10.244.1.24]}]\n", "EndpointSlice shop/bad-1", "ports[0].port", "missing"},
		{"broken yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: bad, namespace: shop\nspec: {}\n", "", "", "document 1"},
	} {
		path := filepath.Join(dir, "zz-bad.yaml")
		logged := len(up.err.String())
		writeFile(t, path, tt.text)
		var p problemJSON
		eventually(t, 3*time.Second, tt.name+": status names it", func() bool {
			s := d.status()
			for _, p = range s.Problems {
				if strings.HasPrefix(p.File, "zz-bad.yaml") && strings.Contains(strings.ToLower(p.Message+p.Field), tt.word) {
					return true
				}
			}
			return false
		})
		if p.Object != tt.object || !strings.HasPrefix(p.Field, tt.field) {
			t.Errorf("%s: %+v; want object %q, field %q", tt.name, p, tt.object, tt.field)
		}
		if text := d.must("status"); !regexp.MustCompile(`(?m)^(problems)? +zz-bad\.yaml.*` + regexp.QuoteMeta(tt.object)).MatchString(text) {
			t.Errorf("%s: status says:\n%s", tt.name, text)
		}
		log := ""
		for end := time.Now().Add(2 * time.Second); !strings.Contains(log, tt.word) && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			log = up.err.String()[logged:]
		}
		if !strings.Contains(log, "zz-bad.yaml") || !strings.Contains(log, tt.object) || !strings.Contains(log, tt.field) || !strings.Contains(log, tt.word) {
			t.Errorf("%s: the log does not name it:\n%s", tt.name, log)
		}
		for _, ip := range []string{"10.96.0.10", "10.96.0.11", "10.96.0.12", "172.18.0.11:30080"} {
			if _, err := d.get("http://" + ip); err != nil {
				t.Errorf("%s: %s does not answer: %v", tt.name, ip, err)
			}
		}
	}
	// The repaired file is a Service that works.
	writeFile(t, filepath.Join(dir, "zz-bad.yaml"), service+"{clusterIP: 10.96.0.99, ports: [{name: http, port: 80}]}\n---\n"+
		"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: bad-1, namespace: shop, labels: {kubernetes.io/service-name: bad}}\n"+
		"addressType: IPv4\nports: [{name: http, port: 8080}]\nendpoints: [{addresses: [10.244.1.24], targetRef: {kind: Pod, name: foo-4, namespace: shop}}]\n")
	eventually(t, 3*time.Second, "the repaired Service answers", func() bool {
		pod, _ := d.get("http://10.96.0.99")
		return pod == "foo-4"
	})
	s := d.status()
	if len(s.Problems) != 0 || s.SyncError != "" {
		t.Errorf("repaired: problems %v, sync error %q", s.Problems, s.SyncError)
	}
	if slices.ContainsFunc(strings.Split(up.err.String(), "\n"), func(l string) bool { return strings.Contains(l, "starting it again") }) {
		t.Error("the proxy was restarted")
	}
}
