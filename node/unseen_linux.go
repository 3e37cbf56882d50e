package node

import (
	"sync"
	"time"

	"github.com/kptrace/kptrace/internal/dataplane"
)

// aroundFor is how long what was found of other data planes serves.
const aroundFor = 30 * time.Second

// around is what other data planes keep from us here, as of a while ago.
type around struct {
	mu   sync.Mutex // guards what follows
	at   time.Time
	said []string
}

// unseen lists what this setup in particular cannot see: beside another proxy, and
// beside those who handle packets past all rules.
func (n *node) unseen() []string {
	var out []string
	if f := n.follows(); f != nil {
		out = f.Blind()
	}
	n.around.mu.Lock()
	defer n.around.mu.Unlock()
	if time.Since(n.around.at) > aroundFor {
		n.around.at, n.around.said = time.Now(), lookAround()
	}
	return append(out, n.around.said...)
}

func lookAround() (out []string) {
	for _, s := range dataplane.Look() {
		if s.Sure {
			out = append(out, "connections to Services that "+s.String()+" translates itself")
		}
	}
	tables, err := dataplane.Flowtables()
	if err != nil {
		return out // no nf_tables, no flowtables
	}
	for _, name := range tables {
		out = append(out, "FIN, RST and the end in time of connections in the flowtable "+name+", whose packets pass no rules")
	}
	return out
}
