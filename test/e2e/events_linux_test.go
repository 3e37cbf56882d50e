//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// TestEvents has kptrace, with the rights of a kube-proxy, say by Kubernetes
// Events that it starts, what is wrong with a Service, and which mode runs in the
// place of another; a second one does not say of a Service what the first said.
// Without the right it says so once and does all else.
func TestEvents(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{RBAC: true})
	o := &objects{}
	o.add("first", "http:80", "a", externalIPs(1))
	o.add("second", "http:80", "a", externalIPs(1))
	o.create(t, c.client)
	createNode(t, c.client, "node2")
	createNode(t, c.client, "node3")
	first := newNode(t, c)
	_, out := runKptrace(t, c, first, xtables.NFT)
	eventually(t, "Events", func() error {
		var starting bool
		for _, e := range events(t, c) {
			starting = starting || e.Reason == "Starting" && e.Action == "StartKubeProxy" && e.Type == "Normal" &&
				e.Regarding.Kind == "Node" && e.Regarding.Name == nodeName && e.ReportingInstance == "kube-proxy-"+nodeName
		}
		if bad := badService(t, c); !starting || len(bad) == 0 {
			return fmt.Errorf("starting %v, bad Services %v\n%s", starting, bad, out)
		}
		return nil
	})
	second := service(t, c, "second")
	before := badService(t, c)
	for _, e := range before {
		if e.Regarding.Name != "second" || e.Regarding.UID != second.UID || e.Type != "Warning" || !strings.HasPrefix(e.Note, "spec.externalIPs: ") {
			t.Errorf("Event of a bad Service: %+v", e)
		}
	}
	if len(before) != 2 { // one for each of its IPv4 addresses
		t.Errorf("%d Events of bad Services, want 2: %v", len(before), before)
	}
	_, out = runKptrace(t, c, newNode(t, c), xtables.NFT, "--hostname-override=node2")
	eventually(t, "Events of a second node", func() error {
		if !slices.ContainsFunc(events(t, c), func(e eventsv1.Event) bool { return e.Regarding.Name == "node2" }) {
			return fmt.Errorf("none\n%s", out)
		}
		if strings.Count(out.String(), "problem: Service shop/second") < 2 {
			return fmt.Errorf("it has not seen the Service yet\n%s", out)
		}
		return nil
	})
	time.Sleep(500 * time.Millisecond) // to be sure that it says nothing
	if after := badService(t, c); len(after) != len(before) {
		t.Errorf("two nodes said the same of one object: %v", after)
	}
	t.Run("modes", func(t *testing.T) { testModeFallback(t, c) })

	role, err := c.client.RbacV1().ClusterRoles().Get(t.Context(), "system:node-proxier", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range role.Rules {
		role.Rules[i].Resources = slices.DeleteFunc(role.Rules[i].Resources, func(r string) bool { return r == "events" })
		if len(role.Rules[i].Resources) == 0 {
			role.Rules[i].Resources = []string{"nothing"}
		}
	}
	if _, err := c.client.RbacV1().ClusterRoles().Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	third := newNode(t, c)
	_, out = runKptrace(t, c, third, xtables.NFT, "--hostname-override=node3")
	eventually(t, "rules of a kptrace without rights on Events", func() error {
		text, err := (&xtables.Tools{Netns: third.Fd()}).SaveText(t.Context(), xtables.NFT, xtables.IPv4, "nat", false)
		if err == nil && !strings.Contains(text, "shop/first:http cluster IP") {
			err = fmt.Errorf("not there\n%s", out)
		}
		return err
	})
	eventually(t, "a word on Events", func() error {
		if n := strings.Count(out.String(), "events: access is refused"); n != 1 {
			return fmt.Errorf("said %d times\n%s", n, out)
		}
		return nil
	})
	if slices.ContainsFunc(events(t, c), func(e eventsv1.Event) bool { return e.Regarding.Name == "node3" }) {
		t.Error("an Event was written without the right")
	}
}

// events lists those that kptrace wrote.
func events(t *testing.T, c *cluster) []eventsv1.Event {
	t.Helper()
	list, err := c.client.EventsV1().Events(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(e eventsv1.Event) bool { return e.ReportingController != "kube-proxy" })
}

func badService(t *testing.T, c *cluster) []eventsv1.Event {
	t.Helper()
	return slices.DeleteFunc(events(t, c), func(e eventsv1.Event) bool { return e.Reason != "InvalidService" })
}

