package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/proxy"
)

// Control is a connection to a running lab, from any process of the same
// user.
type Control struct{ conn *net.UnixConn }

// DialControl connects to the lab whose sockets are in dir. If none runs, the
// error is ErrNoLab.
func DialControl(ctx context.Context, dir string) (*Control, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", ControlPath(dir))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, ErrNoLab
	}
	if err != nil {
		return nil, fmt.Errorf("lab: asking the lab: %w", err)
	}
	return &Control{conn: conn.(*net.UnixConn)}, nil
}

// Close hangs up. A program started by Exec is killed.
func (c *Control) Close() error { return c.conn.Close() }

func (c *Control) send(r Request, files ...*os.File) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, 0, len(files))
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.conn.Write(b[n:])
	}
	if err != nil {
		return fmt.Errorf("lab: asking the lab: %w", err)
	}
	return nil
}

func (c *Control) ask(r Request, files ...*os.File) (Reply, error) {
	if err := c.send(r, files...); err != nil {
		return Reply{}, err
	}
	return c.receive()
}

func (c *Control) receive() (Reply, error) {
	var reply Reply
	if err := json.NewDecoder(c.conn).Decode(&reply); err != nil {
		return reply, fmt.Errorf("lab: the lab ended: %w", err)
	}
	if reply.Err != "" {
		if reply.NotFound {
			return reply, notFoundError(reply.Err)
		}
		return reply, errors.New(reply.Err)
	}
	return reply, nil
}

// notFoundError is the lab's own words for a program that does not exist.
type notFoundError string

func (e notFoundError) Error() string      { return string(e) }
func (notFoundError) Is(target error) bool { return target == fs.ErrNotExist }

// Status asks what the lab is.
func (c *Control) Status() (*Status, error) {
	r, err := c.ask(Request{Op: "status"})
	return r.Status, err
}

// Happened is the number of the last Incident, 0 if there was none, and the mode of
// the nodes' proxies.
func (c *Control) Happened() (int, proxy.Mode, error) {
	r, err := c.ask(Request{Op: "incident"})
	return r.Incident, r.Mode, err
}

// Incident is Lab.Incident.
func (c *Control) Incident(n int) error {
	_, err := c.ask(Request{Op: "break", Signal: n})
	return err
}

// Heal is Lab.Heal.
func (c *Control) Heal() error {
	_, err := c.ask(Request{Op: "heal"})
	return err
}

// Fault is Lab.Fault; target is as ParseTarget returns it.
func (c *Control) Fault(kind, target string, delay time.Duration) error {
	_, err := c.ask(Request{Op: "fault", Target: target, Fault: kind, Delay: delay})
	return err
}

// Down ends the lab and waits until its last process has gone.
func (c *Control) Down() error {
	if _, err := c.ask(Request{Op: "down"}); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c.conn)
	return err
}

// Exec runs a program in a pod or node of the lab with the given stdin,
// stdout and stderr, hands on SIGINT, SIGTERM, SIGQUIT and SIGHUP to it, and
// returns its exit code, 128+N if signal N ended it. A program that does not
// exist gives an error that is fs.ErrNotExist.
func (c *Control) Exec(ctx context.Context, target string, args []string, stdio [3]*os.File) (int, error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer signal.Stop(signals)
	wd, err := os.Getwd()
	if err != nil {
		wd = "/"
	}
	req := Request{Op: "exec", Target: target, Args: args, Env: os.Environ(), Dir: wd}
	if err := c.send(req, stdio[:]...); err != nil {
		return -1, err
	}
	type result struct {
		reply Reply
		err   error
	}
	done := make(chan result, 1)
	go func() {
		r, err := c.receive()
		done <- result{r, err}
	}()
	for {
		select {
		case r := <-done:
			return r.reply.Code, r.err
		case s := <-signals:
			if n, ok := s.(syscall.Signal); ok {
				if err := c.send(Request{Op: "signal", Signal: int(n)}); err != nil {
					return -1, err
				}
			}
		case <-ctx.Done():
			c.conn.Close()
			<-done
			return -1, context.Cause(ctx)
		}
	}
}
