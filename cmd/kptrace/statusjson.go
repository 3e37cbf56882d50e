package main

import (
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
)

// statusJSON is a relay.Status as status -o json prints it; the names are an
// interface.
type statusJSON struct {
	Socket          string         `json:"socket"`
	Node            string         `json:"node"`
	Version         string         `json:"version"`
	PID             int            `json:"pid"`
	Started         *time.Time     `json:"started"`
	Mode            string         `json:"mode"`
	Flavour         string         `json:"flavour,omitempty"`
	FlavourReason   string         `json:"flavourReason,omitempty"`
	State           string         `json:"state"`
	StateNotes      []string       `json:"stateNotes"`
	Paths           []string       `json:"paths"`
	Virtual         []virtualJSON  `json:"virtualServers,omitempty"`
	Synced          *time.Time     `json:"synced"`
	SyncError       string         `json:"syncError"`
	Rules           int            `json:"rules"`
	Services        int            `json:"services"`
	Endpoints       int            `json:"endpoints"`
	Problems        []problemJSON  `json:"problems"`
	Skipped         []skippedJSON  `json:"skipped"`
	Sources         []sourceJSON   `json:"sources"`
	NFLogGroups     []uint16       `json:"nflogGroups"`
	Flows           flowTableJSON  `json:"flows"`
	Ring            ringJSON       `json:"ring"`
	History         historyJSON    `json:"history"`
	Lost            []statLossJSON `json:"lost"`
	Exports         []exportJSON   `json:"exports"`
	Sysctls         []sysctlJSON   `json:"sysctls"`
	ConntrackInUse  int            `json:"conntrackEntries"`
	ConntrackAtMost int            `json:"conntrackLimit"`
	NotSeen         []string       `json:"notSeen"`
}

type problemJSON struct {
	File    string `json:"file"`
	Object  string `json:"object"`
	Field   string `json:"field"`
	Message string `json:"message"`
}

type skippedJSON struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Reason    string `json:"reason"`
}

type sourceJSON struct {
	Source        string `json:"source"`
	Frames        uint64 `json:"frames"`
	Bytes         uint64 `json:"bytes"`
	Events        uint64 `json:"events"`
	Lost          uint64 `json:"lost"`
	Overruns      uint64 `json:"overruns"`
	Foreign       uint64 `json:"foreign"`
	Damaged       uint64 `json:"damaged"`
	ReceiveBuffer int    `json:"receiveBuffer"`
	Note          string `json:"note"`
}

type flowTableJSON struct {
	Open    int    `json:"open"`
	Max     int    `json:"max"`
	Evicted uint64 `json:"evicted"`
}

type ringJSON struct {
	Size      int    `json:"size"`
	Published uint64 `json:"published"`
	Readers   int    `json:"readers"`
}

type historyJSON struct {
	Since         *time.Time `json:"since"`
	FailuresSince *time.Time `json:"failuresSince"`
	Failures      int        `json:"failures"`
	FailuresMax   int        `json:"failuresMax"`
	Successes     int        `json:"successes"`
	SuccessesMax  int        `json:"successesMax"`
}

type statLossJSON struct {
	Source string     `json:"source"`
	Where  string     `json:"where"`
	Events uint64     `json:"events"`
	From   *time.Time `json:"from"`
	To     *time.Time `json:"to"`
}

type sysctlJSON struct {
	Name   string `json:"name"`
	Before string `json:"before"`
	Now    string `json:"now"`
}

func toStatusJSON(s *relay.Status, socket string) statusJSON {
	at := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC()
		return &t
	}
	out := statusJSON{
		Socket: socket, Node: s.Node, Version: s.Version, PID: s.PID, Started: at(s.Started), Mode: string(s.Mode),
		Flavour: s.Flavour, FlavourReason: s.FlavourReason, Synced: at(s.Synced), SyncError: s.SyncError,
		Rules: s.Rules, Services: s.Services, Endpoints: s.Endpoints,
		State: s.State, StateNotes: append([]string{}, s.StateNotes...),
		Paths:    append([]string{}, s.Paths...),
		Virtual:  toVirtualJSON(s.Virtual),
		Problems: []problemJSON{}, Skipped: []skippedJSON{}, Sources: []sourceJSON{}, Lost: []statLossJSON{},
		Sysctls: []sysctlJSON{}, NFLogGroups: append([]uint16{}, s.Groups...), NotSeen: append([]string{}, s.Blind...),
		Flows: flowTableJSON(s.Table), Ring: ringJSON(s.Ring),
		History: historyJSON{
			Since: at(s.History.Since), FailuresSince: at(s.History.FailuresSince),
			Failures: s.History.Failures, FailuresMax: s.History.FailuresMax,
			Successes: s.History.Successes, SuccessesMax: s.History.SuccessesMax,
		},
		ConntrackInUse: s.ConntrackEntries, ConntrackAtMost: s.ConntrackLimit,
	}
	for _, p := range s.Problems {
		out.Problems = append(out.Problems, problemJSON(p))
	}
	for _, k := range s.Skipped {
		out.Skipped = append(out.Skipped, skippedJSON(k))
	}
	for _, x := range s.Sources {
		out.Sources = append(out.Sources, sourceJSON{
			Source: x.Source.String(), Frames: x.Frames, Bytes: x.Bytes, Events: x.Events, Lost: x.Lost,
			Overruns: x.Overruns, Foreign: x.Foreign, Damaged: x.Damaged, ReceiveBuffer: x.ReceiveBuffer, Note: x.Note,
		})
	}
	for _, l := range s.Losses {
		out.Lost = append(out.Lost, statLossJSON{
			Source: l.Source.String(), Where: l.Where, Events: l.Events, From: at(time.Unix(0, l.From)), To: at(time.Unix(0, l.To)),
		})
	}
	out.Exports = exportsJSON(s.Exports)
	for _, c := range s.Sysctls {
		out.Sysctls = append(out.Sysctls, sysctlJSON(c))
	}
	return out
}
