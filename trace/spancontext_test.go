package trace

import (
	"strings"
	"testing"
	"time"
)

const example = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestParseTraceparent(t *testing.T) {
	c, err := ParseTraceparent(example)
	if err != nil || c.Trace.String() != "4bf92f3577b34da6a3ce929d0e0e4736" || c.Span.String() != "00f067aa0ba902b7" || !c.Sampled() {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := ParseTraceparent("cc" + example[2:] + "-more"); err != nil || !c.Sampled() {
		t.Errorf("a later version: %+v, %v", c, err)
	}
	if c, err := ParseTraceparent(example[:53] + "02"); err != nil || c.Sampled() {
		t.Errorf("not sampled: %+v, %v", c, err)
	}
	for name, s := range map[string]string{
		"empty": "", "short": example[:54], "long": example + "0", "version 00 with more": example + "-00",
		"version ff": "ff" + example[2:], "upper case": strings.ToUpper(example),
		"no dash":    strings.Replace(example, "-", "_", 1),
		"zero trace": "00-" + strings.Repeat("0", 32) + example[35:],
		"zero span":  example[:36] + strings.Repeat("0", 16) + "-01",
		"not hex":    strings.Replace(example, "f067", "g067", 1),
	} {
		if c, err := ParseTraceparent(s); err == nil {
			t.Errorf("%s: %q is %+v", name, s, c)
		}
	}
}

func FuzzParseTraceparent(f *testing.F) {
	f.Add(example)
	f.Add("cc" + example[2:] + "-x")
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseTraceparent(s)
		if err == nil && (c.Trace == TraceID{} || c.Span == SpanID{} || !strings.Contains(s, c.Trace.String())) {
			t.Errorf("%q is %+v", s, c)
		}
	})
}

func TestSpanContext(t *testing.T) {
	f := sample()
	c := f.SpanContext()
	if c.Trace == (TraceID{}) || c.Span == (SpanID{}) || c.Sampled() {
		t.Fatalf("%+v", c)
	}
	again := sample()
	again.Revision, again.Outcome = 9, Closed
	if again.SpanContext() != c {
		t.Error("another revision has another trace")
	}
	for name, change := range map[string]func(*Flow){
		"id":   func(f *Flow) { f.ID++ },
		"node": func(f *Flow) { f.Node = "node2" },
	} {
		other := sample()
		if change(other); other.SpanContext().Trace == c.Trace || other.SpanContext().Span == c.Span {
			t.Errorf("another %s has the same ids", name)
		}
	}

	parent, err := ParseTraceparent(example)
	if err != nil {
		t.Fatal(err)
	}
	f.Carried = []Carried{{Time: time.Unix(1, 0), SpanContext: parent}}
	if got := f.SpanContext(); got.Trace != parent.Trace || got.Span != c.Span || !got.Sampled() {
		t.Errorf("joined: %+v", got)
	}
	f.Carried[0].Flags = 0
	if f.SpanContext() != c {
		t.Error("joined a trace that nobody records")
	}
	if n := testing.AllocsPerRun(100, func() { f.SpanContext() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
