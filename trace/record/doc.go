// Package record keeps what a node saw, so that it can be looked at again, on
// another machine and another system: the bytes its sources read, and the state
// and rules they are to be understood by. A recording replays through the same
// decoders and the same correlator as what is live.
//
// # Format
//
// A file begins with 8 bytes: "KPTRACE" and the format's version, 1. Then come
// records, each of
//
//	kind    1 byte: H, A, S, R, N, F, L or E
//	length  4 bytes, little endian, of the payload: at most 256 MiB
//	payload
//	check   4 bytes, little endian: CRC-32 (IEEE) of kind, length and payload
//
// H, the first record, is a Header; A, before all frames, the Affinity of clients
// that were here before; S a State, which holds from here on; R the
// Rules for traces of paths, and N the Names of what frames have numbers for; F a
// frame: its source (1 byte), its time (8 bytes, little endian, nanoseconds since
// 1970) and its bytes; L a loss; E, the last one, says that nothing is missing
// behind it. All but F are JSON. A file without E was cut off: what is readable is
// used. Records of other kinds are skipped, so that newer versions may add some, as
// A, R and N were; so are other fields of JSON.
package record
