package trace

import "testing"

func TestTally(t *testing.T) {
	var told []Loss
	tally := NewTally(NFTrace, func(l Loss) { told = append(told, l) })
	tally.Frame(100)
	tally.Frame(50)
	tally.Events(7)
	tally.Overrun()
	tally.Lose(10, 20, 3, "kernel")
	if note := tally.Buffer(64, 64); note != "" {
		t.Errorf("a full buffer is noted: %q", note)
	}
	tally.Note(tally.Buffer(32, 64))
	got := tally.Stats(SourceStats{Events: 99, Foreign: 1, Damaged: 2})
	want := SourceStats{
		Source: NFTrace, Frames: 2, Bytes: 150, Events: 7, Lost: 3, Overruns: 1, Foreign: 1, Damaged: 2, ReceiveBuffer: 32,
		Note: "receive buffer 32 of 64 bytes: not root of the machine, see net.core.rmem_max",
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if len(told) != 1 || told[0] != (Loss{Source: NFTrace, From: 10, To: 20, Events: 3, Where: "kernel"}) {
		t.Errorf("told of %+v", told)
	}
	NewTally(NFTrace, nil).Lose(1, 2, 3, "kernel") // tells nobody
}
