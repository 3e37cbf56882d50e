package trace

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

func sample() *Flow {
	ap := netip.MustParseAddrPort
	return &Flow{
		ID: 1, Node: "node1", Outcome: Refused, Duration: 30 * time.Millisecond,
		Client: Peer{Addr: ap("10.244.1.5:40312"), Namespace: "shop", Pod: "web-7f9", Node: "node1", Workload: "Deployment/web"},
		Service: ServiceRef{
			Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP},
			Addr: ap("10.96.0.10:80"), Via: proxy.ViaClusterIP,
		},
		Backend: Peer{Addr: ap("10.244.2.8:8080"), Namespace: "shop", Pod: "foo-9d", Node: "node2"},
		Attempts: []Attempt{
			{Endpoint: Peer{Addr: ap("10.244.3.7:8080"), Namespace: "shop", Pod: "foo-5c", Node: "node3"}},
			{Endpoint: Peer{Addr: ap("10.244.2.8:8080"), Namespace: "shop", Pod: "foo-9d", Node: "node2"}},
		},
	}
}

func TestFilterMatch(t *testing.T) {
	sel := func(words ...string) (list []Selector) {
		for _, w := range words {
			ns, rest, ok := strings.Cut(w, "|")
			if !ok {
				ns, rest = "shop", w
			}
			s, err := ParseSelector(rest, ns)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, s)
		}
		return list
	}
	port := func(s string) []Port {
		p, err := ParsePort(s)
		if err != nil {
			t.Fatal(err)
		}
		return []Port{p}
	}
	for _, c := range []struct {
		name string
		in   Filter
		want bool
	}{
		{"zero", Filter{}, true},
		{"service", Filter{Resources: sel("svc/foo")}, true},
		{"service port", Filter{Resources: sel("svc/foo:http")}, true},
		{"service port number", Filter{Resources: sel("svc/foo:80")}, true},
		{"wrong service port", Filter{Resources: sel("svc/foo:https")}, false},
		{"service is no prefix", Filter{Resources: sel("svc/fo")}, false},
		{"service pattern", Filter{Resources: sel("svc/f*")}, true},
		{"service elsewhere", Filter{Resources: sel("other|svc/foo")}, false},
		{"service anywhere", Filter{Resources: sel("|svc/foo")}, true},
		{"same field is or", Filter{Resources: sel("svc/bar", "pod/web-7f9")}, true},
		{"different fields are and", Filter{Resources: sel("svc/foo"), From: sel("pod/other")}, false},
		{"client pod", Filter{Resources: sel("pod/web-*")}, true},
		{"endpoint pod", Filter{Resources: sel("pod/foo-9d")}, true},
		{"endpoint tried first", Filter{To: sel("pod/foo-5c")}, true},
		{"from is not to", Filter{From: sel("pod/foo-9d")}, false},
		{"from pod", Filter{From: sel("pod/web-7f9")}, true},
		{"from namespace", Filter{From: sel("ns/shop")}, true},
		{"from other namespace", Filter{From: sel("ns/web")}, false},
		{"from workload", Filter{From: sel("deploy/web")}, true},
		{"from other kind", Filter{From: sel("sts/web")}, false},
		{"from address", Filter{From: sel("10.244.1.5")}, true},
		{"from range", Filter{From: sel("10.244.0.0/16")}, true},
		{"from other range", Filter{From: sel("10.245.0.0/16")}, false},
		{"from address and port", Filter{From: sel("10.244.1.5:40312")}, true},
		{"to service address", Filter{To: sel("10.96.0.10")}, true},
		{"to service", Filter{To: sel("svc/foo")}, true},
		{"to node", Filter{To: sel("node/node2")}, true},
		{"to node of the client", Filter{To: sel("node/node1")}, false},
		{"node", Filter{Resources: sel("node/node1")}, true},
		{"namespace", Filter{Namespace: "shop"}, true},
		{"other namespace", Filter{Namespace: "web"}, false},
		{"port", Filter{Ports: port("80")}, true},
		{"port name", Filter{Ports: port("http")}, true},
		{"endpoint port is not it", Filter{Ports: port("8080")}, false},
		{"outcome", Filter{Outcomes: []Outcome{Closed, Refused}}, true},
		{"other outcome", Filter{Outcomes: []Outcome{Closed}}, false},
		{"long enough", Filter{MinDuration: 30 * time.Millisecond}, true},
		{"too short", Filter{MinDuration: 31 * time.Millisecond}, false},
	} {
		if got := c.in.Match(sample()); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":            "write svc/NAME",
		"foo":         "svc/foo, pod/foo or node/foo",
		"svc":         "svc/NAME, or svc/* for all",
		"scv/foo":     "did you mean svc?",
		"deplyo/foo":  "did you mean deploy?",
		"zzz/foo":     "use svc, pod, node",
		"svc/":        "the name is missing",
		"svc/Foo":     `'F' cannot be in a name`,
		"svc/shop/x":  "write -n shop svc/x",
		"svc/foo:0":   "a number from 1 to 65535",
		"10.0.0.0/99": "neither an address nor a range",
	} {
		_, err := ParseSelector(in, "default")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q in it", in, err, want)
		}
	}
	if _, err := ParseOutcomes("refusd"); err == nil || !strings.Contains(err.Error(), "did you mean refused?") {
		t.Errorf("refusd: %v", err)
	}
	if got, err := ParseOutcomes("failed"); err != nil || len(got) != 6 {
		t.Errorf("failed: %v, %v", got, err)
	}
}

func TestSimilar(t *testing.T) {
	known := []string{"shop/foo", "shop/food", "shop/sticky", "web/foo"}
	got := Similar("shop/fooo", known)
	if len(got) == 0 || got[0] != "shop/foo" {
		t.Errorf("got %v", got)
	}
	if got := Similar("kube-dns", known); got != nil {
		t.Errorf("got %v, want none", got)
	}
	if d := editDistance("scv", "svc"); d != 1 {
		t.Errorf("a swap costs %d, want 1", d)
	}
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"svc/foo", "svc/foo:http", "po/x", "10.0.0.0/8", "10.0.0.1:80", "[fd00::1]:80", "fd00::/64", "deploy/*", "a/b/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSelector(in, "shop")
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without words")
			}
			return
		}
		again, err := ParseSelector(s.String(), "shop")
		if err != nil || again != s {
			t.Errorf("%q parsed as %+v, whose text %q gives %+v, %v", in, s, s, again, err)
		}
		(&Filter{Resources: []Selector{s}, From: []Selector{s}, To: []Selector{s}}).Match(sample())
	})
}

func TestMatchName(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"foo", "foo", true}, {"foo", "foo-1", false}, {"*", "", true}, {"*", "foo", true},
		{"foo-*", "foo-1", true}, {"foo-*", "foo", false}, {"*-1", "foo-1", true}, {"*-1", "foo-12", false},
		{"f*o*-*1", "foo-bar-1", true}, {"a*a", "a", false}, {"a**b", "ab", true}, {"*x*", "foo", false},
	} {
		if got := matchName(c.pattern, c.name); got != c.want {
			t.Errorf("%q on %q: %v", c.pattern, c.name, got)
		}
	}
}
