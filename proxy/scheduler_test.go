package proxy

import (
	"strings"
	"testing"
)

func TestParseScheduler(t *testing.T) {
	for text, want := range map[string]Scheduler{
		"rr":                {Name: "rr"},
		"sh,port,fallback":  {Name: "sh", Port: true},
		"sh,no-fallback":    {Name: "sh", NoFallback: true},
		"mh":                {Name: "mh", Port: true},
		"mh,no-port":        {Name: "mh"},
		"my-own_1":          {Name: "my-own_1"},
		"mh,fallback, port": {Name: "mh", Port: true},
	} {
		got, err := ParseScheduler(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
		if again, err := ParseScheduler(got.String()); err != nil || again != got {
			t.Errorf("%q reads back as %+v, %v", got, again, err)
		}
	}
	for text, want := range map[string]string{
		"": "no name", "RR": "no name", "round robin": "no name", "sixteen-letters-x": "no name",
		"rr,port": "has no flags", "sh,ports": `no flag "ports"`,
	} {
		if _, err := ParseScheduler(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want an error with %q", text, err, want)
		}
	}
}
