package otlp

import (
	"context"
	"errors"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// permanent reports whether trying again is of no use: the OTLP specification
// lists the answers after which it is.
func permanent(err error) bool {
	var network *url.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.As(err, &network) {
		return false
	}
	if s, ok := status.FromError(err); ok {
		switch s.Code() {
		case codes.Canceled, codes.DeadlineExceeded, codes.Aborted, codes.OutOfRange, codes.Unavailable,
			codes.DataLoss, codes.ResourceExhausted:
			return false
		}
		return true
	}
	// What the HTTP exporters say of 429, 502, 503 and 504, and of a request
	// that took too long; their types are hidden.
	text := err.Error()
	return !strings.Contains(text, "retry-able request failure") && !strings.Contains(text, "export timeout")
}

// partial takes out of an error what the collector said of items that it took
// but will not keep: the rest of the request is well.
func partial(err error) (rejected uint64, rest error) {
	if err == nil {
		return 0, nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var left []error
		for _, e := range joined.Unwrap() {
			n, e := partial(e)
			rejected += n
			left = append(left, e)
		}
		return rejected, errors.Join(left...)
	}
	m := regexp.MustCompile(`OTLP partial success: .* \((-?\d+) [a-z ]+ rejected\)$`).FindStringSubmatch(err.Error())
	if m == nil {
		return 0, err
	}
	n, _ := strconv.ParseUint(m[1], 10, 64)
	return n, nil
}
