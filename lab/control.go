package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// ErrNoLab says that no lab runs.
var ErrNoLab = errors.New("no lab runs here: start one with `kptrace lab up`")

// ControlPath is where the lab whose sockets are in dir takes requests. It
// does not end in .sock: it is no node.
func ControlPath(dir string) string { return filepath.Join(dir, "control") }

// Request is a line to a running lab. With Op exec it comes with three
// descriptors (SCM_RIGHTS): stdin, stdout, stderr.
type Request struct {
	// Op is exec, fault, incident, break, heal, status or down; after an exec,
	// signal.
	Op string `json:"op"`
	// Target is what Lab.Exec or Lab.Fault takes, in full.
	Target string   `json:"target,omitempty"`
	Args   []string `json:"args,omitempty"`
	Env    []string `json:"env,omitempty"`
	Dir    string   `json:"dir,omitempty"`
	// Fault and Delay are for Lab.Fault.
	Fault string        `json:"fault,omitempty"`
	Delay time.Duration `json:"delay,omitempty"`
	// Signal is sent to the program that this connection started; for break it is
	// the number of an incident.
	Signal int `json:"signal,omitempty"`
}

// Reply is a line from a running lab.
type Reply struct {
	// Err is why the request failed; NotFound says that its program is absent.
	Err      string `json:"err,omitempty"`
	NotFound bool   `json:"notFound,omitempty"`
	// Exited says that the program of an exec ended, with Code: 128+N if
	// signal N ended it.
	Exited bool `json:"exited,omitempty"`
	Code   int  `json:"code,omitempty"`
	// Incident is the number of the incident that happened.
	Incident int `json:"incident,omitempty"`
	// Mode is the mode of the nodes' proxies, beside Incident.
	Mode   proxy.Mode `json:"mode,omitempty"`
	Status *Status    `json:"status,omitempty"`
}

// Status is what a lab says of itself.
type Status struct {
	// Dir is the folder of manifests.
	Dir     string       `json:"dir"`
	Started time.Time    `json:"started"`
	Nodes   []NodeStatus `json:"nodes"`
	Pods    []PodStatus  `json:"pods"`
}

// NodeStatus is a node of a running lab.
type NodeStatus struct {
	Name   string `json:"name"`
	Addr   string `json:"addr"`
	Socket string `json:"socket"`
}

// PodStatus is a pod or outside client of a running lab.
type PodStatus struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Node is empty for outside clients.
	Node   string   `json:"node,omitempty"`
	Addr   string   `json:"addr"`
	Faults []string `json:"faults,omitempty"`
}

// ParseTarget reads "pod/web", "web", "pod/shop/web" or "node/node1" into
// what Lab.Exec takes; a pod without a namespace is in the one given.
func ParseTarget(s, namespace string) (string, error) {
	kind, name, ok := strings.Cut(s, "/")
	if !ok {
		kind, name = "pod", s
	}
	switch kind {
	case "pod", "pods", "po":
		if name != "" && !strings.Contains(name, "/") {
			return PodSpace(namespace, name), nil
		}
		if ns, pod, ok := strings.Cut(name, "/"); ok && ns != "" && pod != "" && !strings.Contains(pod, "/") {
			return PodSpace(ns, pod), nil
		}
	case "node", "nodes", "no":
		if name != "" && !strings.Contains(name, "/") {
			return NodeSpace(name), nil
		}
	}
	return "", fmt.Errorf("%q is no target: use pod/NAME with -n NAMESPACE, or node/NAME", s)
}

// workDir finds a folder that exists for a program that another process asked
// for: dir, or the root.
func workDir(dir string) string {
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return dir
	}
	return "/"
}
