package record

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	magic      = "KPTRACE\x01"
	maxPayload = 256 << 20
	headLen    = 5
	frameLen   = 9
)

// Kind tells what a record is.
type Kind byte

// The kinds of records.
const (
	KindHeader Kind = 'H'
	KindState  Kind = 'S'
	KindFrame  Kind = 'F'
	KindLoss   Kind = 'L'
	KindEnd    Kind = 'E'
	KindRules  Kind = 'R'
	KindNames  Kind = 'N'

	KindAffinity Kind = 'A'
)

// Header says where a recording comes from.
type Header struct {
	Version string     `json:"version"`
	Node    string     `json:"node"`
	Mode    proxy.Mode `json:"mode"`
	// Started is when it began.
	Started time.Time `json:"started"`
	// MasqueradeMark is the packet mark of traffic to masquerade.
	MasqueradeMark uint32 `json:"masqueradeMark"`
	// EntriesDecide says that no rules reported picks.
	EntriesDecide bool `json:"entriesDecide,omitempty"`
	// Addrs are the addresses of the node's interfaces, but for loopback's, when it
	// began.
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// Redacted says that names were replaced.
	Redacted bool `json:"redacted,omitempty"`
}

// State is a generation of intent and the rules that followed it.
type State struct {
	Mode proxy.Mode `json:"mode"`
	// From is since when it held.
	From     time.Time       `json:"from"`
	Snapshot *proxy.Snapshot `json:"snapshot"`
	Overlay  proxy.Overlay   `json:"overlay"`
	// Rules4 and Rules6 are the rules of the families as iptables-save prints
	// them, empty if there are none.
	Rules4 string `json:"rules4,omitempty"`
	Rules6 string `json:"rules6,omitempty"`
}

// Rules are the rules that traces of paths are to be understood by, as they were
// at one time.
type Rules struct {
	Source trace.SourceID `json:"source"`
	// From is when reading them began, in nanoseconds since 1970.
	From int64 `json:"from"`
	// Rules4 and Rules6 are as in State.
	Rules4 string `json:"rules4,omitempty"`
	Rules6 string `json:"rules6,omitempty"`
	// Chains are what nf_tables knows besides.
	Chains []Chain `json:"chains,omitempty"`
}

// Chain is a chain of nf_tables: the handles of its rules, in their order, and
// its hook where its name does not tell.
type Chain struct {
	Family  uint8    `json:"family"`
	Table   string   `json:"table"`
	Name    string   `json:"name"`
	Hook    string   `json:"hook,omitempty"`
	Handles []uint64 `json:"handles,omitempty"`
}

// Names are what numbers in frames mean: devices by index, and the kernel's
// reasons for drops. They hold from here on.
type Names struct {
	Devices map[uint32]string `json:"devices,omitempty"`
	Reasons map[uint32]string `json:"reasons,omitempty"`
}

// Affinity is what was known of clients of Services with session affinity when the
// recording began; it may have what its first frames tell again.
type Affinity struct {
	// Complete says that the kernel had no others.
	Complete bool `json:"complete"`
	// Clients are in the order in which they were seen last.
	Clients []Client `json:"clients,omitempty"`
}

// Client is a client of a Service with session affinity.
type Client struct {
	Addr     netip.Addr     `json:"addr"`
	Service  proxy.PortName `json:"service"`
	Endpoint netip.AddrPort `json:"endpoint"`
	// Last is when it was seen, in nanoseconds since 1970; Exact that this is not
	// from the kernel's list, which may be wrong by a second.
	Last  int64 `json:"last"`
	Exact bool  `json:"exact,omitempty"`
	// Evicted says that others have driven it out of the kernel's list.
	Evicted bool `json:"evicted,omitempty"`
}

// Loss is what was missed, by the node's sources or by the recorder.
type Loss struct {
	Source trace.SourceID `json:"source"`
	From   int64          `json:"from"`
	To     int64          `json:"to"`
	Events uint64         `json:"events"`
	Where  string         `json:"where"`
}

// End closes a recording.
type End struct {
	At     time.Time `json:"at"`
	Frames uint64    `json:"frames"`
	// Dropped counts the frames that the recorder did not come to.
	Dropped uint64 `json:"dropped"`
}

// Writer writes a recording. It has one user at a time.
type Writer struct {
	w      *bufio.Writer
	frames uint64
	buf    []byte
}

// NewWriter begins a recording.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	out := &Writer{w: bufio.NewWriterSize(w, 64<<10)}
	if _, err := out.w.WriteString(magic); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return out, out.json(KindHeader, h)
}

// State writes a generation of intent, before the frames that it explains.
func (w *Writer) State(s State) error { return w.json(KindState, s) }

// Rules writes rules for traces of paths.
func (w *Writer) Rules(r Rules) error { return w.json(KindRules, r) }

// Affinity writes what was known of clients, before any frame.
func (w *Writer) Affinity(a Affinity) error { return w.json(KindAffinity, a) }

// Names writes what numbers mean.
func (w *Writer) Names(n Names) error { return w.json(KindNames, n) }

// Frame writes what a source read.
func (w *Writer) Frame(f trace.Frame) error {
	b := append(w.buf[:0], byte(f.Source))
	b = binary.LittleEndian.AppendUint64(b, uint64(f.Time)) //nolint:gosec // read back the same way
	b = append(b, f.Data...)
	w.buf = b
	w.frames++
	return w.record(KindFrame, b)
}

// Loss writes what was missed.
func (w *Writer) Loss(l trace.Loss) error {
	return w.json(KindLoss, Loss{l.Source, l.From, l.To, l.Events, l.Where})
}

