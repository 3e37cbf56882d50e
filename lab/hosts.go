package lab

import (
	"fmt"
	"strings"
)

// hostsFile returns what /etc/hosts is inside the lab: before, and the names
// of Services as cluster DNS would have them, of pods and of nodes. It stands
// in for a DNS server.
func hostsFile(before string, c *Cluster) string {
	var b strings.Builder
	b.WriteString(strings.TrimRight(before, "\n"))
	b.WriteString("\n# The lab's own:\n")
	last := ""
	for i := range c.Services {
		s := &c.Services[i]
		name := s.Name + "." + s.Namespace
		if name == last {
			continue // another port of the same Service
		}
		last = name
		fmt.Fprintf(&b, "%s %s.svc.cluster.local %s.svc %s\n", s.ClusterIP, name, name, name)
	}
	for i := range c.Pods {
		fmt.Fprintf(&b, "%s %s.%s.pod\n", c.Pods[i].Addr, c.Pods[i].Name, c.Pods[i].Namespace)
	}
	for i := range c.Nodes {
		fmt.Fprintf(&b, "%s %s\n", c.Nodes[i].Addr, c.Nodes[i].Name)
	}
	return b.String()
}
