package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/exporters/text"
)

// TestCheckLab has a node check and explain itself: silence while all is well,
// what somebody broke by its name, and a repair of our own rules.
func TestCheckLab(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			d.labUp(nil, "--iptables-flavour", flavour)
			code, out, talk := d.kptrace("check")
			if code != 0 || out != "" {
				t.Errorf("a healthy node: exit %d, %s%s", code, out, talk)
			}

			out = d.must("explain", "svc/front", "-n", "shop", "--from", "pod/web", "-o", "json")
			var answers []text.ExplainJSON
			if err := json.Unmarshal([]byte(out), &answers); err != nil {
				t.Fatal(err)
			}
			if len(answers) != 2 {
				t.Fatalf("%d answers, want one for the cluster IP and one for the node port", len(answers))
			}
			for _, a := range answers {
				if len(a.Cases) != 1 || a.Cases[0].Odds != 1 || a.Cases[0].Verdict != "forward" || len(a.Cases[0].Choices) != 2 ||
					a.Cases[0].Choices[0].Endpoint.Pod != "foo-1" || a.From.Pod != "web" {
					t.Errorf("got %s", out)
				}
			}
			if out := d.must("explain", "svc/foo", "-n", "shop", "--from", "10.9.8.7"); !strings.Contains(out, "not ready") || !strings.Contains(out, "iptables-"+flavour) {
				t.Errorf("got %s", out)
			}

			// The table is that of what iptables-save prints, with what the API says.
			file := filepath.Join(d.dir, "node1.rules")
			writeFile(t, file, d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour+"-save"))
			var live, saved text.RulesJSON
			for from, into := range map[string]*text.RulesJSON{d.must("explain", "-o", "json"): &live, d.must("explain", "--rules", file, "-o", "json"): &saved} {
				if err := json.Unmarshal([]byte(from), into); err != nil {
					t.Fatalf("%v: %s", err, from)
				}
			}
			excluded := 0
			for i := range live.Services {
				for j := range live.Services[i].Addresses {
					x := &live.Services[i].Addresses[j]
					excluded += len(x.Excluded)
					x.Excluded = nil
				}
			}
			if diff := cmp.Diff(saved, live); diff != "" || len(live.Services) < 4 || excluded == 0 {
				t.Errorf("%d Services, %d endpoints excluded, (-saved +live):\n%s", len(live.Services), excluded, diff)
			}
			if out := d.must("explain", "-n", "shop"); !strings.Contains(out, "(foo-1)") || !strings.Contains(out, "33 %") {
				t.Errorf("the table: %s", out)
			}

			if code, out, talk := d.kptrace("explain", "-n", "nowhere"); code != 1 || out != "" || !strings.Contains(talk, "no Service of namespace nowhere") {
				t.Errorf("exit %d, %s%s", code, out, talk)
			}

			// A rule that asks for a set is answered by the kernel's.
			d.must("lab", "exec", "node/node1", "--", "sh", "-c", "ipset create banned hash:ip && ipset add banned 10.9.8.7")
			d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour, "-I", "FORWARD", "-m", "set", "--match-set", "banned", "src", "-j", "DROP")
			for client, want := range map[string]string{"10.9.8.7": "dropped by a rule", "10.9.8.8": "forwarded to an endpoint"} {
				if out := d.must("explain", "svc/foo", "-n", "shop", "--from", client); !strings.Contains(out, "verdict   "+want) || strings.Contains(out, "-m set matches") {
					t.Errorf("a client %s by a set: %s", client, out)
				}
			}
			d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour, "-D", "FORWARD", "-m", "set", "--match-set", "banned", "src", "-j", "DROP")
			d.must("lab", "exec", "node/node1", "--", "ipset", "destroy", "banned")

			// Somebody drops what is forwarded, and turns forwarding off.
			d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour, "-A", "FORWARD", "-d", "10.244.1.21/32", "-j", "DROP")
			d.must("lab", "exec", "node/node1", "--", "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
			code, out, talk = d.kptrace("check", "-v")
			for _, want := range []string{"ip-forward", "forward-dropped", "shop/front:http", "-d 10.244.1.21/32 -j DROP"} {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in: %s%s", want, out, talk)
				}
			}
			if code != 3 {
				t.Errorf("exit %d, want 3", code)
			}
			d.must("lab", "exec", "node/node1", "--", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
			d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour, "-D", "FORWARD", "-d", "10.244.1.21/32", "-j", "DROP")

			// Rules of ours that are changed are ours to repair.
			d.must("lab", "exec", "node/node1", "--", "iptables-"+flavour, "-t", "nat", "-D", "POSTROUTING",
				"-m", "comment", "--comment", "kubernetes postrouting rules", "-j", "KUBE-POSTROUTING")
			deadline := time.Now().Add(20 * time.Second)
			for {
				if code, out, talk = d.kptrace("check", "--fix"); code == 0 && out == "" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("not repaired: %s%s", out, talk)
				}
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
}
