//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/lab"
)

// TestCausesBesideUpstream is TestCauses of cmd/kptrace beside upstream kube-proxy,
// in iptables mode of both flavours and in nftables mode. Three labs have the same
// incident at the same time and share an API server. Some alone:
// KPTRACE_INCIDENTS=docker,route.
func TestCausesBesideUpstream(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16", RBAC: true})
	sites := []*site{
		{mode: "iptables", flavour: xtables.NFT},
		{mode: "iptables", flavour: xtables.Legacy},
		{mode: "nftables", flavour: xtables.NFT},
	}
	told := meeting{all: len(sites), do: func() error {
		err := sites[0].publish(t.Context(), c)
		time.Sleep(time.Second) // so that it has been heard
		return err
	}}
	for i, s := range sites {
		s.open(t, told.come)
		if i == 0 {
			publish(t, s, c)
		}
		s.run(t, c)
	}
	defer func() {
		for _, s := range sites {
			t.Log(s.matrix.String())
		}
	}()
	const calm = time.Second // what began before may belong to the last one
	var after time.Duration  // of the incident before
	for n, in := range lab.Incidents() {
		if only := os.Getenv("KPTRACE_INCIDENTS"); in.Reason == "" || in.Userspace ||
			only != "" && !strings.Contains(","+only+",", ","+in.Name+",") {
			continue
		}
		together(t, sites, func(s *site) error { return s.lab.Heal(t.Context()) })
		publish(t, sites[0], c)
		together(t, sites, (*site).followed)
		if in.Once {
			time.Sleep(after + calm)
		}
		began := time.Now()
		time.Sleep(in.UnderWay)
		together(t, sites, func(s *site) error {
			if !s.meets(&in) {
				return nil
			}
			return s.lab.Incident(t.Context(), n+1)
		})
		if !in.Once {
			began = time.Now().Add(after + calm)
		}
		after = in.After
		together(t, sites, func(s *site) error {
			if !s.meets(&in) {
				return nil
			}
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(500 * time.Millisecond) {
				list, err := s.explained(in.Service, began)
				if err != nil {
					return err
				}
				if row := in.Judge(list); row.Enough() || time.Now().After(deadline) {
					s.matrix.Rows = append(s.matrix.Rows, row)
					return nil
				}
			}
		})
	}
	together(t, sites, func(s *site) error { return s.lab.Heal(t.Context()) })
	publish(t, sites[0], c)
	together(t, sites, (*site).followed)
	since := time.Now().Add(6 * time.Second) // what hung before has ended
	time.Sleep(time.Until(since.Add(5 * time.Second)))
	for _, s := range sites {
		var all []lab.Explained
		for _, name := range []string{"foo", "sticky", "front", "dns"} {
			list, err := s.explained(name, since)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, list...)
		}
		s.matrix.Rows = append(s.matrix.Rows, (&lab.Incident{}).Judge(all))
		for _, wrong := range s.matrix.Wrong() {
			t.Errorf("%s: %s", s.matrix.Setup, wrong)
		}
	}
}

// site is a lab whose node has upstream's kube-proxy and an agent.
type site struct {
	mode    string
	flavour xtables.Flavour
	lab     *lab.Lab
	proxy   *exec.Process
	matrix  lab.Matrix
}

// meeting is where all sites come to before something is done once, for all.
type meeting struct {
	all int
	do  func() error

	mu   sync.Mutex
	here int
	done chan struct{}
	err  error
}

// come returns when all have come and it is done.
func (m *meeting) come(ctx context.Context) error {
	m.mu.Lock()
	if m.here == 0 {
		m.done = make(chan struct{})
	}
	m.here++
	done := m.done
	if m.here == m.all {
		m.here, m.err = 0, m.do()
		close(done)
	}
	m.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Minute):
		return errors.New("not all sites have come so far")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// meets reports whether an incident happens at the site.
func (s *site) meets(in *lab.Incident) bool {
	return !in.RulesOf || s.mode == "iptables"
}

