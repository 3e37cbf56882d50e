package xtables

// slab hands out pieces of large allocations, so that 200,000 rules are some
// hundred allocations and not a million.
type slab struct {
	ruleBuf  []Rule
	matchBuf []Match
	optBuf   []Opt
	strBuf   []string
	out      []*Rule
}

const slabSize = 512

func (s *slab) rule() *Rule {
	if len(s.ruleBuf) == 0 {
		s.ruleBuf = make([]Rule, slabSize/4)
	}
	r := &s.ruleBuf[0]
	s.ruleBuf = s.ruleBuf[1:]
	return r
}

func (s *slab) matches(n int) []Match { return carve(&s.matchBuf, n) }

func (s *slab) values(n int) []string { return carve(&s.strBuf, n) }

func (s *slab) options(from []Opt) []Opt {
	opts := carve(&s.optBuf, len(from))
	copy(opts, from)
	return opts
}

func carve[T any](buf *[]T, n int) []T {
	if n == 0 {
		return nil
	}
	if len(*buf) < n {
		*buf = make([]T, max(slabSize, n))
	}
	out := (*buf)[:n:n]
	*buf = (*buf)[n:]
	return out
}
