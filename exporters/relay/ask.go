package relay

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/explain"
)

// ExplainRequest asks a node to explain what its live rules do with a packet, or with
// one to each address of a Service.
type ExplainRequest struct {
	// Namespace and Service name a Service, an empty namespace stands for any;
	// Ports are some of its ports by name or number, none for all.
	Namespace, Service string
	Ports              []string
	// FromPod is the client's pod, else From its address; FromNode says that it is
	// the node itself. Without any it is somebody outside.
	FromPod  PodName
	From     netip.Addr
	FromNode bool
	// Packet is the packet if no Service is named.
	Packet *proxy.Packet
	// In is the interface by which it comes in, empty for what the node's routes
	// say.
	In string
	// Desired walks what the node's own proxy wants instead of the live rules.
	Desired bool
}

// ServicesRequest asks a node which Services its live rules know.
type ServicesRequest struct {
	// Namespace is theirs, empty for all.
	Namespace string
}

// ServicesResponse is what a node's live rules do with every Service.
type ServicesResponse struct {
	Node string
	Mode proxy.Mode
	// Rules says which they are, as "the live rules of node1 (iptables-nft)".
	Rules string
	// Services are ordered as in the rules.
	Services []*liverules.Service
	// Snapshot has what the API says of the Services asked for.
	Snapshot *proxy.Snapshot
	// Notes say what was not evaluated, in sentences without full stop.
	Notes []string
}

// PodName is the name of a pod.
type PodName struct{ Namespace, Name string }

// CheckRequest asks a node to check itself.
type CheckRequest struct {
	Options check.Options
	// Fix has the node's own proxy compare everything and write its own rules
	// again where they differ, and then look.
	Fix bool
}

// CheckResponse is what a node found.
type CheckResponse struct {
	Node     string
	Findings []check.Finding
	// Fixed says what was done about it.
	Fixed []string
	// Notes say what could not be looked at, in sentences without full stop.
	Notes []string
	At    time.Time
}

// CollectRequest asks a node for what a bug report holds of it.
type CollectRequest struct{}

// CollectResponse is that, as a bundle of package trace/bundle, with nothing
// redacted.
type CollectResponse struct {
	Node   string
	Bundle []byte
}

// The kinds of questions.
const (
	askExplain  = "explain"
	askServices = "services"
	askCheck    = "check"
	askCollect  = "collect"
)

// Ask answers a question of a client.
func (s *Server) Ask(ctx context.Context, q *Question) (*Document, error) {
	switch q.GetKind() {
	case askExplain:
		return reply(ctx, q, s.cfg.Explain)
	case askServices:
		return reply(ctx, q, s.cfg.Services)
	case askCheck:
		return reply(ctx, q, s.cfg.Check)
	case askCollect:
		return reply(ctx, q, s.cfg.Collect)
	}
	return nil, status.Errorf(codes.Unimplemented, "this node does not know the question %q: is it of an older version?", q.GetKind())
}

func reply[Q, A any](ctx context.Context, q *Question, answer func(context.Context, Q) (A, error)) (*Document, error) {
	if answer == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "this node cannot answer %q", q.GetKind())
	}
	var in Q
	if err := json.Unmarshal(q.GetJson(), &in); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "bad question %q: %v", q.GetKind(), err)
	}
	out, err := answer(ctx, in)
	if err != nil {
		return nil, toStatus(err)
	}
	b, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("relay: writing the answer: %w", err)
	}
	return &Document{Json: b}, nil
}

// Explain asks the node what its rules do with a packet.
func (c *Client) Explain(ctx context.Context, req ExplainRequest) ([]explain.Answer, error) {
	return ask[[]explain.Answer](ctx, c, askExplain, req)
}

// Services asks the node for what its live rules do with every Service.
func (c *Client) Services(ctx context.Context, req ServicesRequest) (ServicesResponse, error) {
	return ask[ServicesResponse](ctx, c, askServices, req)
}

// Check asks the node to check itself.
func (c *Client) Check(ctx context.Context, req CheckRequest) (CheckResponse, error) {
	return ask[CheckResponse](ctx, c, askCheck, req)
}

// Collect asks the node for what a bug report holds of it.
func (c *Client) Collect(ctx context.Context) (CollectResponse, error) {
	return ask[CollectResponse](ctx, c, askCollect, CollectRequest{})
}

func ask[A any](ctx context.Context, c *Client, kind string, req any) (A, error) {
	var out A
	b, err := json.Marshal(req)
	if err != nil {
		return out, fmt.Errorf("relay: writing the question: %w", err)
	}
	doc, err := c.rpc.Ask(ctx, &Question{Kind: kind, Json: b})
	if err != nil {
		return out, c.explain(err)
	}
	if err := json.Unmarshal(doc.GetJson(), &out); err != nil {
		return out, fmt.Errorf("relay: reading the answer of %s: %w", c.path, err)
	}
	return out, nil
}
