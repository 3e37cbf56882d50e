package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRecord records a lab with live traffic, in both flavours with the paths of
// first packets, and in userspace mode. What the replay shows is what the node
// itself says of the same connections, rule by rule.
func TestRecord(t *testing.T) {
	t.Parallel()
	for name, lab := range map[string][]string{
		"nft": {"--iptables-flavour", "nft"}, "legacy": {"--iptables-flavour", "legacy"}, "userspace": {"--mode", "userspace"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			d.labUp(nil, lab...)
			file := filepath.Join(d.dir, "node1.ktr")
			args := []string{"record", "-o", file, "--for", "4s"}
			if name != "userspace" {
				args = append(args, "--packets", "1")
			}
			if _, _, talk := d.kptrace(args...); !strings.Contains(talk, "kptrace replay") {
				t.Fatalf("record: %s", talk)
			}
			live := map[string]flowLine{}
			for _, f := range flows(t, d.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s")) {
				live[key(&f)] = f
			}
			code, out, talk := d.kptrace("replay", file, "-A", "-o", "jsonl")
			if code != 0 {
				t.Fatalf("replay: exit %d, %s", code, talk)
			}
			if strings.Contains(talk, "does not know") {
				t.Errorf("frames did not replay: %s", talk)
			}
			same, paths := 0, 0
			for _, f := range flows(t, out) {
				l, ok := live[key(&f)]
				if !ok || !l.Ended {
					continue // it was open at the end of the recording, or began before
				}
				if f.Outcome != l.Outcome || (f.Backend == nil) != (l.Backend == nil) || f.Backend != nil && f.Backend.Pod != l.Backend.Pod {
					if f.Outcome == "open" || f.Outcome == "pending" || f.Outcome == "unanswered" || l.Outcome == "timeout" {
						continue // it ended after the recording
					}
					t.Errorf("replayed %+v\nlive     %+v", f, l)
				}
				same++
				if len(f.Packets) > 0 && len(f.Packets) == len(l.Packets) && !f.Incomplete && !l.Incomplete {
					paths++
					if d := cmp.Diff(l.Path, f.Path); d != "" {
						t.Errorf("a path is not as it was live (-live +replayed):\n%s", d)
					}
				}
			}
			if name != "userspace" && paths < 10 {
				t.Errorf("only %d connections have paths in both:\n%s", paths, talk)
			}
			if name != "userspace" {
				if tree := d.must("replay", file, "-A", "-o", "path"); !strings.Contains(tree, "KUBE-SERVICES") || !strings.Contains(tree, "DNAT to ") {
					t.Errorf("replay -o path shows no paths:\n%.2000s", tree)
				}
			}
			if same < 20 {
				t.Errorf("%d connections are in the replay as they were live, of %d; want 20 at least:\n%s", same, len(live), talk)
			}

			pcap := filepath.Join(d.dir, "node1.pcapng")
			_, _, talk = d.kptrace("replay", file, "-A", "--pcapng", pcap)
			text, err := os.ReadFile(pcap)
			if name == "userspace" {
				return // no rule reports picks there, and a cut is a cut
			}
			if err != nil || len(text) < 4000 || !strings.Contains(string(text), "shop/foo:http -> 10.244.") {
				t.Errorf("%d bytes of pcapng, comments not as they should be: %v, %s", len(text), err, talk)
			}

			// Cut off, and something else.
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, file, string(whole[:len(whole)*3/4]))
			if code, out, talk := d.kptrace("replay", file, "-A", "-o", "jsonl"); code != 1 || out == "" || !strings.Contains(talk, "cut off") {
				t.Errorf("a cut recording: exit %d, %s", code, talk)
			}
			writeFile(t, file, "PK\x03\x04 and so on")
			if code, _, talk := d.kptrace("replay", file); code != 1 || !strings.Contains(talk, "no recording") {
				t.Errorf("another file: exit %d, %s", code, talk)
			}
		})
	}
}

func key(f *flowLine) string { return f.Time.String() + f.Client.IP + f.Service.Name }
