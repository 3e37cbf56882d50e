package archtest

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// file is one parsed Go file.
type file struct {
	name    string // slash-separated, relative to the module
	test    bool   // name ends in _test.go
	imports []string
	ast     *ast.File
}

func (f file) dir() string { return path.Dir(f.name) }

// tree is a parsed module.
type tree struct {
	module string
	files  []file // in lexical order
}

func load(fsys fs.FS) (tree, error) {
	var t tree
	mod, err := fs.ReadFile(fsys, "go.mod")
	if err != nil {
		return t, fmt.Errorf("archtest: reading the module file: %w", err)
	}
	for line := range strings.Lines(string(mod)) {
		if name, ok := strings.CutPrefix(line, "module "); ok {
			t.module = strings.TrimSpace(name)
		}
	}
	if t.module == "" {
		return t, errors.New("archtest: go.mod names no module")
	}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return enter(fsys, name)
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		f, err := parse(fsys, name)
		if err != nil {
			return err
		}
		t.files = append(t.files, f)
		return nil
	})
	if err != nil {
		return t, fmt.Errorf("archtest: reading the tree: %w", err)
	}
	return t, nil
}

// enter returns fs.SkipDir for a folder that is no part of the module.
func enter(fsys fs.FS, name string) error {
	if name == "." {
		return nil
	}
	base := path.Base(name)
	if base == "testdata" || base == "vendor" || base[0] == '.' || base[0] == '_' {
		return fs.SkipDir
	}
	if _, err := fs.Stat(fsys, path.Join(name, "go.mod")); err == nil {
		return fs.SkipDir
	}
	return nil
}

func parse(fsys fs.FS, name string) (file, error) {
	f := file{name: name, test: strings.HasSuffix(name, "_test.go")}
	src, err := fs.ReadFile(fsys, name)
	if err != nil {
		return f, err
	}
	f.ast, err = parser.ParseFile(token.NewFileSet(), name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return f, err
	}
	for _, spec := range f.ast.Imports {
		imp, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return f, fmt.Errorf("%s: import %s: %w", name, spec.Path.Value, err)
		}
		f.imports = append(f.imports, imp)
	}
	return f, nil
}

// dirs lists the folders that hold Go files, in lexical order.
func (t tree) dirs() []string {
	var dirs []string
	for _, f := range t.files {
		dirs = append(dirs, f.dir())
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// in returns the files of one folder.
func (t tree) in(dir string) []file {
	var files []file
	for _, f := range t.files {
		if f.dir() == dir {
			files = append(files, f)
		}
	}
	return files
}

// cycle returns packages of the folder that import each other in a circle, the
// first one repeated at the end, or nil. Tests count: the compiler accepts
// external tests that close a circle, a reader does not.
func (t tree) cycle(folder string) []string {
	next := map[string][]string{}
	for _, f := range t.files {
		for _, imp := range f.imports {
			if to, ok := strings.CutPrefix(imp, t.module+"/"); ok && to != f.dir() && within(to, folder) {
				next[f.dir()] = append(next[f.dir()], to)
			}
		}
	}
	done := map[string]bool{}
	var walk func(dir string, trail []string) []string
	walk = func(dir string, trail []string) []string {
		if i := slices.Index(trail, dir); i >= 0 {
			return append(slices.Clone(trail[i:]), dir)
		}
		if done[dir] {
			return nil
		}
		done[dir] = true
		for _, to := range next[dir] {
			if c := walk(to, append(slices.Clone(trail), dir)); c != nil {
				return c
			}
		}
		return nil
	}
	for _, dir := range t.dirs() {
		if within(dir, folder) {
			if c := walk(dir, nil); c != nil {
				return c
			}
		}
	}
	return nil
}
