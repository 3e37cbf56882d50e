package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/trace"
)

// newReasonsTopic is what `kptrace help reasons` prints. It is no verb.
func newReasonsTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString(`Why a connection failed, as a stable code: in the last column of kptrace follow,
as reason in -o json and in metrics, and with all that is known in kptrace show ID.
Where the evidence does not suffice, the outcome is unknown and says what is
missing. docs/reasons.md has the same.
`)
	for _, r := range trace.Reasons() {
		fmt.Fprintf(&b, "\n%s\n    %s\n    Known by: %s\n    Look at:  %s\n", r.Code, r.Sentence, r.Evidence, r.Next)
	}
	return &cobra.Command{Use: "reasons", Short: "Why connections fail: all reasons, and what to look at", Long: b.String()}
}
