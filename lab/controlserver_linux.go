package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

// ServeControl answers requests on the lab's control socket until ctx ends.
// down is called when somebody asks the lab to end; their connection stays
// open until this process ends. ready is called once the socket is there.
func (l *Lab) ServeControl(ctx context.Context, ready, down func()) error {
	path := ControlPath(l.cfg.SocketDir)
	_ = os.Remove(path) // ours alone: Start took the lock
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("lab: making the control socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer listener.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("lab: making the control socket: %w", err)
	}
	ready()
	var clients sync.WaitGroup
	for {
		conn, err := listener.Accept()
		if err != nil {
			clients.Wait()
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("lab: control socket: %w", err)
		}
		clients.Go(func() {
			c := controlConn{lab: l, conn: conn.(*net.UnixConn), down: down}
			defer c.conn.Close()
			c.serve(ctx)
		})
	}
}

type controlConn struct {
	lab  *Lab
	conn *net.UnixConn
	down func()
	mu   sync.Mutex
}

func (c *controlConn) reply(r Reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = json.NewEncoder(c.conn).Encode(r) // whoever asked may have gone
}

func (c *controlConn) serve(ctx context.Context) {
	if err := c.checkPeer(); err != nil {
		c.reply(Reply{Err: err.Error()})
		return
	}
	req, rest, files, err := readRequest(c.conn)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		c.reply(Reply{Err: err.Error()})
		return
	}
	switch req.Op {
	case "exec":
		c.exec(ctx, req, rest, files)
	case "fault":
		id, ok := strings.CutPrefix(req.Target, "pod/")
		if !ok {
			err = fmt.Errorf("lab: %s is no pod", req.Target)
		} else {
			err = c.lab.Fault(ctx, req.Fault, id, req.Delay)
		}
		c.reply(Reply{Err: text(err)})
	case "incident":
		c.reply(Reply{Incident: c.lab.Happened(), Mode: c.lab.mode()})
	case "heal":
		c.reply(Reply{Err: text(c.lab.Heal(ctx))})
	case "break":
		c.reply(Reply{Err: text(c.lab.Incident(ctx, req.Signal))})
	case "status":
		c.reply(Reply{Status: c.lab.Status()})
	case "down":
		c.reply(Reply{})
		c.lab.last.Store(c.detach()) // closes with the process
		c.down()
	default:
		c.reply(Reply{Err: fmt.Sprintf("lab: unknown request %q", req.Op)})
	}
}

// detach returns a second descriptor of the connection, which stays open when
// the first is closed.
func (c *controlConn) detach() *os.File {
	f, err := c.conn.File()
	if err != nil {
		return nil // they will only think that all is over a little early
	}
	return f
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// checkPeer admits our own user only.
func (c *controlConn) checkPeer() error {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return fmt.Errorf("lab: asking who is there: %w", errors.Join(cerr, err))
	}
	if int(cred.Uid) != os.Geteuid() {
		return errors.New("lab: this lab belongs to another user")
	}
	return nil
}

// readRequest reads the first line of a connection and the descriptors that
// come with it. rest is what was read beyond the line.
func readRequest(conn *net.UnixConn) (req Request, rest []byte, files []*os.File, err error) {
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	defer func() { _ = conn.SetReadDeadline(time.Time{}) }()
	var line []byte
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(3*4))
	for len(line) < 4<<20 {
		n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
		if oobn > 0 {
			files = append(files, received(oob[:oobn])...)
		}
		line = append(line, buf[:n]...)
		if head, tail, ok := strings.Cut(string(line), "\n"); ok {
			err := json.Unmarshal([]byte(head), &req)
			return req, []byte(tail), files, err
		}
		if err != nil {
			return req, nil, files, fmt.Errorf("lab: reading a request: %w", err)
		}
	}
	return req, nil, files, errors.New("lab: request too large")
}

// received makes files of the descriptors in a control message.
func received(oob []byte) []*os.File {
	var files []*os.File
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

// exec runs a program with the caller's own stdin, stdout and stderr. It ends
// with the caller.
func (c *controlConn) exec(ctx context.Context, req Request, rest []byte, files []*os.File) {
	if len(files) != 3 || len(req.Args) == 0 {
		c.reply(Reply{Err: "lab: exec needs a command and three descriptors"})
		return
	}
	p, err := c.lab.Exec(req.Target, exec.Spec{
		Path: req.Args[0], Args: req.Args[1:], Env: ownEnv(req.Env), Dir: workDir(req.Dir),
		Stdin: files[0], Stdout: files[1], Stderr: files[2], OwnGroup: true,
	})
	if err != nil {
		r := Reply{Err: err.Error(), NotFound: errors.Is(err, fs.ErrNotExist)}
		if r.NotFound {
			r.Err = fmt.Sprintf("%s: not found in %s", req.Args[0], req.Target)
		}
		c.reply(r)
		return
	}
	for _, f := range files {
		f.Close() // or a reader at the other end would wait for us
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		lines := json.NewDecoder(io.MultiReader(strings.NewReader(string(rest)), bufio.NewReader(c.conn)))
		for {
			var r Request
			if lines.Decode(&r) != nil {
				return
			}
			if r.Op == "signal" {
				signalGroup(p, syscall.Signal(r.Signal))
			}
		}
	}()
	select {
	case <-p.Done():
	case <-gone:
		_ = p.Kill()
	case <-ctx.Done():
		_ = p.Kill()
	}
	err = p.Wait()
	code := p.ExitCode()
	if failed := (*exec.Error)(nil); errors.As(err, &failed) {
		if sig, ok := failed.Signal.(syscall.Signal); ok {
			code = 128 + int(sig)
		}
	}
	c.reply(Reply{Exited: true, Code: code})
}

// ownEnv drops what belongs to a sandbox: the asker's is not ours.
func ownEnv(env []string) []string {
	var out []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if name != "KPTRACE_SANDBOX" && name != "XTABLES_LOCKFILE" && name != "KPTRACE_SOCKET" {
			out = append(out, kv)
		}
	}
	return out
}

// Status describes the lab.
func (l *Lab) Status() *Status {
	s := &Status{Dir: l.cfg.Dir, Started: l.started}
	for i := range l.cluster.Nodes {
		n := &l.cluster.Nodes[i]
		s.Nodes = append(s.Nodes, NodeStatus{Name: n.Name, Addr: n.Addr.String(), Socket: l.NodeSocket(n.Name)})
	}
	for i := range l.cluster.Pods {
		p := &l.cluster.Pods[i]
		s.Pods = append(s.Pods, PodStatus{Namespace: p.Namespace, Name: p.Name, Node: p.Node,
			Addr: p.Addr.String(), Faults: l.Faults(p.ID())})
	}
	return s
}
