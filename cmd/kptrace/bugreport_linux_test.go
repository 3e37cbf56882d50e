package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace/bundle"
)

// bakery is a Service with words that are found nowhere else, and a public address.
const bakery = `apiVersion: v1
kind: Service
metadata: {name: pretzel, namespace: bakery}
spec:
  clusterIP: 10.96.0.77
  externalIPs: [203.0.113.77]
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: pretzel-1, namespace: bakery, labels: {kubernetes.io/service-name: pretzel}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.1.21], nodeName: node1, targetRef: {kind: Pod, name: foo-1, namespace: shop}}
- {addresses: [10.244.1.22], nodeName: node1, targetRef: {kind: Pod, name: foo-2, namespace: shop}}
`

// unpacked are the files of a bundle.
func unpacked(t *testing.T, name string) map[string][]byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBugreport makes one of a lab with live traffic. No name and no address is in any
// of its bytes, and yet it replays: the same connections with the same outcomes, odds
// and paths, and rules with the same odds.
func TestBugreport(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"names", "all"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			d.labUp(map[string]string{"90-bakery.yaml": bakery})
			file := filepath.Join(d.dir, "report.tar.gz")
			code, _, talk := d.kptrace("bugreport", "-o", file, "--for", "4s", "--packets", "1", "--redact", level)
			if code != 0 || !strings.Contains(talk, "replaced") {
				t.Fatalf("bugreport: exit %d, %s", code, talk)
			}
			saved := d.must("lab", "exec", "node/node1", "--", "iptables-save")
			files := unpacked(t, file)
			for _, name := range []string{
				bundle.ManifestName, "status.json", "check.json", "failures.jsonl", bundle.Recording, "rules/iptables-nft-save.txt",
				"rules/iptables-legacy-save.txt", "rules/nft-ruleset.txt", "conntrack.json", "sysctls.txt", "devices.txt", "versions.txt", "metrics.txt", "config.txt",
			} {
				if len(files[name]) == 0 && name != "rules/iptables-legacy-save.txt" {
					t.Errorf("%s is missing: %s", name, files[bundle.ManifestName])
				}
			}
			words := []string{"bakery", "pretzel", "shop", "foo", "foo-1", "foo-2", "foo-3", "sticky", "flaky", "node1", "203.0.113.77"}
			addrs := []string{"203.0.113.77"}
			if level == "all" {
				words = append(words, "10.244.1.21", "10.244.1.22", "10.244.1.0", "10.96.0.10", "10.96.0.77", "172.18.0.11")
				addrs = append(addrs, "10.244.1.21", "10.244.1.22", "10.96.0.10", "10.96.0.77", "172.18.0.11")
			}
			for i, w := range words {
				words[i] = regexp.QuoteMeta(w)
			}
			original := regexp.MustCompile(`(?:^|[^a-zA-Z0-9])(` + strings.Join(words, "|") + `)(?:$|[^a-zA-Z0-9])`)
			for name, data := range files {
				if m := original.FindIndex(data); m != nil {
					t.Errorf("%s has an original: …%s…", name, data[max(0, m[0]-80):min(len(data), m[1]+80)])
				}
				for _, a := range addrs {
					if bytes.Contains(data, netip.MustParseAddr(a).AsSlice()) {
						t.Errorf("%s has %s in its bytes", name, a)
					}
				}
				if strings.HasSuffix(name, ".json") && !json.Valid(data) {
					t.Errorf("%s is no JSON any more", name)
				}
			}

			live := map[string]flowLine{}
			for _, f := range flows(t, d.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s")) {
				live[f.Time.String()+f.Proto] = f
			}
			same, paths := 0, 0
			for _, f := range flows(t, d.must("replay", file, "-A", "-o", "jsonl")) {
				l, ok := live[f.Time.String()+f.Proto]
				if !ok || !l.Ended || !f.Ended || f.Outcome == "timeout" || l.Outcome == "timeout" || f.Incomplete || l.Incomplete {
					continue
				}
				same++
				if f.Outcome != l.Outcome || f.Reason != l.Reason || !cmp.Equal(f.Decision, l.Decision) || (f.Backend == nil) != (l.Backend == nil) {
					t.Errorf("replayed %+v\nlive     %+v", f, l)
				}
				if len(f.Packets) == 0 || len(f.Packets) != len(l.Packets) || len(f.Path) == 0 {
					continue
				}
				paths++
				if len(f.Path) != len(l.Path) {
					t.Errorf("a path of %d hops has %d: %+v", len(l.Path), len(f.Path), f.Path)
					continue
				}
				for i := range f.Path {
					a, b := l.Path[i], f.Path[i]
					if a.Kind != b.Kind || a.Hook != b.Hook || a.Table != b.Table || a.Verdict != b.Verdict || len(a.Chain) != len(b.Chain) || (a.Text == "") != (b.Text == "") {
						t.Errorf("hop %d was %+v, is %+v", i, a, b)
					}
				}
			}
			if same < 20 || paths < 10 {
				t.Errorf("only %d connections and %d paths are as they were live", same, paths)
			}

			odds := func(args ...string) (all []float64) {
				t.Helper()
				var doc text.RulesJSON
				_, out, talk := d.kptrace(append([]string{"explain", "-o", "json"}, args...)...)
				if err := json.Unmarshal([]byte(out), &doc); err != nil {
					t.Fatalf("%v: %s%s", err, out, talk)
				}
				for _, s := range doc.Services {
					for _, f := range s.Addresses {
						for _, e := range f.Endpoints {
							all = append(all, e.Probability)
						}
					}
				}
				slices.Sort(all)
				return all
			}
			rules := filepath.Join(d.dir, "saved")
			writeFile(t, rules, saved)
			if was, is := odds("--rules", rules), odds("--rules", file); len(was) < 10 || !slices.Equal(was, is) {
				t.Errorf("odds were %v, are %v", was, is)
			}

			// Cut off, and something else.
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, file, string(whole[:len(whole)/2]))
			if code, _, talk := d.kptrace("replay", file, "-A"); code != 1 || !strings.Contains(talk, "cut off") {
				t.Errorf("replay of half a report: exit %d, %s", code, talk)
			}
			if code, _, talk := d.kptrace("explain", "--rules", file); code != 1 || !strings.Contains(talk, "cut off") {
				t.Errorf("explain of half a report: exit %d, %s", code, talk)
			}
			writeFile(t, file, "\x1f\x8b and so on")
			if code, _, talk := d.kptrace("replay", file); code != 1 || !strings.Contains(talk, "no bug report") {
				t.Errorf("replay of something else: exit %d, %s", code, talk)
			}
		})
	}
}

