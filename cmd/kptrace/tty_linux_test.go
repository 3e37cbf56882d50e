package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

// openPTY returns both ends of a new terminal of 250 by 40 characters.
func openPTY(t *testing.T) (master, terminal *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		t.Fatal(errno)
	}
	terminal = os.NewFile(peer, "pts")
	t.Cleanup(func() { terminal.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 250}); err != nil {
		t.Fatal(err)
	}
	return master, terminal
}

// TestTerminal follows more connections than an eye can, on a terminal: good
// ones are counted, each failed one has its row.
func TestTerminal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	writeFile(t, w.manifests+"/all.yaml", manifest("foo", 10, 8080, "", 1, 2)+"---\n"+manifest("bad", 11, 8081, "", 1))
	w.serve(1, 2)
	w.synced(w.proxy())
	follow := func(env string) (screen *watched, f *child) {
		master, terminal := openPTY(t)
		screen = newWatched()
		f = w.startWith(exec.Spec{Path: "kptrace", Args: []string{"follow", "-A", "-o", "wide"}, Env: []string{env}, Stdout: terminal})
		terminal.Close()
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := master.Read(buf)
				if err != nil {
					return
				}
				_, _ = screen.Write(buf[:n])
			}
		}()
		f.await(screen, "CLIENT", 10*time.Second)
		return screen, f
	}
	colour, f1 := follow("NO_COLOR=")
	plain, f2 := follow("NO_COLOR=1")
	good := w.start("kptrace", "lab", "load", "--target", "10.96.0.10:80", "--rate", "100", "--for", "4s", "-o", "json")
	bad := w.start("kptrace", "lab", "load", "--target", "10.96.0.11:80", "--rate", "40", "--for", "4s", "-o", "json")
	good.end(20 * time.Second)
	bad.end(20 * time.Second)
	time.Sleep(700 * time.Millisecond)
	for name, s := range map[string]*watched{"colours": colour, "NO_COLOR": plain} {
		if text := s.String(); !regexp.MustCompile(`… \d+ connections? more, not failed`).MatchString(text) {
			t.Errorf("%s: no counter in\n%.3000s", name, text)
		}
	}
	for _, f := range []*child{f1, f2} {
		if code := f.stop(syscall.SIGINT); code != 0 {
			t.Errorf("Ctrl-C: exit %d: %s", code, f.err)
		}
	}
	sgr := regexp.MustCompile("\x1b\\[[0-9;]*m")
	for name, s := range map[string]*watched{"colours": colour, "NO_COLOR": plain} {
		eventually(t, 5*time.Second, name+": footer", func() bool { return strings.Contains(s.String(), " lost") })
		text := s.String()
		if got := sgr.MatchString(text); got != (name == "colours") {
			t.Errorf("%s: coloured: %t", name, got)
		}
		// Connections that were refused, by their ids: ports recur, and a time
		// becomes more exact when the entry of connection tracking tells it.
		const who = `\d\d:\d\d:\d\d\.\d+ +node1 +(\w+) +node1:\d+ +10\.0\.0\.1:\d+ +shop/`
		rows := map[string]bool{}
		for _, m := range regexp.MustCompile(who+`bad:http .*refused by endpoint`).FindAllStringSubmatch(sgr.ReplaceAllString(text, ""), -1) {
			rows[m[1]] = true
		}
		footer := regexp.MustCompile(`(\d+) connections, (\d+) failed, 0 events lost`).FindStringSubmatch(text)
		if footer == nil {
			t.Errorf("%s: no footer", name)
			continue
		}
		if footer[2] != fmt.Sprint(len(rows)) || len(rows) < 100 {
			var odd []string
			for line := range strings.Lines(sgr.ReplaceAllString(text, "")) {
				if strings.Contains(line, "shop/bad:http") && !strings.Contains(line, "refused by endpoint") {
					odd = append(odd, line)
				}
			}
			t.Errorf("%s: %d rows of failed connections; the footer says %s; other rows of theirs: %q", name, len(rows), footer[0], odd)
		}
		good := map[string]bool{}
		for _, m := range regexp.MustCompile(who+`foo:http`).FindAllStringSubmatch(sgr.ReplaceAllString(text, ""), -1) {
			good[m[1]] = true
		}
		if len(good) == 0 || len(good) > 20*7 {
			t.Errorf("%s: %d good connections have rows, want at most 20 a second", name, len(good))
		}
	}
	if !strings.Contains(colour.String(), "\x1b[31m") {
		t.Error("failures are not red")
	}
}
