package stack

import "testing"

func TestSumOf(t *testing.T) {
	page := []byte(`# HELP a_total Text with a_total{x="y"} 9 in it.
a_total{svc="x",result="ok"} 3
a_total{svc="y",result="ok"} 4
a_total_more{svc="x"} 100
b 7.5
`)
	for _, c := range []struct {
		metric, label string
		want          float64
	}{{"a_total", "", 7}, {"a_total", `svc="x"`, 3}, {"b", "", 7.5}, {"c", "", 0}} {
		if got := sumOf(page, c.metric, c.label); got != c.want {
			t.Errorf("%s %s: %v, want %v", c.metric, c.label, got, c.want)
		}
	}
}
