package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The bounds of a client, so that no scenario can flood the machine.
const (
	maxRate        = 5000
	maxConcurrency = 512
	maxHold        = 4 * time.Second // servers wait for five
)

// Target is one line of a client's traffic.
type Target struct {
	// URL is the target as it was written.
	URL string `json:"url"`
	// Scheme is http, tcp, udp or sctp.
	Scheme string         `json:"scheme"`
	Addr   netip.AddrPort `json:"addr"`
	// Rate is connections per second, Concurrency how many may be open at
	// once; a connection that finds no room is not made.
	Rate        float64 `json:"rate"`
	Concurrency int     `json:"concurrency"`
	// Count ends the traffic after so many connections, 0 means never.
	Count int `json:"count,omitempty"`
	// After is the delay before the first one.
	After time.Duration `json:"after,omitempty"`
	// Hold is how long a connection stays idle before the question is asked; with
	// udp how long it is asked again from the same port.
	Hold time.Duration `json:"hold,omitempty"`
}

// ParseTraffic reads a list of targets separated by semicolons or line ends:
//
//	http://foo.shop:80 rate=20 concurrency=8; udp://10.96.0.53:53 count=100 after=2s
//
// rate is connections per second (default 5), concurrency how many may be
// open at once (default 16), hold how long each stays idle once connected. Every connection is a new one from a fresh port.
// An http target without a port means 80.
func ParseTraffic(text string, resolve func(host string) (netip.Addr, error)) ([]Target, error) {
	var targets []Target
	for _, line := range strings.FieldsFunc(text, func(r rune) bool { return r == ';' || r == '\n' }) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		t, err := parseTarget(words, resolve)
		if err != nil {
			return targets, fmt.Errorf("%q: %w", strings.Join(words, " "), err)
		}
		targets = append(targets, t)
	}
	return targets, nil
}

func parseTarget(words []string, resolve func(string) (netip.Addr, error)) (Target, error) {
	t := Target{URL: words[0], Rate: 5, Concurrency: 16}
	u, err := url.Parse(words[0])
	if err != nil {
		return t, err
	}
	t.Scheme = u.Scheme
	if !slices.Contains([]string{"http", "tcp", "udp", "sctp"}, t.Scheme) {
		return t, errors.New("begin with http://, tcp://, udp:// or sctp://")
	}
	port := u.Port()
	if port == "" && t.Scheme == "http" {
		port = "80"
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return t, fmt.Errorf("port %q is not within 1 to 65535", port)
	}
	addr, err := resolve(u.Hostname())
	if err != nil {
		return t, err
	}
	t.Addr = netip.AddrPortFrom(addr, uint16(number))
	for _, w := range words[1:] {
		if err := t.set(w); err != nil {
			return t, err
		}
	}
	return t, nil
}

func (t *Target) set(word string) error {
	key, value, _ := strings.Cut(word, "=")
	var err error
	switch key {
	case "rate":
		if t.Rate, err = strconv.ParseFloat(value, 64); err == nil && !(t.Rate > 0 && t.Rate <= maxRate) {
			err = fmt.Errorf("not above 0 and up to %d per second", maxRate)
		}
	case "concurrency":
		if t.Concurrency, err = strconv.Atoi(value); err == nil && (t.Concurrency < 1 || t.Concurrency > maxConcurrency) {
			err = fmt.Errorf("not within 1 to %d", maxConcurrency)
		}
	case "count":
		if t.Count, err = strconv.Atoi(value); err == nil && t.Count < 1 {
			err = errors.New("not above 0")
		}
	case "after":
		if t.After, err = time.ParseDuration(value); err == nil && t.After < 0 {
			err = errors.New("is negative")
		}
	case "hold":
		if t.Hold, err = time.ParseDuration(value); err == nil && (t.Hold < 0 || t.Hold > maxHold) {
			err = fmt.Errorf("not within 0 to %v", maxHold)
		}
	default:
		return fmt.Errorf("unknown word %q: use rate, concurrency, count, after or hold", word)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", word, err)
	}
	return nil
}
