package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/trace"
)

// TestGeneratedDocs keeps the lists in docs what the code says. With
// KPTRACE_UPDATE set it writes them.
func TestGeneratedDocs(t *testing.T) {
	var reasons, incidents strings.Builder
	for _, r := range trace.Reasons() {
		fmt.Fprintf(&reasons, "### %s\n\n%s\n\n- Known by: %s\n- Look at: %s\n\n", r.Code, r.Sentence, r.Evidence, r.Next)
	}
	incidents.WriteString("| N | a user says | kptrace says |\n|---|---|---|\n")
	for i, in := range lab.Incidents() {
		var says []string
		if in.Reason != "" {
			says = append(says, "`"+string(in.Reason)+"`")
		}
		if in.Check != "" {
			says = append(says, "`"+in.Check+"` (check)")
		}
		if in.Beside {
			says = append(says, "with `--beside`")
		}
		if in.Userspace {
			says = append(says, "with `--mode userspace`")
		}
		fmt.Fprintf(&incidents, "| %d | %s | %s |\n", i+1, in.Symptom, strings.Join(says, ", "))
	}
	for _, d := range []struct{ file, mark, text string }{
		{"reasons.md", "reasons", strings.TrimSpace(reasons.String())},
		{"incidents.md", "incidents", strings.TrimSpace(incidents.String())},
	} {
		path := "../../docs/" + d.file
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		begin, end := "<!-- "+d.mark+":begin -->\n", "\n<!-- "+d.mark+":end -->"
		head, rest, ok1 := strings.Cut(string(b), begin)
		_, tail, ok2 := strings.Cut(rest, end)
		if !ok1 || !ok2 {
			t.Fatalf("%s has no marks %q and %q", d.file, begin, end)
		}
		want := head + begin + d.text + end + tail
		if want == string(b) {
			continue
		}
		if os.Getenv("KPTRACE_UPDATE") != "" {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		t.Errorf("docs/%s is not what the code says: run KPTRACE_UPDATE=1 go test ./cmd/kptrace -run TestGeneratedDocs", d.file)
	}
}

// TestReasonsHaveFaults wants an incident for every reason, but for those that a
// lab does not provoke: these are in the list, with the test that does. No incident
// is for a reason that nobody knows.
func TestReasonsHaveFaults(t *testing.T) {
	elsewhere := map[trace.Reason]string{
		// A node port on 127.0.0.1 is translated before that rule, if the Service has
		// endpoints. What the rule drops is reported by nobody: its chain KUBE-FIREWALL
		// is the kubelet's, too, and has no rules of ours. So only explain speaks of it.
		trace.Localnet: "proxy/iptables, TestWalkLocalnet",
		// It needs somebody who follows paths.
		trace.NotTracked: "cmd/kptrace, TestPathOfUntracked",
	}
	all := lab.Incidents()
	names, provoked := map[string]bool{}, map[trace.Reason]bool{}
	for _, in := range all {
		if names[in.Name] {
			t.Errorf("two incidents are called %s", in.Name)
		}
		names[in.Name], provoked[in.Reason] = true, true
		if _, ok := in.Reason.Info(); !ok && in.Check == "" {
			t.Errorf("%s: reason %q is not known", in.Name, in.Reason)
		}
	}
	for _, r := range trace.Reasons() {
		if provoked[r.Code] == (elsewhere[r.Code] != "") {
			t.Errorf("%s: an incident %v, elsewhere %q", r.Code, provoked[r.Code], elsewhere[r.Code])
		}
		if r.Sentence == "" || r.Evidence == "" || r.Next == "" {
			t.Errorf("%s: sentence, evidence or next step is missing", r.Code)
		}
	}
}
