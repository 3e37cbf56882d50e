package trace

import (
	"slices"
	"strings"
)

// Similar returns those of known that a typing error away from word or nearly
// so, nearest first, at most three: for "did you mean".
func Similar(word string, known []string) []string {
	type near struct {
		name string
		dist int
	}
	var found []near
	for _, name := range known {
		d := editDistance(strings.ToLower(word), strings.ToLower(name))
		limit := max(1, len(word)/3)
		if d > limit && !(len(word) >= 3 && (strings.Contains(name, word) || len(name) >= 3 && strings.Contains(word, name))) {
			continue
		}
		if !slices.ContainsFunc(found, func(n near) bool { return n.name == name }) {
			found = append(found, near{name, d})
		}
	}
	slices.SortStableFunc(found, func(a, b near) int { return a.dist - b.dist })
	var names []string
	for _, n := range found[:min(3, len(found))] {
		names = append(names, n.name)
	}
	return names
}

// editDistance counts insertions, deletions, replacements and swaps of
// neighbours (the optimal string alignment distance), by bytes.
func editDistance(a, b string) int {
	before, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev, cur = prev, cur, before
	}
	return prev[len(b)]
}