// TestBugreportOfAKernel has no kptrace to ask: the rules are in it, and it says what is
// missing.
func TestBugreportOfAKernel(t *testing.T) {
	t.Parallel()
	w, p := pathWorld(t, "nft")
	if code := p.stop(syscall.SIGTERM); code != 0 { // rules stay
		t.Fatalf("the proxy ended with %d", code)
	}
	w.env = append(w.env, "KPTRACE_SOCKET=", "XDG_RUNTIME_DIR="+w.dir)
	file := filepath.Join(w.dir, "report.tar.gz")
	code, _, talk := w.kptrace("bugreport", "-o", file)
	if code != 0 || !strings.Contains(talk, "this is what the kernel says") || !strings.Contains(talk, "without recording.ktr") {
		t.Fatalf("exit %d, %s", code, talk)
	}
	files := unpacked(t, file)
	if rules := string(files["rules/iptables-nft-save.txt"]); !strings.Contains(rules, "KUBE-SVC-") || strings.Contains(rules, "shop") {
		t.Errorf("rules are:\n%.3000s", rules)
	}
	if !strings.Contains(string(files["check.json"]), "findings") {
		t.Errorf("no check in it: %s", files[bundle.ManifestName])
	}
	if code, _, talk := w.kptrace("replay", file); code != 1 || !strings.Contains(talk, "no kptrace runs here") {
		t.Errorf("replay without a recording: exit %d, %s", code, talk)
	}
	if out := w.must("explain", "--rules", file); !strings.Contains(out, "svc-") || strings.Contains(out, "shop") {
		t.Errorf("explain: %s", out)
	}
}
