// Package guesttest runs tests in a kernel that has IPVS, SCTP and a dummy
// device: this one, where it has them, else a guest of internal/umlguest, one
// boot for a package (Main) or for a group of tests (Group).
//
// No test is skipped for want of a kernel: where neither is to be had the
// tests fail and say what to install. The file that KPTRACE_GUEST_REPORT
// names, where it is set, gets a line about each run, for make test to show.
// With KPTRACE_GUEST_TESTS=elsewhere, which .ci/run sets in one of its two
// passes, no guest is booted, and the report says what was left out.
package guesttest
