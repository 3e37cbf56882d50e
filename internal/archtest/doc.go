// Package archtest keeps the shape of the house. It parses every Go file of
// the module, for every operating system and tests included, and reports what
// breaks the import rule: a package imports only folders to its left, inside a
// folder only its ancestors, and each heavy dependency has one home.
//
// Nothing here asks the go command: the test cache cannot see which files a
// child process read, so such a test would stay green after a forbidden import
// was added. Nor does it resolve build constraints: a forbidden import in a
// _windows.go file is as wrong as any other.
package archtest
