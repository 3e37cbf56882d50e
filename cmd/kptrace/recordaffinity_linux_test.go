package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/exporters/text"
)

// TestRecordBefore records a client that was here before, of whom the recording's own
// frames do not tell, and connections past the Service: the replay says what was said
// live.
func TestRecordBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1), "sticky.yaml": manifest("sticky", 11, 8080, "sessionAffinity: ClientIP, ", 1, 2)})
	w.serve(1, 2)
	w.synced(w.proxy())
	get := func(at string) {
		t.Helper()
		if w.visit(at) == "" {
			t.Fatalf("%s does not answer", at)
		}
	}
	closed := func(list string, service string) (found []text.FlowJSON) {
		for line := range strings.Lines(list) {
			var f text.FlowJSON
			if err := json.Unmarshal([]byte(line), &f); err != nil {
				t.Fatalf("%v in %s", err, line)
			}
			if f.Service.Name == service && f.Outcome == "closed" {
				found = append(found, f)
			}
		}
		return found
	}
	live := func() []text.FlowJSON {
		return closed(w.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s"), "sticky")
	}
	get("10.96.0.11")
	eventually(t, patient, "the first connection", func() bool { return len(live()) == 1 })
	time.Sleep(1100 * time.Millisecond) // so that an age can be told

	file := filepath.Join(w.dir, "node1.ktr")
	rec := w.start("kptrace", "record", "-o", file, "--for", "6s")
	eventually(t, patient, "the recording to begin", func() bool { info, err := os.Stat(file); return err == nil && info.Size() > 0 })
	get("10.96.0.11")
	get("10.0.1.1:8080")
	eventually(t, patient, "the second connection", func() bool { return len(live()) == 2 })
	if code := rec.end(time.Minute); code != 0 {
		t.Fatalf("record: exit %d: %s", code, rec.err)
	}

	code, out, talk := w.kptrace("replay", file, "-A", "-o", "jsonl")
	replayed := closed(out, "sticky")
	if code != 0 || len(replayed) != 1 {
		t.Fatalf("exit %d, %d connections; want 1: %s%s", code, len(replayed), out, talk)
	}
	all := live()
	want := &all[0].Decision
	if all[1].Time.After(all[0].Time) {
		want = &all[1].Decision
	}
	if want.Affinity != "hit" || want.AffinityAgeMs == nil || *want.AffinityAgeMs < 1000 {
		t.Fatalf("live: %+v", want)
	}
	if d := cmp.Diff(want, &replayed[0].Decision); d != "" {
		t.Errorf("the decision (-live +replayed):\n%s", d)
	}

	const counted = "1 connection straight to endpoints, past the Service (1 of the node itself, as by probes)"
	if strings.Contains(out, `"direct"`) || !strings.Contains(talk, counted) {
		t.Errorf("without --direct: %s%s", out, talk)
	}
	_, out, talk = w.kptrace("replay", file, "svc/foo", "-n", "shop", "--direct", "-o", "json")
	var doc struct {
		Flows  []text.FlowJSON
		Direct struct{ Pods, Node, Elsewhere int }
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Its end is in conntrack's table alone, which nobody asks again.
	if len(doc.Flows) != 1 || doc.Flows[0].Service.Via != "direct" || doc.Flows[0].Service.IP != "10.0.1.1" || doc.Flows[0].Service.Name != "foo" ||
		doc.Flows[0].Outcome != "unknown" || strings.Contains(doc.Flows[0].Missing, "lost") ||
		doc.Direct.Node != 1 || doc.Direct.Pods+doc.Direct.Elsewhere != 0 || !strings.Contains(talk, counted) {
		t.Errorf("with --direct: %+v\n%s", doc, talk)
	}
	if _, _, talk = w.kptrace("replay", file, "svc/none", "-n", "shop", "-o", "jsonl"); strings.Contains(talk, "straight to endpoints") {
		t.Errorf("of another Service: %s", talk)
	}
}
