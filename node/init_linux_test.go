package node

import (
	"path/filepath"
	"testing"
)

// TestInit makes settings, leaves them for the next owner, who undoes them.
func TestInit(t *testing.T) {
	const liberal, buckets = "net/netfilter/nf_conntrack_tcp_be_liberal", "net/netfilter/nf_conntrack_buckets"
	was := sysctl(t, liberal)
	ours := "1"
	if was == ours {
		ours = "0"
	}
	dir := t.TempDir()
	err := Init(Config{Socket: filepath.Join(dir, "k.sock"), Sysctls: []Sysctl{
		{Name: liberal, Value: ours}, {Name: buckets, Value: "1", AtLeast: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got := sysctl(t, liberal); got != ours {
		t.Errorf("%s is %s after Init, want %s", liberal, got, ours)
	}
	if got := sysctl(t, buckets); got == "1" {
		t.Errorf("%s was lowered", buckets)
	}
	next, err := own(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.restore(); err != nil {
		t.Fatal(err)
	}
	next.release()
	if got := sysctl(t, liberal); got != was {
		t.Errorf("%s is %s after the next owner set it back, was %s", liberal, got, was)
	}
	if err := Init(Config{Socket: filepath.Join(dir, "k.sock"), Sysctls: []Sysctl{{Name: "net/none", Value: "1"}}}); err == nil {
		t.Error("no error for a setting that does not exist")
	}
}
