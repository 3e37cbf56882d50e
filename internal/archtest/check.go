package archtest

import (
	"fmt"
	"go/ast"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Violation is one breach of the rules.
type Violation struct {
	// Where is the file, or the folder of the package, relative to the module.
	Where string
	// What says which rule it breaks and how.
	What string
}

// String returns "where: what".
func (v Violation) String() string { return v.Where + ": " + v.What }

// Check holds the Go module whose root is fsys against the rules and returns
// what breaks them, in the order of the files. The error is for a tree that
// cannot be read or parsed. Folders that the go command ignores (testdata,
// vendor, names that begin with a dot or an underscore) and nested modules are
// left out.
func Check(fsys fs.FS, rules Rules) ([]Violation, error) {
	t, err := load(fsys)
	if err != nil {
		return nil, err
	}
	var all []Violation
	add := func(where, format string, args ...any) {
		all = append(all, Violation{Where: where, What: fmt.Sprintf(format, args...)})
	}

	imports := 0
	for _, f := range t.files {
		imports += len(f.imports)
		for _, imp := range f.imports {
			if what := rules.judge(t.module, f, imp); what != "" {
				add(f.name, "%s", what)
			}
		}
		if hasInit(f.ast) && !ast.IsGenerated(f.ast) {
			add(f.name, "func init is not allowed: start things in Run, build tables in functions")
		}
	}
	// A walk that found nothing to judge would pass forever.
	if imports == 0 {
		add(".", "no imports found: the checker looks in the wrong place")
	}
	for _, dir := range t.dirs() {
		if rules.rank(top(dir)) < 0 {
			add(dir, "top-level folder has no place in the order %s", strings.Join(rules.Order, " < "))
		}
		if what := commentProblem(t.in(dir)); what != "" {
			add(dir, "%s", what)
		}
	}
	for _, folder := range rules.Free {
		if cycle := t.cycle(folder); cycle != nil {
			add(cycle[0], "import cycle: %s", strings.Join(cycle, " -> "))
		}
	}
	return all, nil
}

// judge says what is wrong with one import of a file, or nothing.
func (r Rules) judge(module string, f file, imp string) string {
	own, ok := strings.CutPrefix(imp, module+"/")
	if !ok {
		if imp == module {
			return "imports the module root, which holds no package"
		}
		return r.judgeForeign(f, imp)
	}
	from, to := f.dir(), own
	if from == to { // an external test of its own package
		return ""
	}
	a, b := top(from), top(to)
	switch {
	case r.rank(b) < 0:
		return fmt.Sprintf("imports %s, whose folder has no place in the order", to)
	case a != b && r.rank(b) > r.rank(a):
		return fmt.Sprintf("imports %s: %s is right of %s", to, b, a)
	case a != b || r.free(a) || within(from, to):
		return ""
	case f.test && strings.HasSuffix(path.Base(to), "test"):
		// The conformance suites (proxytest) exist to be run by the tests
		// of the packages beside them.
		return ""
	}
	return fmt.Sprintf("imports %s: inside %s a package imports its ancestors only", to, a)
}

// judgeForeign holds an import from outside the module against the homes.
func (r Rules) judgeForeign(f file, imp string) string {
	for _, h := range r.Homes {
		if !slices.ContainsFunc(h.Imports, func(p string) bool { return within(imp, p) }) {
			continue
		}
		if slices.ContainsFunc(h.Folders, func(p string) bool { return within(f.dir(), p) }) {
			continue
		}
		if len(h.Folders) == 0 {
			return fmt.Sprintf("imports %s, which is allowed nowhere", imp)
		}
		return fmt.Sprintf("imports %s, whose home is %s", imp, strings.Join(h.Folders, ", "))
	}
	return ""
}

func hasInit(f *ast.File) bool {
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
			return true
		}
	}
	return false
}

// commentProblem says what is wrong with the package comment of the files of
// one folder. A package that consists of tests only has its comment in a test.
func commentProblem(files []file) string {
	only := slices.DeleteFunc(slices.Clone(files), func(f file) bool { return f.test })
	if len(only) == 0 {
		only = files
	}
	for _, f := range only {
		doc := f.ast.Doc.Text()
		if doc == "" || ast.IsGenerated(f.ast) {
			continue
		}
		if name := f.ast.Name.Name; name != "main" && !strings.HasPrefix(doc, "Package "+strings.TrimSuffix(name, "_test")) {
			return fmt.Sprintf("package comment in %s must begin with \"Package %s\"", f.name, name)
		}
		return ""
	}
	return "package has no comment"
}
