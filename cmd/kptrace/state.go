package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	eventsv1 "k8s.io/client-go/kubernetes/typed/events/v1"

	"github.com/kptrace/kptrace/kube/events"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube/apiserver"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
)

// nodeName returns the name of this node: the one given or the host's, in
// lower case as kube-proxy has it.
func nodeName(given string) (string, error) {
	name := given
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return "", fmt.Errorf("finding the host's name: %w: give it by --node", err)
		}
		name = host
	}
	if name = strings.ToLower(strings.TrimSpace(name)); name == "" {
		return "", usageErr(errors.New("the node's name is empty: give it by --node"))
	}
	return name, nil
}

// state is where a proxy's state comes from.
type state struct {
	from  string
	run   func(ctx context.Context, emit func(*proxy.Snapshot)) error
	load  func(context.Context) (*proxy.Snapshot, error)
	notes func() []string
	// events writes Kubernetes Events; nil without an API server.
	events *events.Recorder
}

// openState finds where state comes from: the folder if one is given, else the
// API server that cfg says, else that of the pod this runs in.
func openState(folder string, cfg apiserver.Config) (*state, error) {
	server := cfg.Kubeconfig != "" || cfg.Master != ""
	switch {
	case folder != "" && server:
		return nil, usageErr(errors.New("--manifests and --kubeconfig or --master are two places to take state from: give one"))
	case folder != "":
		w := manifests.New(manifests.Config{Dir: folder, Node: cfg.NodeName, Logger: cfg.Logger})
		return &state{
			from: "manifests " + folder, run: w.Run,
			load: func(context.Context) (*proxy.Snapshot, error) { return w.Load() },
		}, nil
	case !server && os.Getenv("KUBERNETES_SERVICE_HOST") == "":
		return nil, usageErr(errors.New("say where Services come from: --manifests DIR for a folder, --kubeconfig FILE for an API server; in a pod, its service account is used"))
	}
	cfg.UserAgent = "kptrace/" + version
	w, err := apiserver.New(cfg)
	if err != nil {
		return nil, usageErr(err)
	}
	rec, err := newRecorder(cfg, w)
	if err != nil {
		return nil, usageErr(err)
	}
	return &state{from: w.Source(), run: w.Run, load: w.Load, notes: w.Notes, events: rec}, nil
}

// newRecorder makes the writer of Events, with a client of its own: they are
// not to use up the requests of what Services need.
func newRecorder(cfg apiserver.Config, w *apiserver.Watcher) (*events.Recorder, error) {
	rest, err := cfg.RESTConfig()
	if err != nil {
		return nil, err
	}
	client, err := eventsv1.NewForConfig(rest)
	if err != nil {
		return nil, fmt.Errorf("reading how to reach the API server: %w", err)
	}
	return events.New(events.Config{
		Client: client, Controller: "kube-proxy", Instance: cfg.NodeName, UID: w.UID, Logger: cfg.Logger,
	}), nil
}
