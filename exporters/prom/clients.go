package prom

import (
	"path"
	"slices"

	dto "github.com/prometheus/client_model/go"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// clientName names a client: a pod, or an address without a namespace.
type clientName struct{ namespace, name string }

// client holds the counters of one client, by Service port and result.
type client struct {
	counts []clientCount
	total  float64
}

type clientCount struct {
	service proxy.PortName
	result  string
	labels  []*dto.LabelPair
	n       float64
}

// clients counts connections by client for a bounded number of them. The least
// active one makes room for a newcomer (as in the space-saving algorithm), and
// what it had counts as "other" from then on.
type clients struct {
	max   int
	allow []string
	all   map[clientName]*client
	rest  client
}

func (c *clients) count(f *trace.Flow, s *service) {
	if c.max == 0 {
		return
	}
	who := clientName{f.Client.Namespace, f.Client.Pod}
	if who.name == "" {
		who = clientName{name: f.Client.Addr.Addr().String()}
	}
	result := "success"
	if f.Outcome.Failed() {
		result = "failure"
	}
	to := c.all[who]
	if to == nil {
		if to = c.admit(who); to == &c.rest {
			who = clientName{name: other}
		}
	}
	to.total++
	to.add(who, s, result, 1)
}

// admit makes room for a client, if it is allowed to have series.
func (c *clients) admit(who clientName) *client {
	text := who.name
	if who.namespace != "" {
		text = who.namespace + "/" + who.name
	}
	if len(c.allow) > 0 && !slices.ContainsFunc(c.allow, func(p string) bool { ok, err := path.Match(p, text); return ok && err == nil }) {
		return &c.rest
	}
	if len(c.all) >= c.max {
		var least clientName
		fewest := -1.0
		for name, old := range c.all {
			if fewest < 0 || old.total < fewest || old.total == fewest && name.name < least.name {
				least, fewest = name, old.total
			}
		}
		for _, old := range c.all[least].counts {
			c.rest.merge(old)
		}
		delete(c.all, least)
	}
	to := new(client)
	c.all[who] = to
	return to
}

func (to *client) add(who clientName, s *service, result string, n float64) {
	for i := range to.counts {
		if x := &to.counts[i]; x.service == s.name && x.result == result {
			x.n += n
			return
		}
	}
	to.counts = append(to.counts, clientCount{service: s.name, result: result, n: n, labels: with(s.labels,
		pair("client_namespace", who.namespace), pair("client", who.name), pair("result", result))})
}

// merge adds what another client had.
func (to *client) merge(x clientCount) {
	for i := range to.counts {
		if have := &to.counts[i]; have.service == x.service && have.result == x.result {
			have.n += x.n
			return
		}
	}
	labels := slices.DeleteFunc(slices.Clone(x.labels), func(l *dto.LabelPair) bool {
		return l.GetName() == "client" || l.GetName() == "client_namespace"
	})
	x.labels = with(labels, pair("client_namespace", ""), pair("client", other))
	to.counts = append(to.counts, x)
}

func (c *clients) forget(name proxy.PortName) {
	gone := func(x clientCount) bool { return x.service == name }
	for who, one := range c.all {
		if one.counts = slices.DeleteFunc(one.counts, gone); len(one.counts) == 0 {
			delete(c.all, who)
		}
	}
	c.rest.counts = slices.DeleteFunc(c.rest.counts, gone)
}
