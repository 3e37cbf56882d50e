package nfnl

import (
	"errors"
	"math"
	"testing"
)

func TestDrops(t *testing.T) {
	type loss struct {
		from, to int64
		n        uint64
	}
	var count uint32
	var broken error
	var got []loss
	d := Drops{
		Count:  func() (uint32, error) { return count, broken },
		Since:  10,
		Report: func(from, to int64, n uint64) { got = append(got, loss{from, to, n}) },
	}
	d.Look(20) // nothing
	count = math.MaxUint32
	d.Look(30)
	count, broken = 0, errors.New("no table")
	d.Look(40)
	if !errors.Is(d.Err(), broken) {
		t.Errorf("error %v", d.Err())
	}
	count, broken = 4, nil
	d.Look(50) // past the wrap, and since the look that worked
	if want := []loss{{20, 30, math.MaxUint32}, {30, 50, 5}}; len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %v, want %v", got, want)
	}
	if d.Err() != nil {
		t.Errorf("an error is left: %v", d.Err())
	}
}