// TestFailureEvents: connections to a Service without endpoints, and to a pod
// that refuses them, fail for a while, and kubectl describe says so at the
// Services and at the pod; and when they work again at the Services.
func TestFailureEvents(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{RBAC: true})
	o := &objects{}
	o.add("empty", "http:80", "")
	o.add("web", "http:80", "")
	o.create(t, c.client)
	pod, err := c.client.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: namespace},
		Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "web", Image: "web"}}, AutomountServiceAccountToken: ptr(false)},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node := newNode(t, c)
	inside := newPod(t, node, "10.244.1.50/24", "10.244.1.51/24")
	endpointOf(t, c, "web", "10.244.1.50", pod)
	_, out := runKptrace(t, c, node, xtables.NFT, "--failure-events-after=3s")
	routeToServices(t, node)
	empty, web := service(t, c, "empty"), service(t, c, "web")

	// told waits until an Event is at an object, and makes connections meanwhile.
	told := func(to *corev1.Service, kind string, at metav1.Object, word, reason, note string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s at %s %s", reason, kind, at.GetName()), func() error {
			var last error
			for range 20 {
				last = tryPort80(node, to.Spec.ClusterIP)
			}
			there := ""
			for _, e := range events(t, c) {
				there += fmt.Sprintf("%s %s %s/%s: %s\n", e.Type, e.Reason, e.Regarding.Kind, e.Regarding.Name, e.Note)
				if e.Reason == reason && e.Type == word && e.Action == "Connect" && e.Regarding.Kind == kind &&
					e.Regarding.Name == at.GetName() && e.Regarding.UID == at.GetUID() && strings.Contains(e.Note, note) {
					return nil
				}
			}
			return fmt.Errorf("none; the last connection: %w; there are:\n%s%s", last, there, out)
		})
	}
	const pods = " that get pod web-1 (10.244.1.50:8080) "
	told(empty, "Service", empty, "Warning", "NoEndpoints", "most connections to "+namespace+"/empty")
	told(web, "Service", web, "Warning", "EndpointRefused", "most connections to "+namespace+"/web:http"+pods+"fail: ")
	told(web, "Pod", pod, "Warning", "EndpointRefused", "most connections to "+namespace+"/web:http"+pods+"fail: ")

	serveAt(t, inside, "10.244.1.50:8080")
	told(web, "Service", web, "Normal", "ConnectionsRecovered", "connections to "+namespace+"/web:http"+pods+"work again")
	serveAt(t, inside, "10.244.1.51:8080")
	endpointOf(t, c, "empty", "10.244.1.51", nil)
	told(empty, "Service", empty, "Normal", "ConnectionsRecovered", "connections to "+namespace+"/empty:http work again")
}

// endpointOf gives a Service of port 80 an endpoint at port 8080.
func endpointOf(t *testing.T, c *cluster, service, addr string, pod *corev1.Pod) {
	t.Helper()
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr("http"), Protocol: ptr(corev1.ProtocolTCP), Port: ptr(int32(8080))}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{addr}, NodeName: ptr(nodeName)}},
	}
	if pod != nil {
		s.Endpoints[0].TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: pod.Name, UID: pod.UID}
	}
	if _, err := c.client.DiscoveryV1().EndpointSlices(namespace).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// tryPort80 makes a connection from a node to port 80, and ends it.
func tryPort80(node *netns.NS, addr string) (err error) {
	from := net.Dialer{Timeout: 50 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}}
	into := node.Do(func() error {
		var conn net.Conn
		if conn, err = from.Dial("tcp4", net.JoinHostPort(addr, "80")); err == nil {
			conn.Close()
		}
		return nil
	})
	return errors.Join(into, err)
}

// newPod makes a namespace with addresses that a node reaches.
func newPod(t *testing.T, node *netns.NS, addrs ...string) *netns.NS {
	t.Helper()
	pod, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pod.Close() })
	set := func(ns *netns.NS, link string, addrs ...string) error {
		nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()))
		if err != nil {
			return err
		}
		defer nl.Close()
		if link == "pod" {
			pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: link}, PeerName: "eth0", PeerNamespace: netlink.NsFd(pod.Fd())}
			if err := nl.LinkAdd(pair); err != nil {
				return err
			}
		}
		l, err := nl.LinkByName(link)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err == nil {
				err = nl.AddrAdd(l, addr)
			}
			if err != nil {
				return err
			}
		}
		if err := nl.LinkSetUp(l); err != nil || link == "pod" {
			return err
		}
		return nl.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(10, 244, 1, 1)})
	}
	if err := errors.Join(set(node, "pod", "10.244.1.1/24"), set(pod, "eth0", addrs...)); err != nil {
		t.Fatal(err)
	}
	return pod
}

// routeToServices lets packets to Service addresses leave through a node's
// loopback, as far as they are not refused before.
func routeToServices(t *testing.T, ns *netns.NS) {
	t.Helper()
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	_, services, err := net.ParseCIDR("10.96.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: services, Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
}
