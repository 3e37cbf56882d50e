package controlplane

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// readyTimeout is how long both programs together may take to be ready, which
// is 4 s on an idle machine; stopTimeout how long each may take to end.
const (
	readyTimeout = 90 * time.Second
	stopTimeout  = 10 * time.Second
)

// Cluster is a running control plane.
type Cluster struct {
	cfg   Config
	addr  netip.AddrPort // of the API server
	etcd  netip.AddrPort
	token string
	http  *http.Client

	etcdProc, apiProc *exec.Process
}

// Start runs a control plane and returns when it is ready. What it started is
// gone when it fails; the error then ends with what the programs said last.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	if cfg.ServiceRange == "" {
		cfg.ServiceRange = "10.96.0.0/16"
	}
	c := &Cluster{cfg: cfg}
	ports, err := freePorts(3)
	if err != nil {
		return nil, fmt.Errorf("controlplane: finding free ports: %w", err)
	}
	c.addr, c.etcd = ports[0], ports[1]
	ca, err := writeKeys(cfg.Dir)
	if err == nil {
		err = c.writeUsers(c.path("ca.crt"))
	}
	if err != nil {
		return nil, fmt.Errorf("controlplane: writing keys: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	c.http = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true,
	}}
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, errors.New("not ready in time"))
	defer cancel()
	if err := c.startEtcd(ctx, ports[2]); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	if err := c.StartAPI(ctx); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

// URL is where the API server listens.
func (c *Cluster) URL() string { return "https://" + c.addr.String() }

// Kubeconfig is a file with which programs reach the API server as user.
func (c *Cluster) Kubeconfig(user User) string {
	return c.path(strings.TrimPrefix(string(user), "system:") + ".kubeconfig")
}

// Log returns the last lines of what a program, "etcd" or "kube-apiserver", has
// written, at most 4 KiB.
func (c *Cluster) Log(program string) string {
	text, _ := os.ReadFile(c.path(program + ".log")) // none is nothing to show
	if len(text) > 4096 {
		text = text[len(text)-4096:]
		text = text[bytes.IndexByte(text, '\n')+1:]
	}
	return string(text)
}

// Stop ends both programs and waits for them. It may be called again.
func (c *Cluster) Stop() error {
	err := c.StopAPI()
	return errors.Join(err, end(c.etcdProc))
}

// StopAPI ends the API server alone, as an upgrade or a crash would; its data
// stay in etcd.
func (c *Cluster) StopAPI() error { return end(c.apiProc) }

// StartAPI starts the API server again at the same address and waits until it
// is ready.
func (c *Cluster) StartAPI(ctx context.Context) error {
	mode := "AlwaysAllow"
	if c.cfg.RBAC {
		mode = "RBAC"
	}
	var err error
	c.apiProc, err = c.start("kube-apiserver",
		"--etcd-servers=http://"+c.etcd.String(),
		"--bind-address="+c.addr.Addr().String(), "--advertise-address="+c.addr.Addr().String(),
		fmt.Sprintf("--secure-port=%d", c.addr.Port()),
		"--tls-cert-file="+c.path("server.crt"), "--tls-private-key-file="+c.path("server.key"),
		"--client-ca-file="+c.path("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"),
		"--token-auth-file="+c.path("tokens.csv"), "--authorization-mode="+mode,
		"--service-cluster-ip-range="+c.cfg.ServiceRange,
		"--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount",
		"--enable-priority-and-fairness=false", "--max-requests-inflight=0", "--max-mutating-requests-inflight=0",
		"--shutdown-delay-duration=0s",
	)
	if err != nil {
		return err
	}
	return c.ready(ctx, c.apiProc, "kube-apiserver", c.URL()+"/readyz")
}

func (c *Cluster) startEtcd(ctx context.Context, peer netip.AddrPort) error {
	var err error
	client, peers := "http://"+c.etcd.String(), "http://"+peer.String()
	c.etcdProc, err = c.start("etcd", "--data-dir", c.path("etcd"),
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "default="+peers,
		"--unsafe-no-fsync", "--log-level", "warn")
	if err != nil {
		return err
	}
	return c.ready(ctx, c.etcdProc, "etcd", client+"/health")
}

func (c *Cluster) path(name string) string { return filepath.Join(c.cfg.Dir, name) }

// start runs a program with its output appended to its log.
func (c *Cluster) start(name string, args ...string) (*exec.Process, error) {
	log, err := os.OpenFile(c.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("controlplane: %w", err)
	}
	defer log.Close()
	p, err := exec.Start(exec.Spec{Path: filepath.Join(c.cfg.Bin, name), Args: args, Dir: c.cfg.Dir,
		Stdout: log, Stderr: log, OwnGroup: true})
	if err != nil {
		return nil, fmt.Errorf("controlplane: starting %s: %w", name, err)
	}
	return p, nil
}

// ready waits until url answers with 200.
func (c *Cluster) ready(ctx context.Context, p *exec.Process, name, url string) error {
	var last error
	for {
		if last = c.probe(ctx, url); last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("controlplane: waiting for %s: %w: %w\n%s", name, context.Cause(ctx), last, c.Log(name))
		case <-p.Done():
			return fmt.Errorf("controlplane: %s ended: %w\n%s", name, p.Wait(), c.Log(name))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Cluster) probe(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusOK {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, 2048))
	return errors.Join(fmt.Errorf("%s: %s", res.Status, body), err)
}

// end asks a program to end and kills it if it does not.
func end(p *exec.Process) error {
	if p == nil {
		return nil
	}
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("controlplane: ending a program: %w", err)
	}
	select {
	case <-p.Done():
		return nil
	case <-time.After(stopTimeout):
	}
	err := p.Kill()
	<-p.Done()
	return err
}

// freePorts finds n free ports on loopback.
func freePorts(n int) ([]netip.AddrPort, error) {
	var ports []netip.AddrPort
	for range n {
		l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, err
		}
		// All are held until the end, or the same one came twice.
		defer l.Close()
		at := l.Addr().(*net.TCPAddr).AddrPort()
		ports = append(ports, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
	}
	return ports, nil
}
