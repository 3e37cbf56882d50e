package exec

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	tool := filepath.Join(dir, "kptrace-test-tool")
	if err := os.WriteFile(tool, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got, err := LookPath("kptrace-test-tool"); err != nil || got != tool {
		t.Errorf("LookPath in PATH = %q, %v; want %q", got, err, tool)
	}
	if got, err := LookPath("./absent/tool"); err == nil {
		t.Errorf("LookPath of an absent path = %q, want an error", got)
	}
	_, err := LookPath("kptrace-no-such-tool")
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/usr/sbin") {
		t.Errorf("LookPath of an absent tool = %v; want fs.ErrNotExist naming the folders", err)
	}
}

func TestErrorText(t *testing.T) {
	err := &Error{Path: "/usr/sbin/iptables-restore", Args: []string{"--noflush"}, Code: 1,
		Stderr: "line 1\nline 2\nline 3\nline 4\nline 5\nline 6\n", Err: errors.New("exit status 1")}
	want := "exec: iptables-restore --noflush: exit status 1: line 1; line 2; line 3; line 4; line 5; …"
	if err.Error() != want {
		t.Errorf("Error() = %q\nwant      %q", err, want)
	}
	long := &Error{Path: "x", Args: []string{strings.Repeat("y", 1000)}, Err: errors.New("exit status 1")}
	if n := len(long.Error()); n > 300 {
		t.Errorf("a long command makes a message of %d bytes", n)
	}
}

func TestEndedContextStartsNothing(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("shutting down")
	cancel(cause)
	mark := filepath.Join(t.TempDir(), "started")
	_, err := Run(ctx, Spec{Path: "touch", Args: []string{mark}})
	if !errors.Is(err, cause) {
		t.Errorf("Run = %v, want the context's cause", err)
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the command ran")
	}
}
