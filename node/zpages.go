package node

import (
	"encoding/json"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// component is how the pages that kube-proxy has are headed here too.
const component = "kube-proxy"

// zpage is a page that says something of the process, for people as text and
// for programs as a JSON object of the group config.k8s.io (KEP-4827, KEP-4828).
type zpage struct {
	kind string // "Flagz" or "Statusz"
	// write writes the text, add adds to the object.
	write func(*strings.Builder)
	add   func(object map[string]any)
}

// zversions are the versions that can be asked for, and whether they are
// deprecated.
func zversions() map[string]bool { return map[string]bool{"v1beta1": false, "v1alpha1": true} }

// ServeHTTP answers by the Accept header, as kube-proxy 1.36 does: text unless
// application/json;v=v1beta1;g=config.k8s.io;as=KIND is preferred, 406 for
// anything else.
func (p *zpage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	version, ok := p.accept(r.Header.Get("Accept"))
	switch {
	case !ok:
		http.Error(w, fmt.Sprintf("only text/plain, and application/json;v=v1beta1;g=config.k8s.io;as=%s", p.kind), http.StatusNotAcceptable)
	case version == "":
		var b strings.Builder
		fmt.Fprintf(&b, "\n%s %s\nFor people: the form of this text may change. Programs ask for application/json;v=v1beta1;g=config.k8s.io;as=%s.\n",
			component, strings.ToLower(p.kind), p.kind)
		p.write(&b)
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprint(w, b.String())
	default:
		object := map[string]any{
			"kind": p.kind, "apiVersion": "config.k8s.io/" + version, "metadata": map[string]any{"name": component},
		}
		p.add(object)
		w.Header().Set("Content-Type", "application/json")
		if zversions()[version] {
			w.Header().Set("Warning", `299 - "this version is deprecated: ask for v1beta1"`)
		}
		_ = json.NewEncoder(w).Encode(object)
	}
}

// accept returns the first version of an Accept header that can be had, empty
// for text, and whether there is one.
func (p *zpage) accept(header string) (version string, ok bool) {
	if strings.TrimSpace(header) == "" {
		return "", true
	}
	for part := range strings.SplitSeq(header, ",") {
		kind, params, err := mime.ParseMediaType(part)
		if err != nil || params["q"] == "0" {
			continue
		}
		_, structured := params["as"]
		switch kind {
		case "text/plain", "text/*", "*/*":
			if !structured {
				return "", true
			}
		case "application/json":
			if _, known := zversions()[params["v"]]; known && params["as"] == p.kind && params["g"] == "config.k8s.io" {
				return params["v"], true
			}
		}
	}
	return "", false
}

// flagz lists the flags of the process and their values.
func flagz(flags map[string]string) *zpage {
	return &zpage{
		kind: "Flagz",
		write: func(b *strings.Builder) {
			for _, name := range slices.Sorted(maps.Keys(flags)) {
				fmt.Fprintf(b, "%s=%s\n", name, flags[name])
			}
		},
		add: func(o map[string]any) { o["flags"] = flags },
	}
}

// statusz says since when which binary runs, and what else it serves.
func statusz(version, emulated string, started time.Time, paths []string) *zpage {
	up := func() time.Duration { return time.Since(started) }
	return &zpage{
		kind: "Statusz",
		write: func(b *strings.Builder) {
			d := int(up().Seconds())
			fmt.Fprintf(b, "\nStarted: %s\nUp: %d hr %02d min %02d sec\nGo version: %s\nBinary version: %s\nEmulation version: %s\nPaths: %s\n",
				started.Format(time.UnixDate), d/3600, d/60%60, d%60, runtime.Version(), version, emulated, strings.Join(paths, " "))
		},
		add: func(o map[string]any) {
			o["startTime"] = started.UTC().Format(time.RFC3339)
			o["uptimeSeconds"] = int(up().Seconds())
			o["goVersion"], o["binaryVersion"], o["emulationVersion"], o["paths"] = runtime.Version(), version, emulated, paths
		},
	}
}

// verbosity takes the log level by PUT, as kube-proxy's /debug/flags/v does.
func verbosity(set func(level int)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut {
			http.Error(w, "PUT a log level, as in: curl -X PUT -d 4 …/debug/flags/v", http.StatusNotAcceptable)
			return
		}
		body := make([]byte, 16)
		n, _ := r.Body.Read(body)
		level, err := strconv.Atoi(strings.TrimSpace(string(body[:n])))
		if err != nil {
			http.Error(w, "a log level is a number such as 4", http.StatusBadRequest)
			return
		}
		set(level)
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "the log level is now %d", level)
	}
}