// End ends the recording; dropped counts the frames that are missing in it.
func (w *Writer) End(dropped uint64) error {
	if err := w.json(KindEnd, End{time.Now(), w.frames, dropped}); err != nil {
		return err
	}
	return w.Flush()
}

// Flush writes what is held back.
func (w *Writer) Flush() error {
	if err := w.w.Flush(); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

func (w *Writer) json(k Kind, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return w.record(k, b)
}

func (w *Writer) record(k Kind, payload []byte) error {
	var head [headLen]byte
	head[0] = byte(k)
	binary.LittleEndian.PutUint32(head[1:], uint32(len(payload))) //nolint:gosec // bounded by what a source reads
	sum := crc32.Update(crc32.ChecksumIEEE(head[:]), crc32.IEEETable, payload)
	_, err := w.w.Write(head[:])
	if err == nil {
		_, err = w.w.Write(payload)
	}
	if err == nil {
		_, err = w.w.Write(binary.LittleEndian.AppendUint32(nil, sum))
	}
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// The errors of a Reader, beside those of what it reads from.
var (
	// ErrForeign: this is no recording of kptrace's, or one of a version that
	// this one cannot read.
	ErrForeign = errors.New("this is no recording that this kptrace can read")
	// ErrCut: the recording ends in the middle of it.
	ErrCut = errors.New("the recording was cut off here; what came before is used")
	// ErrDamaged: a record is not as it was written.
	ErrDamaged = errors.New("the recording is damaged here; what came before is used")
)

// Item is one record. Exactly one of its fields is set; a Frame's Data is valid
// until the next call.
type Item struct {
	State *State
	Rules *Rules
	Names *Names
	Frame *trace.Frame
	Loss  *trace.Loss
	End   *End

	Affinity *Affinity
}

// Reader reads a recording.
type Reader struct {
	r      *bufio.Reader
	header Header
	buf    []byte
	frame  trace.Frame
	ended  bool
}

// NewReader reads a recording's beginning. The error is ErrForeign if it is none.
func NewReader(r io.Reader) (*Reader, error) {
	in := &Reader{r: bufio.NewReaderSize(r, 64<<10)}
	var m [len(magic)]byte
	if _, err := io.ReadFull(in.r, m[:]); err != nil || string(m[:len(m)-1]) != magic[:len(magic)-1] {
		return nil, fmt.Errorf("record: %w", ErrForeign)
	}
	if m[len(m)-1] != magic[len(magic)-1] {
		return nil, fmt.Errorf("record: version %d of the format: %w", m[len(m)-1], ErrForeign)
	}
	k, payload, err := in.next()
	if errors.Is(err, io.EOF) {
		err = ErrCut
	}
	if err == nil && k != KindHeader {
		err = ErrDamaged
	}
	if err == nil {
		err = json.Unmarshal(payload, &in.header)
	}
	if err != nil {
		return nil, fmt.Errorf("record: reading the header: %w", err)
	}
	return in, nil
}

// Header says where the recording comes from.
func (r *Reader) Header() Header { return r.header }

// Next returns the next record. At the end it is io.EOF, after a cut or damage
// ErrCut or ErrDamaged.
func (r *Reader) Next() (Item, error) {
	for {
		k, payload, err := r.next()
		if err != nil {
			if errors.Is(err, io.EOF) && !r.ended {
				err = ErrCut
			}
			return Item{}, err
		}
		switch k {
		case KindState:
			s := new(State)
			if err := json.Unmarshal(payload, s); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			return Item{State: s}, nil
		case KindRules:
			x := new(Rules)
			if err := json.Unmarshal(payload, x); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			return Item{Rules: x}, nil
		case KindNames:
			x := new(Names)
			if err := json.Unmarshal(payload, x); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			return Item{Names: x}, nil
		case KindAffinity:
			x := new(Affinity)
			if err := json.Unmarshal(payload, x); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			return Item{Affinity: x}, nil
		case KindFrame:
			if len(payload) < frameLen {
				return Item{}, ErrDamaged
			}
			r.frame = trace.Frame{
				Source: trace.SourceID(payload[0]), Data: payload[frameLen:],
				Time: int64(binary.LittleEndian.Uint64(payload[1:])), //nolint:gosec // written the same way
			}
			return Item{Frame: &r.frame}, nil
		case KindLoss:
			var l Loss
			if err := json.Unmarshal(payload, &l); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			return Item{Loss: &trace.Loss{Source: l.Source, From: l.From, To: l.To, Events: l.Events, Where: l.Where}}, nil
		case KindEnd:
			e := new(End)
			if err := json.Unmarshal(payload, e); err != nil {
				return Item{}, fmt.Errorf("%w: %w", ErrDamaged, err)
			}
			r.ended = true
			return Item{End: e}, nil
		case KindHeader:
			return Item{}, ErrDamaged
		}
	}
}

// next reads one record's kind and payload.
func (r *Reader) next() (Kind, []byte, error) {
	var head [headLen]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = ErrCut
		}
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[1:])
	if n > maxPayload {
		return 0, nil, ErrDamaged
	}
	// No more than what is there is held, whatever the length says.
	r.buf = r.buf[:0]
	for want := int(n) + 4; len(r.buf) < want; {
		at := len(r.buf)
		step := min(want-at, 1<<20)
		r.buf = append(r.buf, make([]byte, step)...)
		if _, err := io.ReadFull(r.r, r.buf[at:]); err != nil {
			return 0, nil, ErrCut
		}
	}
	payload, sum := r.buf[:n], binary.LittleEndian.Uint32(r.buf[n:])
	if crc32.Update(crc32.ChecksumIEEE(head[:]), crc32.IEEETable, payload) != sum {
		return 0, nil, ErrDamaged
	}
	return Kind(head[0]), payload, nil
}
