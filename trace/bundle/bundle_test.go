package bundle

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func sample(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	err := Write(&b, Manifest{Version: "v1", Made: time.Unix(7, 0).UTC(), Node: "node-x", Redacted: "names"}, []File{
		{Name: "status.json", About: "status", Data: []byte("{}")},
		{Name: "rules/iptables-nft-save.txt", Data: []byte("*nat\nCOMMIT\n")},
		{Name: "rules/nft-ruleset.txt", Data: []byte("table ip x {}\n")},
		{Name: "recording.ktr", Data: bytes.Repeat([]byte("recorded "), 4000)},
		{Name: "metrics.txt", Why: "nobody was asked"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	b, err := Read(bytes.NewReader(sample(t)))
	if err != nil {
		t.Fatal(err)
	}
	if m := b.Manifest; m.Node != "node-x" || m.Format != Version || len(m.Files) != 4 || len(m.Missing) != 1 || m.Files[3].Bytes != 36000 {
		t.Errorf("manifest %+v", m)
	}
	if data, err := b.File(Recording); err != nil || len(data) != 36000 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if rules, err := b.Rules(); err != nil || string(rules) != "*nat\nCOMMIT\n" {
		t.Errorf("rules %q, %v", rules, err)
	}
	if _, err := b.File("metrics.txt"); err == nil || !strings.Contains(err.Error(), "nobody was asked") {
		t.Errorf("a missing file: %v", err)
	}
}

// TestBroken cuts a bundle at every byte and reads what is none: each time it is said,
// and nothing is taken for whole.
func TestBroken(t *testing.T) {
	t.Parallel()
	whole := sample(t)
	for i := range whole {
		if _, err := Read(bytes.NewReader(whole[:i])); !errors.Is(err, ErrCut) && !errors.Is(err, ErrForeign) {
			t.Fatalf("cut at %d of %d: %v", i, len(whole), err)
		}
	}
	var other bytes.Buffer
	z := gzip.NewWriter(&other)
	_, _ = io.WriteString(z, "just text")
	_ = z.Close()
	for name, b := range map[string][]byte{"empty": nil, "text": []byte("*nat\n"), "gzip of something": other.Bytes()} {
		if _, err := Read(bytes.NewReader(b)); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
