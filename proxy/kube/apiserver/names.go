package apiserver

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

// identity is what is kept of an object's metadata.
type identity struct {
	namespace, name, version string
	uid                      types.UID
}

// GetObjectMeta lets client-go find an object's name.
func (i *identity) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: i.namespace, Name: i.name, UID: i.uid, ResourceVersion: i.version}
}

func identityOf(m *metav1.ObjectMeta) identity {
	return identity{namespace: m.Namespace, name: m.Name, uid: m.UID, version: m.ResourceVersion}
}

// podRecord is what is kept of a Pod: some 200 bytes of many thousand.
type podRecord struct {
	identity
	pod     proxy.Pod
	addrs   []netip.Addr
	created int64 // Unix seconds
}

func stripPod(obj any) any {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return obj
	}
	// An address that cannot be read names nobody.
	pod, addrs, _ := kube.ConvertPod(p)
	return &podRecord{identity: identityOf(&p.ObjectMeta), pod: pod, addrs: addrs, created: p.CreationTimestamp.Unix()}
}

// podNames knows the pod behind each address. Two pods can claim one for a
// moment, when it was given on: the younger one has it.
type podNames struct {
	records map[string]*podRecord
	claims  map[netip.Addr][]*podRecord
	names   map[netip.Addr]proxy.Pod
}

func newPodNames() podNames {
	return podNames{
		records: map[string]*podRecord{},
		claims:  map[netip.Addr][]*podRecord{},
		names:   map[netip.Addr]proxy.Pod{},
	}
}

// set puts r, which may be nil, in the place of the record of that key and
// reports whether a name changed.
func (p *podNames) set(key string, r *podRecord) bool {
	old := p.records[key]
	if old != nil && r != nil && old.pod == r.pod && slices.Equal(old.addrs, r.addrs) {
		p.records[key].identity = r.identity
		return false
	}
	changed := false
	if old != nil {
		delete(p.records, key)
		for _, ip := range old.addrs {
			p.claims[ip] = slices.DeleteFunc(p.claims[ip], func(c *podRecord) bool { return c == old })
			changed = p.settle(ip) || changed
		}
	}
	if r != nil {
		p.records[key] = r
		for _, ip := range r.addrs {
			p.claims[ip] = append(p.claims[ip], r)
			changed = p.settle(ip) || changed
		}
	}
	return changed
}

// settle decides whose ip is.
func (p *podNames) settle(ip netip.Addr) bool {
	claims := p.claims[ip]
	if len(claims) == 0 {
		delete(p.claims, ip)
		delete(p.names, ip)
		return true
	}
	youngest := slices.MaxFunc(claims, func(a, b *podRecord) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.uid, b.uid))
	})
	if p.names[ip] == youngest.pod {
		return false
	}
	p.names[ip] = youngest.pod
	return true
}

// nodeRecord is what is kept of a Node.
type nodeRecord struct {
	identity
	node     proxy.Node
	problems []proxy.Problem
}

func stripNode(obj any) any {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return obj
	}
	r := &nodeRecord{identity: identityOf(&n.ObjectMeta)}
	r.node, r.problems = kube.ConvertNode(n)
	return r
}
