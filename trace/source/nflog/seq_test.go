package nflog

import (
	"reflect"
	"testing"
	"time"
)

// numbered makes a Frame of events with these numbers.
func numbered(seqs ...uint32) (data []byte) {
	for _, n := range seqs {
		data = append(data, message("x", n, time.Time{}, nil)...)
	}
	return data
}

func TestCounter(t *testing.T) {
	sec := int64(time.Second)
	for _, tt := range []struct {
		name string
		run  func(c *counter)
		want []uint64
	}{
		{"none lost", func(c *counter) { c.frame(numbered(0, 1, 2), 1); c.frame(numbered(3), 2) }, nil},
		{"first lost", func(c *counter) { c.frame(numbered(5), 1) }, []uint64{5}},
		{"between frames", func(c *counter) { c.frame(numbered(0), 1); c.frame(numbered(3, 4, 7), 2) }, []uint64{2, 2}},
		{"wrapped", func(c *counter) { c.next = 1<<32 - 1; c.frame(numbered(1<<32-1, 1), 1) }, []uint64{1}},
		{"bound anew", func(c *counter) { c.frame(numbered(0, 1, 2), 1); c.frame(numbered(0, 1), 2) }, nil},
		{"tail, then explained", func(c *counter) {
			c.frame(numbered(0), 1)
			c.overran(2)
			c.idle(3)
			c.idle(3 + sec)
			c.idle(3 + 2*sec)
			c.frame(numbered(11), 3*sec)
		}, []uint64{1, 9}},
		{"overrun explained in time", func(c *counter) {
			c.frame(numbered(0), 1)
			c.overran(2)
			c.frame(numbered(4), 3)
			c.idle(2 * sec)
		}, []uint64{3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []uint64
			c := &counter{report: func(from, to int64, events uint64) {
				if from > to {
					t.Errorf("%d lost from %d to %d", events, from, to)
				}
				got = append(got, events)
			}}
			tt.run(c)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("lost %v, want %v", got, tt.want)
			}
		})
	}
}
