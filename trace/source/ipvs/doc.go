// Package ipvs samples IPVS, the kernel's load balancer, which reports nothing
// by itself: the table of virtual servers (/proc/net/ip_vs) for what schedulers
// look at, the table of connections (/proc/net/ip_vs_conn) for their states and
// for the templates that keep clients with a server, and the statistics, which
// moby/ipvs reads by netlink.
//
// A Frame is the text of one of the two tables, whose first line says which.
// Decode is pure. A sample is as old as the poll, two seconds or more; who
// uses one says so.
package ipvs
