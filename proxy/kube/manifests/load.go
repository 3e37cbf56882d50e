// Package manifests reads a proxy.Snapshot from a folder of Kubernetes YAML
// files, without a cluster, and follows its changes.
//
// A file that cannot be read or parsed is a Problem; while it stays broken its
// last good contents stay in force, so that a slip in an editor takes no
// Service down.
package manifests

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	sigsjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

// Load reads every .yaml, .yml and .json file in dir, not its sub-folders. The
// error says that the folder itself cannot be read; faults of files and
// objects are Problems.
func Load(dir string) (*kube.Objects, []proxy.Problem, error) {
	var l loader
	return l.load(dir)
}

// loader remembers each file's last good contents.
type loader struct {
	files map[string]*file
}

type file struct {
	raw      []byte
	good     []object
	problems []proxy.Problem
}

// object is one document: one of the four kinds, and its key.
type object struct {
	key  string
	kind any
}

func (l *loader) load(dir string) (*kube.Objects, []proxy.Problem, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("manifests: reading the folder: %w", err)
	}
	files := map[string]*file{}
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() || strings.HasPrefix(name, ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone since the listing
		}
		old := l.files[name]
		switch {
		case err != nil:
			files[name] = broken(old, name, err)
		case old != nil && bytes.Equal(old.raw, raw):
			files[name] = old
		default:
			good, problems, err := parse(name, raw)
			if err != nil {
				files[name] = broken(old, name, err)
				files[name].raw = raw
				break
			}
			files[name] = &file{raw: raw, good: good, problems: problems}
		}
	}
	l.files = files
	return l.collect()
}

func broken(old *file, name string, err error) *file {
	f := &file{problems: []proxy.Problem{{File: name, Message: err.Error()}}}
	if old != nil && len(old.good) > 0 {
		f.good = old.good
		f.problems[0].Message += "; its last good contents stay in force"
	}
	return f
}

func (l *loader) collect() (*kube.Objects, []proxy.Problem, error) {
	names := make([]string, 0, len(l.files))
	for name := range l.files {
		names = append(names, name)
	}
	slices.Sort(names)
	o := &kube.Objects{Origin: map[string]string{}}
	var problems []proxy.Problem
	for _, name := range names {
		problems = append(problems, l.files[name].problems...)
		for _, obj := range l.files[name].good {
			if _, twice := o.Origin[obj.key]; !twice {
				o.Origin[obj.key] = name
			}
			switch v := obj.kind.(type) {
			case *corev1.Service:
				o.Services = append(o.Services, *v)
			case *discoveryv1.EndpointSlice:
				o.Slices = append(o.Slices, *v)
			case *corev1.Pod:
				o.Pods = append(o.Pods, *v)
			case *corev1.Node:
				o.Nodes = append(o.Nodes, *v)
			}
		}
	}
	return o, problems, nil
}

// parse splits a file into documents and decodes those of the four kinds;
// other kinds are left alone. The error is about the file as a whole. A
// document with an unknown or ill-typed field is used as far as it goes if
// lenient decoding takes it, and left out otherwise; either is a problem.
func parse(name string, raw []byte) ([]object, []proxy.Problem, error) {
	var objects []object
	var problems []proxy.Problem
	docs := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(raw)))
	defer docs.Close()
	buf := make([]byte, len(raw)+1)
	for i := 1; ; i++ {
		n, err := docs.Read(buf)
		if errors.Is(err, io.EOF) {
			return objects, problems, nil
		}
		if err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", i, err)
		}
		doc := buf[:n]
		var head metav1.PartialObjectMetadata
		if err := yaml.Unmarshal(doc, &head); err != nil {
			return nil, nil, fmt.Errorf("document %d: %s", i, tidy(err))
		}
		kind := target(head.Kind, head.APIVersion)
		if kind == nil {
			if want := meant(head.Kind, head.APIVersion); want != "" {
				problems = append(problems, proxy.Problem{File: name, Object: head.Kind + " " + head.Name, Field: "apiVersion",
					Message: fmt.Sprintf("a %s of %q is not read: %s is", head.Kind, head.APIVersion, want)})
			}
			continue
		}
		title := head.Kind + " " + head.Name
		if head.Kind != "Node" {
			if head.Namespace == "" {
				head.Namespace = metav1.NamespaceDefault
			}
			title = head.Kind + " " + head.Namespace + "/" + head.Name
		}
		problem := func(field, message string) {
			problems = append(problems, proxy.Problem{File: name, Object: title, Field: field, Message: message})
		}
		if head.Name == "" {
			problem("metadata.name", "is empty")
			continue
		}
		asJSON, err := yaml.YAMLToJSONStrict(doc)
		if err != nil {
			return nil, nil, fmt.Errorf("document %d: %s", i, tidy(err))
		}
		strict, err := sigsjson.UnmarshalStrict(asJSON, kind)
		if err != nil {
			problem(field(err), tidy(err))
			continue
		}
		for _, err := range strict {
			problem(field(err), tidy(err)+"; the rest of the object is used")
		}
		if m, ok := kind.(metav1.Object); ok && head.Kind != "Node" {
			m.SetNamespace(head.Namespace)
		}
		objects = append(objects, object{key: kube.Key(head.Kind, head.Namespace, head.Name), kind: kind})
	}
}

func target(kind, apiVersion string) any {
	switch apiVersion + "/" + kind {
	case "v1/Service":
		return &corev1.Service{}
	case "discovery.k8s.io/v1/EndpointSlice":
		return &discoveryv1.EndpointSlice{}
	case "v1/Pod":
		return &corev1.Pod{}
	case "v1/Node":
		return &corev1.Node{}
	}
	return nil
}

// meant is the apiVersion of a kind that is read, where another one of the same group
// is given or none; else empty.
func meant(kind, apiVersion string) string {
	switch kind {
	case "Service", "Pod", "Node":
		if !strings.Contains(apiVersion, "/") {
			return "v1"
		}
	case "EndpointSlice":
		if group, _, _ := strings.Cut(apiVersion, "/"); group == "discovery.k8s.io" || !strings.Contains(apiVersion, "/") {
			return "discovery.k8s.io/v1"
		}
	}
	return ""
}

// tidy cuts the wrapping that the YAML and JSON libraries put before a fault.
func tidy(err error) string {
	s := err.Error()
	for _, prefix := range []string{"error unmarshaling JSON: ", "while decoding JSON: ", "error converting YAML to JSON: ", "yaml: ", "json: "} {
		s = strings.TrimPrefix(s, prefix)
	}
	return strings.ReplaceAll(s, "\n", " ")
}

// field finds the field's path in a decoding error, empty if it names none.
func field(err error) string {
	s := err.Error()
	for _, mark := range []string{"unknown field \"", "struct field "} {
		if _, rest, ok := strings.Cut(s, mark); ok {
			f := strings.FieldsFunc(rest, func(r rune) bool { return r == '"' || r == ' ' })[0]
			// "ServiceSpec.spec.ports.port": the type's name is noise.
			if head, tail, ok := strings.Cut(f, "."); ok && head != "" && head[0] >= 'A' && head[0] <= 'Z' {
				f = tail
			}
			return f
		}
	}
	return ""
}
