//go:build e2e

package e2e

import (
	"context"
	"os"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
)

func TestMain(m *testing.M) {
	umlguest.Init()
	netns.Main(m)
}

// binEnv says where scripts/controlplane.sh has put the programs.
const binEnv = "KPTRACE_CONTROLPLANE"

// cluster is a control plane with a client that may do everything.
type cluster struct {
	*controlplane.Cluster
	client *kubernetes.Clientset
	bin    string
}

// start runs a control plane for one test.
func start(t *testing.T, cfg controlplane.Config) *cluster {
	t.Helper()
	c := &cluster{bin: os.Getenv(binEnv)}
	if c.bin == "" {
		t.Fatalf("%s is not set: run these tests by `make e2e`", binEnv)
	}
	cfg.Bin, cfg.Dir = c.bin, t.TempDir()
	began := time.Now()
	var err error
	if c.Cluster, err = controlplane.Start(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kube-apiserver said last:\n%s", c.Log("kube-apiserver"))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	t.Logf("control plane ready after %v", time.Since(began).Round(10*time.Millisecond))
	if c.client, err = kubernetes.NewForConfig(config(t, c.Kubeconfig(controlplane.Admin))); err != nil {
		t.Fatal(err)
	}
	// The API server makes these itself, shortly after it says that it is ready.
	eventually(t, "namespace default and its Service", func() error {
		if _, err := c.client.CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{}); err != nil {
			return err
		}
		_, err := c.client.CoreV1().Services("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
		return err
	})
	return c
}

func config(t *testing.T, kubeconfig string) *rest.Config {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1                           // no limit
	cfg.WarningHandler = rest.NoWarnings{} // externalIPs are deprecated, and here to stay
	return cfg
}

// eventually fails the test with the last error if f still fails after 30 s.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	patience := 30 * time.Second
	if umlguest.Inside() {
		patience = 3 * time.Minute
	}
	if err := retry(t.Context(), patience, f); err != nil {
		t.Fatalf("waiting for %s: %v", what, err)
	}
}

// retry calls f until it succeeds or the time is over, and returns its last
// error.
func retry(ctx context.Context, within time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}
