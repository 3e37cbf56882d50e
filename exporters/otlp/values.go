package otlp

import (
	"unicode/utf8"

	"go.opentelemetry.io/otel/attribute"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
)

// pieces hands out values of a type that last until the next rewind: what a
// request is made of is used again for the next one, or it would be most of
// what there is to collect as garbage.
type pieces[T any] struct {
	blocks [][]T
	used   int
}

const blockSize = 128

// next returns a value as whoever had it before left it.
func (p *pieces[T]) next() *T {
	i := p.used / blockSize
	if i == len(p.blocks) {
		p.blocks = append(p.blocks, make([]T, blockSize))
	}
	v := &p.blocks[i][p.used%blockSize]
	p.used++
	return v
}

func (p *pieces[T]) rewind() { p.used = 0 }

// valueMaker makes attributes in the form in which they are sent.
type valueMaker struct {
	// length is how many characters a text may have, without a limit if it is
	// negative.
	length int

	pairs  pieces[commonpb.KeyValue]
	values pieces[commonpb.AnyValue]
	texts  pieces[commonpb.AnyValue_StringValue]
	ints   pieces[commonpb.AnyValue_IntValue]
}

// rewind takes back all that was made.
func (m *valueMaker) rewind() {
	m.pairs.rewind()
	m.values.rewind()
	m.texts.rewind()
	m.ints.rewind()
}

// some makes at most so many attributes, all where most is negative, into a
// list whose room is used, and says how many there were beyond.
func (m *valueMaker) some(into []*commonpb.KeyValue, a []attribute.KeyValue, most int) (out []*commonpb.KeyValue, dropped uint32) {
	if most >= 0 && len(a) > most {
		a, dropped = a[:most], uint32(len(a)-most)
	}
	out = into[:0]
	for i := range a {
		kv := m.pairs.next()
		kv.Key, kv.Value = string(a[i].Key), m.value(&a[i].Value)
		out = append(out, kv)
	}
	return out, dropped
}

func (m *valueMaker) value(v *attribute.Value) *commonpb.AnyValue {
	out := m.values.next()
	switch v.Type() {
	case attribute.INT64:
		n := m.ints.next()
		n.IntValue = v.AsInt64()
		out.Value = n
	case attribute.FLOAT64:
		out.Value = &commonpb.AnyValue_DoubleValue{DoubleValue: v.AsFloat64()}
	case attribute.BOOL:
		out.Value = &commonpb.AnyValue_BoolValue{BoolValue: v.AsBool()}
	case attribute.STRINGSLICE:
		list := &commonpb.ArrayValue{}
		for _, s := range v.AsStringSlice() {
			text := m.values.next()
			text.Value = m.text(s)
			list.Values = append(list.Values, text)
		}
		out.Value = &commonpb.AnyValue_ArrayValue{ArrayValue: list}
	default: // a text, or in the resource something that reads as one
		out.Value = m.text(v.String())
	}
	return out
}

func (m *valueMaker) text(s string) *commonpb.AnyValue_StringValue {
	if m.length >= 0 && utf8.RuneCountInString(s) > m.length {
		s = string([]rune(s)[:m.length])
	}
	out := m.texts.next()
	out.StringValue = s
	return out
}
