// Package text shows flows to people and scripts: one line a connection,
// updated in place on a terminal, or JSON whose field names are an interface.
//
// It is driven by trace.Messages, so it shows a stream from another process
// and one from its own alike. What is data goes to Config.Out; off a terminal,
// what is talk (scope, explanations, the summary) goes to Config.Err.
package text
