package main

import (
	"strings"
	"testing"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// TestReplaySelectsNothing says what there is where a filter takes none of it, as that
// of the default namespace does.
func TestReplaySelectsNothing(t *testing.T) {
	t.Parallel()
	r := newReplayed()
	for i, name := range []string{"foo", "bar", "foo"} {
		f := &trace.Flow{ID: trace.FlowID(i + 1)}
		f.Service.Name = proxy.PortName{Namespace: "shop", Name: name, Port: "http"}
		r.put(f)
	}
	if note := r.unselected(&trace.Filter{Namespace: "shop"}); note != "" {
		t.Errorf("something is selected: %q", note)
	}
	want := "none of its 3 connections is selected; they are to shop/bar, shop/foo: -A shows all"
	if note := r.unselected(&trace.Filter{Namespace: "default"}); !strings.HasPrefix(note, want) {
		t.Errorf("%q, want %q", note, want)
	}
	if note := newReplayed().unselected(&trace.Filter{}); note != "" {
		t.Errorf("of an empty recording: %q", note)
	}
}
