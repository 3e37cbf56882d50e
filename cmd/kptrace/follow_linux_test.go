package main

import (
	"encoding/json"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// odd are Services beside the demo's: names that are near, and kinds that
// have no decisions.
const odd = `
apiVersion: v1
kind: Service
metadata: {name: fob, namespace: shop}
spec: {clusterIP: 10.96.0.30, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: warehouse, namespace: other}
spec: {clusterIP: 10.96.0.31, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: heads, namespace: shop}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: away, namespace: shop}
spec: {type: ExternalName, externalName: example.com}
`

var ansi = regexp.MustCompile("\x1b") //nolint:gochecknoglobals // a constant

// TestFollowUser asks a running lab with live traffic what a user would.
func TestFollowUser(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.labUp(map[string]string{"90-odd.yaml": odd})
	time.Sleep(3 * time.Second) // some history

	t.Run("refusals", func(t *testing.T) {
		for args, want := range map[string][]string{
			"svc/fo -n shop":        {"no Service shop/fo: did you mean svc/fob or svc/foo?"},
			"svc/warehouse -n shop": {"no Service shop/warehouse: it exists in namespace other: add -n other"},
			"svc/warehous -n other": {"no Service other/warehous: did you mean svc/warehouse?"},
			"svc/foo":               {"no Service default/foo: it exists in namespace shop: add -n shop"},
			"svc/heads -n shop":     {"shop/heads", "headless"},
			"svc/away -n shop":      {"shop/away", "ExternalName"},
		} {
			code, out, talk := d.kptrace(append([]string{"follow"}, strings.Fields(args)...)...)
			if code != 1 || out != "" {
				t.Errorf("%s: exit %d, stdout %q; want 1 and nothing", args, code, out)
			}
			for _, w := range want {
				if !strings.Contains(talk, w) {
					t.Errorf("%s: %q is not in %q", args, w, talk)
				}
			}
		}
	})

	t.Run("silence", func(t *testing.T) {
		t.Parallel()
		d := d.at(t)
		code, out, talk := d.kptrace("follow", "svc/fob", "-n", "shop", "--for", "4500ms")
		if code != 0 || strings.Count(out, "\n") != 1 {
			t.Errorf("exit %d, stdout %q; want the titles alone", code, out)
		}
		for _, w := range []string{"shop/fob", "10.96.0.30", "0 of 0 endpoints ready", "history since", "nothing to show for 3.0s; what was checked:",
			"refused, and would show as rejected", "not visible here:", "0 connections, 0 failed, 0 events lost"} {
			if !strings.Contains(talk, w) {
				t.Errorf("%q is not in:\n%s", w, talk)
			}
		}
	})

	live := func(name string, args []string, check func(t *testing.T, list []flowLine)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := d.at(t)
			list := flows(t, d.must(append([]string{"follow", "-o", "jsonl"}, args...)...))
			if len(list) == 0 {
				t.Error("no connection")
			}
			check(t, list)
		})
	}
	each := func(what string, ok func(*flowLine) bool) func(*testing.T, []flowLine) {
		return func(t *testing.T, list []flowLine) {
			t.Helper()
			ids := map[string]bool{}
			for i := range list {
				if !ok(&list[i]) {
					t.Errorf("not %s: %+v", what, list[i])
				}
				if ids[list[i].ID] {
					t.Errorf("%s is shown twice", list[i].ID)
				}
				ids[list[i].ID] = true
			}
		}
	}
	services := func(want ...string) func(*testing.T, []flowLine) {
		return func(t *testing.T, list []flowLine) {
			t.Helper()
			got := map[string]bool{}
			for i := range list {
				got[list[i].Service.Name] = true
			}
			if len(got) != len(want) {
				t.Errorf("Services %v, want %v", got, want)
			}
			for _, w := range want {
				if !got[w] {
					t.Errorf("Services %v, want %v", got, want)
				}
			}
		}
	}
	failed := func(f *flowLine) bool { return f.Outcome == "refused" || f.Outcome == "rejected" }
	live("failed", []string{"-A", "--outcome", "failed", "--for", "3s"}, each("failed", failed))
	live("failed before", []string{"-A", "--outcome", "failed", "--since", "10m", "--for", "0s"}, each("failed", failed))
	live("rejected", []string{"-A", "--outcome", "rejected", "--since", "1h", "--for", "100ms"}, each("rejected", func(f *flowLine) bool { return f.Outcome == "rejected" }))
	live("from", []string{"-A", "--from", "pod/batch", "--for", "2s"}, each("from batch", func(f *flowLine) bool { return f.Client.Pod == "batch" }))
	live("from in namespace", []string{"-n", "shop", "--from", "pod/web", "--for", "2s"}, each("from web", func(f *flowLine) bool { return f.Client.Pod == "web" && f.Client.Namespace == "shop" }))
	live("to", []string{"-n", "shop", "--to", "pod/foo-3", "--since", "1m", "--for", "2s"}, each("to foo-3", func(f *flowLine) bool { return f.pod() == "foo-3" }))
	live("port name", []string{"-n", "shop", "--port", "dns", "--since", "1m", "--for", "0s"}, services("dns"))
	live("port number", []string{"-n", "shop", "--port", "53", "--since", "1m", "--for", "0s"}, services("dns"))
	live("several", []string{"svc/foo", "svc/empty", "-n", "shop", "--for", "3s"}, services("foo", "empty"))
	live("all", []string{"-A", "--for", "3s"}, services("foo", "sticky", "front", "flaky", "empty", "dns"))
	live("and", []string{"svc/sticky", "-n", "shop", "--from", "pod/web", "--for", "2s"}, each("sticky from web", func(f *flowLine) bool {
		return f.Service.Name == "sticky" && f.Client.Pod == "web"
	}))
	live("last", []string{"svc/foo", "-n", "shop", "--last", "5", "--for", "0s"}, func(t *testing.T, list []flowLine) {
		if len(list) != 5 {
			t.Errorf("%d connections, want 5", len(list))
		}
	})

	t.Run("since before the start", func(t *testing.T) {
		code, _, talk := d.kptrace("follow", "svc/foo", "-n", "shop", "--since", "10m", "--for", "0s")
		if code != 0 || !regexp.MustCompile(`note: node1: .*(begins|since|start).* \d\d:\d\d`).MatchString(talk) {
			t.Errorf("exit %d, no word of the true start:\n%s", code, talk)
		}
	})
	t.Run("json", func(t *testing.T) {
		out := d.must("follow", "svc/foo", "-n", "shop", "-o", "json", "--last", "3", "--for", "0s")
		var doc struct {
			SchemaVersion int
			Flows         []flowLine
		}
		if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.SchemaVersion != 1 || len(doc.Flows) != 3 {
			t.Errorf("%v: %s", err, out)
		}
		out = d.must("follow", "svc/fob", "-n", "shop", "-o", "json", "--last", "3", "--for", "0s")
		if err := json.Unmarshal([]byte(out), &doc); err != nil || len(doc.Flows) != 0 {
			t.Errorf("no connections: %v: %s", err, out)
		}
	})
	t.Run("text", func(t *testing.T) {
		t.Parallel()
		d := d.at(t)
		for _, format := range []string{"line", "wide"} {
			c := d.start("kptrace", "follow", "-A", "-o", format)
			c.await(c.out, "rejected: no endpoints", 10*time.Second)
			if code := c.stop(syscall.SIGINT); code != 0 {
				t.Errorf("Ctrl-C: exit %d", code)
			}
			if !regexp.MustCompile(`\d+ connections?, \d+ failed, 0 events lost`).MatchString(c.err.String()) {
				t.Errorf("no footer:\n%s", c.err)
			}
			if ansi.MatchString(c.out.String() + c.err.String()) {
				t.Error("colours or cursor movements in a pipe")
			}
			if !strings.HasPrefix(c.out.String(), "TIME ") {
				t.Errorf("no titles:\n%s", c.out)
			}
		}
	})
	t.Run("head", func(t *testing.T) {
		t.Parallel()
		d := d.at(t)
		// 141 is SIGPIPE, as every program of a pipe ends.
		c := d.start("sh", "-c", "{ kptrace follow -A --no-header; echo $? >&2; } | head -1")
		if code := c.end(15 * time.Second); code != 0 || strings.Count(c.out.String(), "\n") != 1 || c.err.String() != "141\n" {
			t.Errorf("exit %d, %q, %q", code, c.out, c.err)
		}
		c = d.start("sh", "-c", "kptrace follow -A -o jsonl | head -1")
		if code := c.end(15 * time.Second); code != 0 || strings.Count(c.out.String(), "\n") != 1 || c.err.String() != "" {
			t.Errorf("exit %d, %q, %q", code, c.out, c.err)
		}
	})
	t.Run("show", func(t *testing.T) {
		list := flows(t, d.must("follow", "svc/foo", "-n", "shop", "--last", "1", "--for", "0s", "-o", "jsonl"))
		if len(list) != 1 {
			t.Fatalf("%d flows", len(list))
		}
		text := d.must("show", list[0].ID)
		for _, w := range []string{list[0].ID, "shop/foo:http", "random", list[0].pod(), "closed"} {
			if !strings.Contains(text, w) {
				t.Errorf("%q is not in:\n%s", w, text)
			}
		}
		var f flowLine
		if err := json.Unmarshal([]byte(d.must("show", list[0].ID, "-o", "json")), &f); err != nil || f.ID != list[0].ID || f.pod() != list[0].pod() {
			t.Errorf("%v: %+v", err, f)
		}
		if code, _, talk := d.kptrace("show", "000000000000a"); code != 1 || !strings.Contains(talk, "no flow 000000000000a") {
			t.Errorf("exit %d, %q", code, talk)
		}
	})
	t.Run("status", func(t *testing.T) {
		s := d.status()
		if s.Node != "node1" || s.Mode != "iptables" || s.Services != 8 || s.Rules == 0 || len(s.Problems) != 0 || len(s.Lost) != 0 || len(s.Sources) != 2 {
			t.Errorf("%+v", s)
		}
		if len(s.Skipped) != 2 {
			t.Errorf("left out: %+v; want heads and away", s.Skipped)
		}
		text := d.must("status")
		for _, w := range []string{"node1", "NFLOG 100", "lost       nothing", "shop/heads", "shop/away", "nf_conntrack_acct"} {
			if !strings.Contains(text, w) {
				t.Errorf("%q is not in:\n%s", w, text)
			}
		}
	})
}

