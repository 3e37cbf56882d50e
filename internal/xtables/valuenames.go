package xtables

import (
	"slices"
	"strconv"
	"strings"
)

func logLevel(s string) string {
	levels := []string{"emerg", "alert", "crit", "error", "warning", "notice", "info", "debug"}
	if i := slices.Index(levels, s); i >= 0 {
		return strconv.Itoa(i)
	}
	switch s {
	case "panic":
		return "0"
	case "err":
		return "3"
	case "warn":
		return "4"
	}
	return s
}

func rejectName(f Family, s string) string {
	short := map[string]string{
		"net-unreach": "icmp-net-unreachable", "host-unreach": "icmp-host-unreachable",
		"proto-unreach": "icmp-proto-unreachable", "port-unreach": "icmp-port-unreachable",
		"net-prohib": "icmp-net-prohibited", "host-prohib": "icmp-host-prohibited",
		"admin-prohib": "icmp-admin-prohibited", "tcp-rst": "tcp-reset",
	}
	if f == IPv6 {
		short = map[string]string{
			"no-route": "icmp6-no-route", "adm-prohibited": "icmp6-adm-prohibited",
			"addr-unreach": "icmp6-addr-unreachable", "port-unreach": "icmp6-port-unreachable",
			"policy-fail": "icmp6-policy-fail", "reject-route": "icmp6-reject-route",
		}
	}
	if strings.HasPrefix(s, "icmp") {
		return s
	}
	if full, ok := short[s]; ok {
		return full
	}
	return s
}

func protoNumber(s string) string {
	name := protoName(s)
	for _, p := range protocols {
		if p.name == name {
			return p.number
		}
	}
	return s
}

func icmpType(s string) string {
	switch s {
	case "255":
		return "any"
	case "echo-reply", "pong":
		return "0"
	case "destination-unreachable":
		return "3"
	case "network-unreachable":
		return "3/0"
	case "host-unreachable":
		return "3/1"
	case "protocol-unreachable":
		return "3/2"
	case "port-unreachable":
		return "3/3"
	case "fragmentation-needed":
		return "3/4"
	case "redirect":
		return "5"
	case "echo-request", "ping":
		return "8"
	case "time-exceeded", "ttl-exceeded":
		return "11"
	case "parameter-problem":
		return "12"
	}
	return s
}

func icmp6Type(s string) string {
	switch s {
	case "destination-unreachable":
		return "1"
	case "no-route":
		return "1/0"
	case "port-unreachable":
		return "1/4"
	case "packet-too-big":
		return "2"
	case "time-exceeded", "ttl-exceeded":
		return "3"
	case "parameter-problem":
		return "4"
	case "echo-request", "ping":
		return "128"
	case "echo-reply", "pong":
		return "129"
	case "router-solicitation":
		return "133"
	case "router-advertisement":
		return "134"
	case "neighbour-solicitation", "neighbor-solicitation":
		return "135"
	case "neighbour-advertisement", "neighbor-advertisement":
		return "136"
	case "redirect":
		return "137"
	}
	return s
}
