package apiserver

import (
	"context"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// The waits between two tries to reach the API server: short for what Services
// need, long for what access rules may refuse for good.
const (
	firstRetry       = 500 * time.Millisecond
	requiredRetryMax = 10 * time.Second
	optionalRetryMax = 60 * time.Second
)

// resource is one thing to watch.
type resource struct {
	name     string
	required bool
	// without says, in a sentence without full stop, what is missing without
	// it; empty if nothing that anybody sees.
	without string
	example runtime.Object
	fields  string
	labels  string
	list    func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch   func(context.Context, metav1.ListOptions) (watch.Interface, error)
	table   *table
}

// resources are all that a Watcher can follow.
type resources struct {
	services, slices, own, ranges, pods, nodes *resource
}

func (s *state) table(strip func(any) any, set func(string, any), remove func(string)) *table {
	return &table{state: s, strip: strip, set: set, remove: remove, versions: map[string]string{}}
}

func newResources(c kubernetes.Interface, s *state) resources {
	core, discovery, networking := c.CoreV1(), c.DiscoveryV1(), c.NetworkingV1()
	return resources{
		services: &resource{
			name: "services", required: true, example: &corev1.Service{},
			labels: "!" + labelProxyName,
			list:   lister(core.Services(metav1.NamespaceAll).List), watch: core.Services(metav1.NamespaceAll).Watch,
			table: s.table(stripObject, s.setService, s.removeService),
		},
		slices: &resource{
			name: "endpointslices", required: true, example: &discoveryv1.EndpointSlice{},
			labels: "!" + corev1.IsHeadlessService,
			list:   lister(discovery.EndpointSlices(metav1.NamespaceAll).List), watch: discovery.EndpointSlices(metav1.NamespaceAll).Watch,
			table: s.table(newSharing().stripSlice, s.setSlice, s.removeSlice),
		},
		own: &resource{
			name: "nodes (our own)", example: &corev1.Node{},
			without: "the zone, addresses and pod ranges of this node are unknown: grant list and watch on nodes",
			fields:  fields.OneTermEqualSelector(metav1.ObjectNameField, s.node).String(),
			list:    lister(core.Nodes().List), watch: core.Nodes().Watch,
			table: s.table(stripNode, s.setOwn, s.removeOwn),
		},
		ranges: &resource{
			name: "servicecidrs", example: &networkingv1.ServiceCIDR{},
			list: lister(networking.ServiceCIDRs().List), watch: networking.ServiceCIDRs().Watch,
			table: s.table(stripObject, s.setRange, s.removeRange),
		},
		pods: &resource{
			name: "pods", example: &corev1.Pod{},
			without: "pods and their workloads are named only as far as EndpointSlices name them: grant list and watch on pods",
			fields:  "status.phase!=Succeeded,status.phase!=Failed",
			list:    lister(core.Pods(metav1.NamespaceAll).List), watch: core.Pods(metav1.NamespaceAll).Watch,
			table: s.table(stripPod, s.setPod, s.removePod),
		},
		nodes: &resource{
			name: "nodes", example: &corev1.Node{},
			without: "addresses of other nodes have no names: grant list and watch on nodes",
			list:    lister(core.Nodes().List), watch: core.Nodes().Watch,
			table: s.table(stripNode, s.setNode, s.removeNode),
		},
	}
}

const labelProxyName = "service.kubernetes.io/service-proxy-name"

// lister makes a typed list function one of any objects.
func lister[L runtime.Object](list func(context.Context, metav1.ListOptions) (L, error)) func(context.Context, metav1.ListOptions) (runtime.Object, error) {
	return func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return list(ctx, o) }
}

// stripObject drops what nobody here reads.
func stripObject(obj any) any {
	m, ok := obj.(metav1.Object)
	if !ok {
		return obj
	}
	m.SetManagedFields(nil)
	keep := map[string]string(nil)
	if at, ok := m.GetAnnotations()[corev1.EndpointsLastChangeTriggerTime]; ok {
		keep = map[string]string{corev1.EndpointsLastChangeTriggerTime: at}
	}
	m.SetAnnotations(keep)
	return obj
}

// follow keeps r's table up to date until ctx ends.
func (w *Watcher) follow(ctx context.Context, r *resource) {
	silent := logr.Discard() // health says what is worth saying, once
	ctx = logr.NewContext(ctx, silent)
	narrow := func(o *metav1.ListOptions) {
		o.LabelSelector, o.FieldSelector = r.labels, r.fields
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(_ context.Context, o metav1.ListOptions) (runtime.Object, error) {
			narrow(&o)
			list, err := r.list(ctx, o)
			w.health.note(ctx, "list", r, err)
			return list, err
		},
		WatchFuncWithContext: func(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
			narrow(&o)
			events, err := r.watch(ctx, o)
			w.health.note(ctx, "watch", r, err)
			return events, err
		},
	}
	longest := requiredRetryMax
	if !r.required {
		longest = optionalRetryMax
	}
	if w.cfg.retry != 0 {
		longest = w.cfg.retry
	}
	cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, w.client), r.example, r.table, cache.ReflectorOptions{
		Name: r.name, Logger: &silent,
		Backoff: &wait.Backoff{
			Duration: min(firstRetry, longest), Factor: 2, Jitter: 0.5, Cap: longest, Steps: 30,
		},
	}).RunWithContext(ctx)
}