// at is the same desk for a part of the test.
func (d *desk) at(t *testing.T) *desk {
	t.Helper()
	return &desk{t: t, dir: d.dir, env: d.env, ns: d.ns}
}

func TestStatusKernel(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	text := d.must("status", "--kernel")
	var doc struct {
		Features []featureJSON
	}
	if err := json.Unmarshal([]byte(d.must("status", "--kernel", "-o", "json")), &doc); err != nil || len(doc.Features) < 5 {
		t.Errorf("%v: %+v", err, doc)
	}
	for _, f := range doc.Features {
		if f.Required && !f.Present || !strings.Contains(text, f.Name) {
			t.Errorf("%+v; the text says\n%s", f, text)
		}
	}
	// Where iptables is absent, kptrace says so, and how to get it. Its own
	// search of sbin folders must find nothing either: they are emptied.
	c := d.startWith(exec.Spec{Path: "unshare", Args: []string{"-m", "sh", "-c", `self=$(command -v kptrace)
		for d in /usr/sbin /sbin /usr/local/sbin; do [ ! -d $d ] || [ -L $d ] || mount -t tmpfs none $d || exit 99; done
		PATH=/nowhere exec $self status --kernel`}})
	if code := c.end(20 * time.Second); code != 1 || !regexp.MustCompile(`kptrace cannot work here without: .*iptables`).MatchString(c.err.String()) {
		t.Errorf("without iptables: exit %d\n%s%s", code, c.out, c.err)
	}
}
