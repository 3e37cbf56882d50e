// Package bundle is the format of what kptrace bugreport makes: a gzipped tar of a
// manifest, which lists what is in it and what is missing, and of files about one
// node. See docs/bugreport.md.
package bundle

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Version is that of the format.
const Version = 1

// The names of files that others read again. Rules are all files below RulesDir.
const (
	ManifestName = "manifest.json"
	Recording    = "recording.ktr"
	RulesDir     = "rules/"
	NFTRules     = RulesDir + "nft-ruleset.txt"
	IPSets       = "ipset.txt"
)

const (
	kind     = "kptrace-bugreport"
	maxFile  = 256 << 20
	maxFiles = 256
	// room bounds what is held of a bundle.
	room = 512 << 20
)

// Manifest is the first file of a bundle.
type Manifest struct {
	Kind string `json:"kind"`
	// Format is the version of the format.
	Format int `json:"format"`
	// Version is that of the kptrace that made it.
	Version  string    `json:"version"`
	Made     time.Time `json:"made"`
	Node     string    `json:"node"`
	Redacted string    `json:"redacted"`
	Files    []Entry   `json:"files"`
	Missing  []Missing `json:"missing"`
}

// Entry is a file in a bundle.
type Entry struct {
	Name  string `json:"name"`
	About string `json:"about"`
	Bytes int    `json:"bytes"`
}

// Missing is something that could not be had, and why.
type Missing struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// File is a file about a node: its content, or why there is none.
type File struct {
	Name, About string
	Data        []byte
	// Why is why it is missing, empty if it is not.
	Why string
}

// Write writes a bundle; it fills in the rest of the Manifest.
func Write(w io.Writer, m Manifest, files []File) error {
	m.Kind, m.Format = kind, Version
	m.Files, m.Missing = []Entry{}, []Missing{}
	for i := range files {
		if f := &files[i]; f.Why != "" {
			m.Missing = append(m.Missing, Missing{f.Name, f.Why})
		} else {
			m.Files = append(m.Files, Entry{f.Name, f.About, len(f.Data)})
		}
	}
	head, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	put := func(name string, data []byte) error {
		err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(data)), ModTime: m.Made, Format: tar.FormatPAX})
		if err == nil {
			_, err = t.Write(data)
		}
		return err
	}
	err = put(ManifestName, append(head, '\n'))
	for i := 0; err == nil && i < len(files); i++ {
		if files[i].Why == "" {
			err = put(files[i].Name, files[i].Data)
		}
	}
	if err = errors.Join(err, t.Close(), z.Close()); err != nil {
		return fmt.Errorf("bundle: writing: %w", err)
	}
	return nil
}

// The errors of Read, beside those of what it reads from.
var (
	// ErrForeign: this is no bundle, or of a version that this one cannot read.
	ErrForeign = errors.New("this is no bug report of kptrace's")
	// ErrCut: it ends in the middle of it.
	ErrCut = errors.New("the bug report was cut off or damaged here; what came before is used")
)

// Bundle is what was read of one.
type Bundle struct {
	Manifest Manifest
	files    map[string][]byte
}

// Is reports whether something begins as a bundle does.
func Is(r *bufio.Reader) bool {
	b, err := r.Peek(2)
	return err == nil && b[0] == 0x1f && b[1] == 0x8b
}

// Read reads a bundle. With ErrCut it returns what was readable, if that was more than
// the manifest.
func Read(r io.Reader) (*Bundle, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, ErrForeign
	}
	b := &Bundle{files: map[string][]byte{}}
	t := tar.NewReader(io.LimitReader(z, room))
	for {
		h, err := t.Next()
		switch {
		case errors.Is(err, io.EOF):
			if b.Manifest.Kind == "" {
				return nil, ErrForeign
			}
			if _, err := io.Copy(io.Discard, z); err != nil { // its end and its sum
				return b, ErrCut
			}
			return b, b.whole()
		case err != nil && b.Manifest.Kind == "":
			return nil, ErrForeign
		case err != nil:
			return b, ErrCut
		case h.Typeflag != tar.TypeReg || h.Size > maxFile || len(b.files) >= maxFiles:
			return b, fmt.Errorf("bundle: %s: %w", h.Name, ErrForeign)
		}
		data, err := io.ReadAll(t)
		if b.Manifest.Kind == "" {
			// The manifest comes first.
			if h.Name != ManifestName || err != nil || json.Unmarshal(data, &b.Manifest) != nil || b.Manifest.Kind != kind {
				return nil, ErrForeign
			}
			if b.Manifest.Format != Version {
				return nil, fmt.Errorf("bundle: version %d of the format: %w that this version can read", b.Manifest.Format, ErrForeign)
			}
			continue
		}
		b.files[h.Name] = data // of one that is cut off, what there is
		if err != nil {
			return b, ErrCut
		}
	}
}

// whole says whether all that the manifest lists is there.
func (b *Bundle) whole() error {
	for _, e := range b.Manifest.Files {
		if len(b.files[e.Name]) != e.Bytes {
			return fmt.Errorf("%s: %w", e.Name, ErrCut)
		}
	}
	return nil
}

// File returns a file's content. The error says why it is missing.
func (b *Bundle) File(name string) ([]byte, error) {
	if data, ok := b.files[name]; ok {
		return data, nil
	}
	for _, m := range b.Manifest.Missing {
		if m.Name == name {
			return nil, fmt.Errorf("bundle: there is no %s in it: %s", name, m.Why)
		}
	}
	return nil, fmt.Errorf("bundle: there is no %s in it", name)
}

// Rules returns all rules that iptables-save printed, one after the other; of a node
// in nftables mode what nft printed.
func (b *Bundle) Rules() ([]byte, error) {
	if nft := b.files[NFTRules]; bytes.Contains(nft, []byte("table ip kube-proxy {")) || bytes.Contains(nft, []byte("table ip6 kube-proxy {")) {
		return nft, nil
	}
	var all bytes.Buffer
	for _, e := range b.Manifest.Files {
		if strings.HasPrefix(e.Name, RulesDir) && strings.HasSuffix(e.Name, "-save.txt") {
			all.Write(b.files[e.Name])
		}
	}
	if all.Len() == 0 {
		return nil, errors.New("bundle: there are no rules in it: manifest.json says why")
	}
	return all.Bytes(), nil
}
