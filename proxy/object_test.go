package proxy

import "testing"

func TestObjectRef(t *testing.T) {
	for _, r := range []ObjectRef{{"Service", "shop", "foo"}, {"Node", "", "node1"}, {"EndpointSlice", "a", "b-c.d"}} {
		if got, ok := ParseObjectRef(r.String()); !ok || got != r {
			t.Errorf("%v: got %v, %v", r, got, ok)
		}
	}
	for _, s := range []string{"", "Service", "Service ", " foo", "Service /foo", "Service shop/", "the fixed rules", "Service a/b/c"} {
		if got, ok := ParseObjectRef(s); ok {
			t.Errorf("%q was read as %+v", s, got)
		}
	}
}
