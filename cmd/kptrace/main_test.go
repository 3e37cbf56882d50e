package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
)

func TestNeedsRoot(t *testing.T) {
	t.Parallel()
	refused := fmt.Errorf("node: writing sysctl: %w\nand another", fs.ErrPermission)
	printed := errors.New("exit status 4: Could not fetch rule set: Permission denied (you must be root)\nand another")
	other := errors.New("no such file")
	for _, tc := range []struct {
		err  error
		says bool
	}{{refused, true}, {printed, os.Geteuid() != 0}, {other, false}} {
		got := needsRoot("reading rules", tc.err)
		if !tc.says && got != tc.err { //nolint:errorlint // the same or another
			t.Errorf("%v: %v", tc.err, got)
		}
		if tc.says && (!strings.HasPrefix(got.Error(), "reading rules needs root (CAP_NET_ADMIN") || strings.Contains(got.Error(), "another")) {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
	if needsRoot("reading rules", nil) != nil {
		t.Error("an error of nothing")
	}
}
