package conversation

import (
	"bytes"
	"fmt"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

type itemState byte

const (
	itemsOpen    itemState = iota
	itemsHalf              // this end has ended its items
	itemsLeaving           // CANCEL was sent; the answer is awaited, and items are dropped
	itemsNone              // answered
)

// An ItemStream is a stream of items (zcp1.md, section 18): a request that produces or takes items before its answer.
//
// Credit is absolute: items and bytes since OPEN. An item may exceed the bytes that are left, and is then the last. Credit is
// granted for what the application has taken, never for what is only stored.
type ItemStream struct {
	// Number is that of the OPEN, which identifies the answer.
	Number uint32
	// HasBegun is whether an ITEM or CREDIT came: the method has begun, so the stream must not be opened again.
	HasBegun bool
	// WasLost is whether it failed because a frame of it was stale, and not by an ERROR of the server.
	WasLost bool

	conversation *Conversation
	token        wire.Token
	state        itemState

	allowed, sent wire.Grant // of this end's items
	window        wire.Grant // what to grant beyond what was taken
	granted       wire.Grant // of the server's items
	received      wire.Grant
	taken         wire.Grant
	bodies        [][]byte // received and not taken
}

// Open queues an OPEN that grants a window. Errors are those of Request, and Unimplemented if the server has no streams,
// ResourceExhausted with limit if as many are open as it takes.
func (c *Conversation) Open(
	method string, params any, token wire.Token, meta wire.Meta, window wire.Grant, now Instant,
) (*ItemStream, error) {
	if err := c.checkOpen(); err != nil {
		return nil, err
	}
	limits := c.welcome.Streams
	if limits == nil {
		return nil, &Error{Code: wire.Unimplemented, Message: "this server has no streams"}
	}
	if c.open >= limits.MaxOpen {
		return nil, &Error{
			Code:    wire.ResourceExhausted,
			Message: "too many streams on this connection; close some",
			Details: map[string]any{"limit": int64(limits.MaxOpen)},
		}
	}
	meta.Credit = &window
	number, err := c.request(wire.Open, method, params, token, &meta, now)
	if err != nil {
		return nil, err
	}
	made := c.requests.inFlight[number]
	made.items = &ItemStream{Number: number, conversation: c, token: token, window: window, granted: window}
	c.requests.inFlight[number] = made
	c.open++
	return made.items, nil
}

// IsOver reports whether the stream was answered.
func (s *ItemStream) IsOver() bool { return s.state == itemsNone }

// HasItem reports whether an item waits. Those that wait can be taken after the answer, too.
func (s *ItemStream) HasItem() bool { return len(s.bodies) > 0 }

// MaySend reports whether an item can be sent now.
func (s *ItemStream) MaySend() bool {
	return s.state == itemsOpen && s.sent.Items < s.allowed.Items && s.sent.Bytes < s.allowed.Bytes
}

// Take returns the body of an item, one of which waits, and sends the credit that is due then. The error is an Error with Internal
// for an item that cannot be decoded: Cancel the stream then.
func (s *ItemStream) Take(now Instant) ([]byte, error) {
	body := s.bodies[0]
	s.bodies[0] = nil
	s.bodies = s.bodies[1:]
	s.taken.Items++
	s.taken.Bytes += uint64(wire.MinLength + len(body))
	if err := msgpack.Scan(body, s.conversation.settings.MaxDepth); err != nil {
		return nil, &Error{Code: wire.Internal, Message: fmt.Sprintf("item %d is invalid: %v", s.taken.Items-1, err)}
	}
	if s.grant() {
		s.conversation.send(wire.Credit, s.Number, s.token, s.granted.Append(nil), now)
	}
	return body, nil
}

// grant raises what is granted once half of the window is used, and reports whether it did. A peer without credit whose items were
// all taken has used all of it, so there is no deadlock.
func (s *ItemStream) grant() bool {
	if s.state == itemsNone {
		return false
	}
	items := max(s.taken.Items+s.window.Items, s.granted.Items) - s.granted.Items
	size := max(s.taken.Bytes+s.window.Bytes, s.granted.Bytes) - s.granted.Bytes
	if items == 0 && size == 0 || items*2 < s.window.Items && size*2 < s.window.Bytes {
		return false
	}
	s.granted.Items += items
	s.granted.Bytes += size
	return true
}

// Send sends an item, which MaySend allows. The error is an Error with InvalidArgument for a value that cannot be sent.
func (s *ItemStream) Send(value any, now Instant) error {
	c := s.conversation
	body, err := msgpack.Append(c.scratch[:0], value)
	if err != nil {
		return &Error{Code: wire.InvalidArgument, Message: err.Error()}
	}
	c.keepScratch(body)
	if fault := tooLarge("item", body, c.welcome.Streams.MaxItem); fault != nil {
		return fault
	}
	s.sent.Items++
	s.sent.Bytes += uint64(wire.MinLength + len(body))
	c.send(wire.Item, s.Number, s.token, body, now)
	return nil
}

// End sends an END: no more items follow. Without effect if none can be sent anyway.
func (s *ItemStream) End(now Instant) {
	if s.state == itemsOpen {
		s.state = itemsHalf
		s.conversation.send(wire.End, s.Number, s.token, nil, now)
	}
}

// leave drops the items that wait, and those to come.
func (s *ItemStream) leave() {
	s.state = itemsLeaving
	s.bodies = nil
}

// receiveOfStream handles a fresh ITEM or CREDIT.
func (c *Conversation) receiveOfStream(frame *wire.Frame) *wire.Fault {
	found, isInFlight := c.requests.inFlight[frame.Stream]
	if !isInFlight {
		c.DroppedUnknown++
		return nil
	}
	stream := found.items
	if stream == nil {
		return broken("ITEM or CREDIT on the stream of a REQUEST")
	}
	if stream.state == itemsLeaving {
		return nil
	}
	stream.HasBegun = true
	if frame.Kind == wire.Credit {
		return stream.raise(frame.Body)
	}
	if stream.received.Items >= stream.granted.Items || stream.received.Bytes >= stream.granted.Bytes {
		return broken("ITEM beyond the credit")
	}
	stream.received.Items++
	stream.received.Bytes += uint64(frame.Length())
	stream.bodies = append(stream.bodies, bytes.Clone(frame.Body)) // the original is part of a larger read
	c.emit(Event{Type: Item, Stream: frame.Stream})
	return nil
}

// raise applies a CREDIT of the server.
func (s *ItemStream) raise(body []byte) *wire.Fault {
	credit, err := wire.ParseCredit(body)
	if err != nil {
		return broken("CREDIT is invalid: " + err.Error())
	}
	if credit.Items < s.allowed.Items || credit.Bytes < s.allowed.Bytes {
		return broken("credit is lower than before")
	}
	s.allowed = credit
	s.conversation.emit(Event{Type: CreditRaised, Stream: s.Number})
	return nil
}
