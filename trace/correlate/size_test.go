package correlate

import (
	"testing"
	"unsafe"
)

// TestSizes holds what Config.MaxFlows says of the memory of a flow.
func TestSizes(t *testing.T) {
	rec, update := unsafe.Sizeof(rec{}), unsafe.Sizeof(box{})
	t.Logf("record %d bytes, update %d bytes", rec, update)
	if rec > 576 || update > 1152 {
		t.Errorf("record %d bytes, update %d bytes", rec, update)
	}
}
