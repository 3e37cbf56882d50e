package xtables

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
)

// failure is what iptables-restore said when it refused a text.
type failure struct {
	stderr  string
	line    int // 0 if not said
	tooLong bool
}

var lineNumber = regexp.MustCompile(`(?:line:? )(\d+)(?:[ :\n]|$)`)

func newFailure(stderr string) *failure {
	f := &failure{stderr: strings.TrimSpace(stderr)}
	if m := lineNumber.FindStringSubmatch(stderr); m != nil {
		f.line, _ = strconv.Atoi(m[1])
	}
	f.tooLong = strings.Contains(stderr, "Message too long") || strings.Contains(stderr, "No buffer space available")
	return f
}

// block returns the index of the block the failure is in, given those that were
// begun, or -1.
func (f *failure) block(begun []blockCount) int {
	if len(begun) == 1 {
		return 0
	}
	if f.line == 0 {
		return -1
	}
	i := len(begun) - 1
	for i > 0 && begun[i].line > f.line {
		i--
	}
	return i
}

// unitLine returns the line of a unit that stood alone in its block, or "".
func (f *failure) unitLine(u *Unit, first int) string {
	var b bytes.Buffer
	if u.write(&b, passChains).lines+u.write(&b, passRules).lines == 1 {
		return strings.TrimSuffix(b.String(), "\n")
	}
	n := f.line - first // 1 is the first of the unit
	if n < 1 {
		return ""
	}
	return u.line(n-1, passChains, passRules)
}
