package proxy

import "testing"

func TestWalkCacheIsBounded(t *testing.T) {
	c := NewWalkCache[int]()
	for k := range 3 * maxWalks {
		c.Put(k, Outcome{Choices: make([]Choice, 3)})
		if _, ok := c.Get(k); !ok {
			t.Fatalf("%d was not kept", k)
		}
	}
	if n := len(c.keys); n == 0 || n > maxWalks/4 || c.size != 4*n {
		t.Errorf("%d outcomes of size %d, at most %d", n, c.size, maxWalks)
	}
	c.Put(-1, Outcome{Verdict: 1})
	c.Put(-1, Outcome{Verdict: 2})
	if out, _ := c.Get(-1); out.Verdict != 1 {
		t.Errorf("replaced by %v", out.Verdict)
	}
}