// together does something at all sites at once.
func together(t *testing.T, sites []*site, f func(*site) error) {
	t.Helper()
	errs := make([]error, len(sites))
	var wait sync.WaitGroup
	for i, s := range sites {
		wait.Go(func() {
			if err := f(s); err != nil {
				errs[i] = fmt.Errorf("%s, %s: %w", s.mode, s.flavour, err)
			}
		})
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// open makes the lab. Its incidents that change manifests call edited then.
func (s *site) open(t *testing.T, edited func(context.Context) error) {
	t.Helper()
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		t.Fatal(err)
	}
	s.matrix.Setup = "beside upstream, " + s.mode + ", " + s.flavour.String()
	s.lab, err = lab.Start(t.Context(), lab.Config{
		Scenario: lab.IncidentScenario, SocketDir: t.TempDir(), Self: []string{binary}, NoProxy: true,
		ProxyArgs: []string{"--iptables-flavour", s.flavour.String()},
		Edited:    edited, SignalProxy: func(sig syscall.Signal) error { return s.proxy.Signal(sig) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.lab.Close)
}

// run starts kube-proxy, the agent, and traffic.
func (s *site) run(t *testing.T, c *cluster) {
	t.Helper()
	node := s.lab.Netns(lab.NodeSpace(nodeName))
	stop, err := c.Forward(node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	s.proxy = startUpstream(t, c, node, s.flavour, "--proxy-mode="+s.mode)
	t.Cleanup(func() { _ = s.proxy.Signal(syscall.SIGCONT) })
	eventually(t, "the rules of kube-proxy", s.followed)
	out := &log{}
	agent, err := s.lab.Exec(lab.NodeSpace(nodeName), exec.Spec{
		Path: "kptrace", OwnGroup: true, Stdout: out, Stderr: out,
		Args: []string{
			"agent", "--kubeconfig=" + c.Kubeconfig(controlplane.KubeProxy), "--node=" + nodeName,
			"--iptables-flavour=" + s.flavour.String(), "--socket=" + s.lab.NodeSocket(nodeName),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kptrace agent said:\n%s", out)
		}
		end(t, agent)
	})
	eventually(t, "the agent", func() error {
		_, err := s.explained("foo", time.Now())
		return err
	})
	if err := s.lab.StartTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// explained asks the agent.
func (s *site) explained(service string, since time.Time) ([]lab.Explained, error) {
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		return nil, err
	}
	out, err := output(exec.Spec{Path: binary, Args: []string{
		"follow", "svc/" + service, "-n", namespace, "--since", since.Format(time.RFC3339Nano), "--for", "0s", "-o", "jsonl",
		"--socket", s.lab.NodeSocket(nodeName),
	}})
	if err != nil {
		return nil, err
	}
	return lab.ReadExplained(out)
}

// output runs a program for 20 s at most.
func output(spec exec.Spec) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	res, err := exec.Run(ctx, spec)
	return string(res.Stdout), err
}

// followed waits until the rules of kube-proxy lead to all endpoints of foo.
func (s *site) followed() error {
	spec := exec.Spec{Path: "iptables-" + s.flavour.String() + "-save", Args: []string{"-t", "nat"}, Netns: s.lab.Netns(lab.NodeSpace(nodeName)).Fd()}
	if s.mode == "nftables" {
		spec.Path, spec.Args = "nft", []string{"list", "table", "ip", "kube-proxy"}
	}
	return retry(context.Background(), 30*time.Second, func() error {
		out, err := output(spec)
		if err != nil {
			return err
		}
		if s.mode == "nftables" { // all are in one rule
			_, out, _ = strings.Cut(out, "-shop/foo/tcp/http {")
			out, _, _ = strings.Cut(out, "}\n")
		}
		for _, addr := range []string{"10.244.1.21", "10.244.1.22", "10.244.1.23"} {
			found := false
			for line := range strings.Lines(out) {
				found = found || (s.mode == "nftables" || strings.Contains(line, "shop/foo")) && strings.Contains(line, addr)
			}
			if !found {
				return fmt.Errorf("kube-proxy does not lead to %s:\n%s", addr, out)
			}
		}
		return nil
	})
}

// publish brings the lab's manifests to the API server.
func publish(t *testing.T, s *site, c *cluster) {
	t.Helper()
	if err := s.publish(t.Context(), c); err != nil {
		t.Fatal(err)
	}
}

func (s *site) publish(ctx context.Context, c *cluster) error {
	b, err := os.ReadFile(filepath.Join(s.lab.Dir(), "shop.yaml"))
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	for _, text := range strings.Split(string(b), "\n---\n") {
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(text), nil, nil)
		if err != nil {
			return fmt.Errorf("%w:\n%s", err, text)
		}
		switch o := o.(type) {
		case *corev1.Node:
			err = publishNode(ctx, c, o)
		case *corev1.Service:
			err = publishService(ctx, c, o)
		case *discoveryv1.EndpointSlice:
			slices := c.client.DiscoveryV1().EndpointSlices(namespace)
			if _, err = slices.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
				_, err = slices.Update(ctx, o, metav1.UpdateOptions{})
			}
		}
		if err != nil {
			return fmt.Errorf("%w:\n%s", err, text)
		}
	}
	return nil
}

func publishNode(ctx context.Context, c *cluster, o *corev1.Node) error {
	made, err := c.client.CoreV1().Nodes().Create(ctx, o, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	if err == nil {
		made.Status = o.Status
		_, err = c.client.CoreV1().Nodes().UpdateStatus(ctx, made, metav1.UpdateOptions{})
	}
	return err
}

func publishService(ctx context.Context, c *cluster, o *corev1.Service) error {
	services := c.client.CoreV1().Services(namespace)
	old, err := services.Get(ctx, o.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return createService(ctx, c.client, o)
	}
	if err == nil {
		o.ResourceVersion = old.ResourceVersion
		_, err = services.Update(ctx, o, metav1.UpdateOptions{})
	}
	return err
}
