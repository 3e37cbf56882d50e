// Package apiserver follows a Kubernetes API server and makes Snapshots of what
// it says, for one node.
//
// What it watches: Services without the label
// service.kubernetes.io/service-proxy-name, EndpointSlices without the label
// service.kubernetes.io/headless, its own Node, ServiceCIDRs, and, where access
// rules allow it, Pods and all Nodes for their names. Without those, names come
// from what EndpointSlices say of their endpoints, and Notes says so.
//
// Nothing is emitted before Services and EndpointSlices are known in full. When
// the API server goes away the last Snapshot stays in force; when it comes back
// nothing is emitted unless something is different. The work per change is that
// of the Services it touches.
package apiserver

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// The defaults of a Config.
const (
	// DefaultQPS is kube-proxy's limit of requests per second.
	DefaultQPS = 5
	// DefaultBurst is kube-proxy's limit of requests at once.
	DefaultBurst = 10
	// DefaultContentType is what the API server is asked to send.
	DefaultContentType = "application/vnd.kubernetes.protobuf"
)

// Config says which API server to follow, and for whom.
type Config struct {
	// Kubeconfig is a file that says how to reach the API server, Master its
	// URL where that is another. If both are empty, the service account of
	// the pod that this runs in is used.
	Kubeconfig, Master string
	// NodeName is the name of the node to make Snapshots for.
	NodeName string
	// QPS and Burst limit requests to the API server; zero means the default.
	QPS   float32
	Burst int
	// ContentType is what the API server is asked to send: DefaultContentType
	// if empty.
	ContentType string
	// UserAgent is how the API server is told who asks.
	UserAgent string
	// Settle is how long a burst of changes may still go on before a Snapshot
	// is made: 20 ms if zero. Changes that go on for ten times as long are
	// emitted meanwhile.
	Settle time.Duration
	// NodeWait bounds the wait for the own Node's addresses at the start: 30 s
	// if zero, as kube-proxy waits.
	NodeWait time.Duration
	Logger   *slog.Logger

	// client, in tests, stands for an API server.
	client kubernetes.Interface
	// retry, in tests, is the longest wait between two tries.
	retry time.Duration
}

// ErrNoConfig is what errors of New wrap if there is nothing that says how to
// reach an API server.
var ErrNoConfig = errors.New("no kubeconfig is given and this is not a pod with a service account")

// RESTConfig says how to reach the API server. It starts nothing.
func (c *Config) RESTConfig() (*rest.Config, error) {
	var cfg *rest.Config
	var err error
	if c.Kubeconfig == "" && c.Master == "" {
		if cfg, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) {
			err = ErrNoConfig
		}
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags(c.Master, c.Kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("apiserver: finding out how to reach it: %w", err)
	}
	if cfg.QPS = c.QPS; cfg.QPS == 0 {
		cfg.QPS = DefaultQPS
	}
	if cfg.Burst = c.Burst; cfg.Burst == 0 {
		cfg.Burst = DefaultBurst
	}
	if cfg.ContentType = c.ContentType; cfg.ContentType == "" {
		cfg.ContentType = DefaultContentType
	}
	cfg.AcceptContentTypes = cfg.ContentType
	if cfg.ContentType != "application/json" {
		cfg.AcceptContentTypes += ",application/json"
	}
	if c.UserAgent != "" {
		cfg.UserAgent = c.UserAgent
	}
	cfg.WarningHandler = rest.NoWarnings{}
	return cfg, nil
}
