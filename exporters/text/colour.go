package text

import (
	"strings"

	"github.com/kptrace/kptrace/trace"
)

const reset = "\x1b[0m"

func red(s string) string    { return "\x1b[31m" + s + reset }
func yellow(s string) string { return "\x1b[33m" + s + reset }
func faint(s string) string  { return "\x1b[2m" + s + reset }

// dim makes talk less loud than data.
func (r *renderer) dim(s string) string {
	if !r.cfg.Colour {
		return s
	}
	return faint(s)
}

// painter colours a result: failures red, doubts yellow, nothing else.
func painter(f *trace.Flow) func(string) string {
	switch {
	case f.Outcome == trace.Unanswered || f.Outcome == trace.Unknown || f.Incomplete:
		return yellow
	case f.Outcome.Failed():
		return red
	case f.Outcome == trace.Pending:
		return faint
	}
	return nil
}

// cutColoured is cut for a line that is coloured as a whole.
func cutColoured(s string, width int) string {
	if rest, ok := strings.CutSuffix(s, reset); ok {
		if i := strings.IndexByte(rest, 'm'); i > 0 {
			return rest[:i+1] + cut(rest[i+1:], width, false) + reset
		}
	}
	return cut(s, width, false)
}
