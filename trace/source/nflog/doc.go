// Package nflog reads what tagged NFLOG rules report: which endpoint a rule
// picked, what was refused, and the packets that mark the life of a
// connection. Source receives, Decoder makes Events of it, both without
// allocating; Tap reads a group of few packets whole.
//
// An NFLOG group has one listener per network namespace. A group that another
// program holds is never taken: Run fails with a HeldError that names it.
//
// Times: the kernel stamps packets in the hooks PREROUTING, INPUT and FORWARD
// while some socket of the machine wants time stamps, so a Source keeps one
// open. In OUTPUT and POSTROUTING it stamps none; such an Event has
// KernelTime false and the time of its neighbour in the Frame, or of the Frame
// itself where no event has a stamp. That is off by at most Config.Timeout and
// Config.Tick together, 15 ms by default, so do not take a latency from it.
package nflog
