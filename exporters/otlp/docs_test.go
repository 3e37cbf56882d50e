package otlp

import (
	"os"
	"regexp"
	"strings"
	"testing"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
)

// TestDocs holds the table of attributes in docs/otlp.md against what is sent
// of connections of every kind: nothing is missing, nothing is made up, and
// each stands where the table says.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/otlp.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(page), "\n## Attributes\n")
	table, _, more := strings.Cut(table, "\n## ")
	if !found || !more {
		t.Fatal("docs/otlp.md has no section Attributes with another one behind it")
	}
	documented := map[string]bool{} // "key where"
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9._]+)` \\| ([^|]+) \\|").FindAllStringSubmatch(table, -1) {
		for _, where := range strings.Split(m[2], ",") {
			documented[m[1]+" "+strings.Trim(where, " `")] = true
		}
	}
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	export(t, Config{
		Endpoint: endpoint, Traces: Signal{Protocol: GRPC}, Sampling: Sampling{Ratio: 1},
		Version: "v1", Node: "node1", Cluster: "c1", Pod: "kptrace-x", Namespace: "kube-system",
	}, r, append(all(), noted())...)
	sent := map[string]bool{}
	add := func(where string, kvs []*commonpb.KeyValue) {
		for _, kv := range kvs {
			sent[kv.GetKey()+" "+where] = true
		}
	}
	for _, s := range r.got() {
		name, _, _ := strings.Cut(s.GetName(), " ")
		add(name, s.GetAttributes())
		for _, e := range s.GetEvents() {
			add(e.GetName(), e.GetAttributes())
		}
		for _, l := range s.GetLinks() {
			add("link", l.GetAttributes())
		}
	}
	add("resource", r.resource.GetAttributes())
	for k := range sent {
		if !documented[k] {
			t.Errorf("not in docs/otlp.md: %s", k)
		}
	}
	for k := range documented {
		if !sent[k] {
			t.Errorf("in docs/otlp.md, but never sent: %s", k)
		}
	}
}
