// Package wire has the bytes of the protocol (zcp1.md): frames, the bodies of each kind, error codes and tokens. It does no I/O
// and keeps no state but that of an incomplete frame.
package wire

import "encoding/binary"

// Sizes and limits of frames (zcp1.md, sections 5.2 and 5.3).
const (
	Version    = 1
	lengthSize = 4
	HeaderSize = 68
	MinLength  = HeaderSize - lengthSize
	MaxStream  = 1<<32 - 1

	// MaxLengthBeforeSession is the largest length on a connection without a session, whatever WELCOME allows.
	MaxLengthBeforeSession = 16_384
)

// A Kind is the kind of a frame (zcp1.md, sections 6.1 and 18.2).
type Kind byte

// The kinds.
const (
	Welcome  Kind = 0x01
	Request  Kind = 0x02
	Response Kind = 0x03
	Error    Kind = 0x04
	Cancel   Kind = 0x05
	Ping     Kind = 0x06
	Pong     Kind = 0x07
	GoAway   Kind = 0x08
	Event    Kind = 0x09
	Open     Kind = 0x10
	Item     Kind = 0x11
	End      Kind = 0x12
	Credit   Kind = 0x13
	Call     Kind = 0x18
	Result   Kind = 0x19
	Failure  Kind = 0x1a
	Withdraw Kind = 0x1b
)

// A Side is the receiver of a frame.
type Side byte

// The sides, which can be combined.
const (
	Client Side = 1 << iota
	Server
)

// An Extension is what a server announces in WELCOME: some kinds exist only with it.
type Extension byte

// The extensions, which can be combined.
const (
	Streams Extension = 1 << iota
	Calls
)

type streamRule byte

const (
	onConnection streamRule = iota // stream 0
	onStream                       // not stream 0
	onAny
)

type kindRule struct {
	name   string
	sentTo Side
	stream streamRule
	partOf Extension // 0 for the kinds that are always there
}

// rules are indexed by kind; one without a name does not exist.
var rules = [256]kindRule{
	Welcome:  {"WELCOME", Client, onConnection, 0},
	Request:  {"REQUEST", Server, onStream, 0},
	Response: {"RESPONSE", Client, onStream, 0},
	Error:    {"ERROR", Client, onAny, 0},
	Cancel:   {"CANCEL", Server, onStream, 0},
	Ping:     {"PING", Client | Server, onConnection, 0},
	Pong:     {"PONG", Client | Server, onConnection, 0},
	GoAway:   {"GOAWAY", Client, onConnection, 0},
	Event:    {"EVENT", Client, onConnection, 0},
	Open:     {"OPEN", Server, onStream, Streams},
	Item:     {"ITEM", Client | Server, onStream, Streams},
	End:      {"END", Server, onStream, Streams},
	Credit:   {"CREDIT", Client | Server, onStream, Streams},
	Call:     {"CALL", Client, onStream, Calls},
	Result:   {"RESULT", Server, onStream, Calls},
	Failure:  {"FAILURE", Server, onStream, Calls},
	Withdraw: {"WITHDRAW", Client, onStream, Calls},
}

// Kinds returns all kinds by their names.
func Kinds() map[string]Kind {
	kinds := map[string]Kind{}
	for kind, rule := range rules {
		if rule.name != "" {
			kinds[rule.name] = Kind(kind)
		}
	}
	return kinds
}

// String returns the name of a kind, such as REQUEST; "" for one that does not exist.
func (k Kind) String() string { return rules[k].name }

// HasBody reports whether frames of this kind have a body.
func (k Kind) HasBody() bool {
	switch k {
	case Cancel, Ping, Pong, End, Withdraw:
		return false
	default:
		return true
	}
}

// A Frame is a frame with a valid header.
type Frame struct {
	Kind      Kind
	Stream    uint32
	Timestamp uint64 // the server's time in milliseconds since 1970
	Salt      uint64
	Counter   uint64
	Token     Token
	Body      []byte // a view of the bytes that were read
}

// Length returns the field length: the bytes behind it.
func (f *Frame) Length() int { return MinLength + len(f.Body) }

// Append encodes a frame behind dst.
func (f *Frame) Append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(f.Length()))
	dst = append(dst, Version, byte(f.Kind), 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, f.Stream)
	dst = binary.BigEndian.AppendUint64(dst, f.Timestamp)
	dst = binary.BigEndian.AppendUint64(dst, f.Salt)
	dst = binary.BigEndian.AppendUint64(dst, f.Counter)
	dst = append(dst, f.Token[:]...)
	return append(dst, f.Body...)
}

// parse reads a complete frame with a valid header.
func parse(data []byte) Frame {
	return Frame{
		Kind:      Kind(data[5]),
		Stream:    binary.BigEndian.Uint32(data[8:]),
		Timestamp: binary.BigEndian.Uint64(data[12:]),
		Salt:      binary.BigEndian.Uint64(data[20:]),
		Counter:   binary.BigEndian.Uint64(data[28:]),
		Token:     Token(data[36:HeaderSize]),
		Body:      data[HeaderSize:],
	}
}
