package xtables

import (
	"errors"
	"strings"
)

// token is one argument of a line. A quoted one is never an option.
type token struct {
	text   string
	quoted bool
}

// isOption reports whether the token begins an option, and not a value such
// as -5.
func (t token) isOption() bool {
	return !t.quoted && len(t.text) > 1 && t.text[0] == '-' && (t.text[1] < '0' || t.text[1] > '9')
}

func (t token) isNot() bool { return !t.quoted && t.text == "!" }

var errOpenQuote = errors.New("quote is not closed")

// lex splits a line as iptables-restore does (add_param_to_argv of
// xshared.c): blanks separate, a double quote opens a string in which a
// backslash takes the next byte as it is, the closing quote ends the argument.
func lex(toks []token, line string) ([]token, error) {
	for i := 0; i < len(line); {
		if c := line[i]; c == ' ' || c == '\t' || c == '\r' {
			i++
			continue
		}
		end := strings.IndexAny(line[i:], " \t\r\"")
		if end < 0 {
			end = len(line) - i
		}
		if i+end == len(line) || line[i+end] != '"' {
			toks = append(toks, token{text: line[i : i+end]})
			i += end
			continue
		}
		head := line[i : i+end]
		text, n, ok := unquote(line[i+end+1:])
		if !ok {
			return toks, errOpenQuote
		}
		toks = append(toks, token{text: head + text, quoted: true})
		i += end + 1 + n
	}
	return toks, nil
}

// unquote reads up to the closing quote and says how much it took.
func unquote(s string) (text string, n int, ok bool) {
	i := strings.IndexAny(s, "\"\\")
	if i < 0 {
		return "", 0, false
	}
	if s[i] == '"' {
		return s[:i], i + 1, true
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"':
			return string(b), i + 1, true
		case '\\':
			if i++; i == len(s) {
				return "", 0, false
			}
		}
		b = append(b, s[i])
	}
	return "", 0, false
}

// validName reports whether a bare name survives a text: no blanks, quotes or
// control bytes.
func validName(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c <= ' ' || c == '"' || c == '\'' || c == '\\' || c == 0x7f {
			return false
		}
	}
	return s != ""
}
