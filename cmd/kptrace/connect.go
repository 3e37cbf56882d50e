package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kptrace/kptrace/exporters/relay"
)

// addSocketFlag adds --socket to a verb that asks running nodes.
func addSocketFlag(cmd *cobra.Command, sockets *[]string) {
	cmd.Flags().StringArrayVar(sockets, "socket", nil,
		"socket of a node to ask, repeatable (default: all that run here; $KPTRACE_SOCKET)")
}

// connect dials the nodes named, or all that run here. With wait it waits
// until there is one, and says so once on talk.
func connect(ctx context.Context, sockets []string, wait bool, talk io.Writer) ([]*relay.Client, error) {
	said := false
	for {
		clients, err := dialAll(sockets)
		if err == nil || !wait || !errors.Is(err, relay.ErrNotRunning) {
			return clients, err
		}
		if !said {
			said = true
			fmt.Fprintln(talk, "waiting for a kptrace to start")
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func dialAll(sockets []string) ([]*relay.Client, error) {
	if len(sockets) == 0 {
		found, err := relay.Discover()
		if err != nil {
			return nil, err
		}
		sockets = found
	}
	var clients []*relay.Client
	for _, path := range sockets {
		c, err := relay.Dial(path)
		if err != nil {
			closeAll(clients)
			return nil, err
		}
		clients = append(clients, c)
	}
	return clients, nil
}

func closeAll(clients []*relay.Client) {
	for _, c := range clients {
		_ = c.Close() // nothing is lost with it
	}
}

// terminal describes a writer that may be a terminal.
type terminal struct {
	// is says that rows can be rewritten, colour that colours are welcome.
	is, colour bool
	size       func() (width, height int)
}

func terminalOf(w io.Writer) terminal {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		return terminal{}
	}
	return terminal{
		is: true, colour: os.Getenv("NO_COLOR") == "",
		size: func() (int, int) {
			width, height, err := term.GetSize(int(f.Fd()))
			if err != nil || width <= 0 || height <= 0 {
				return 80, 24
			}
			return width, height
		},
	}
}
