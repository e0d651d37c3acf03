package conversation

import (
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// An EventType says what has happened.
type EventType byte

const (
	// Welcomed: requests can be made from now on.
	Welcomed EventType = iota + 1
	// Response: a request has succeeded. Body is its result.
	Response
	// Failure: a request has failed, with Err.
	Failure
	// Item: an item waits in a stream.
	Item
	// CreditRaised: the server takes more items on a stream.
	CreditRaised
	// Call: the server calls Name in the session of Token. Body has the params, or nil; Delay is its deadline. Stream is the
	// number of the call: answer it once.
	Call
	// Withdrawn: the server has withdrawn the call Stream, which was answered: stop its handler.
	Withdrawn
	// GoAway: the server accepts no new requests on this connection. Name is the reason, Delay when to connect again.
	GoAway
	// Notice: an EVENT with a Name for the session of Token. Body is its data.
	Notice
	// Ended: the connection has ended. Err has the reason, and the code of the fatal error or 0.
	Ended
)

// An Event is something that the server has caused. Its fields are set as its type says. Body is one valid value, and a view of the
// bytes received: copy it to keep it.
type Event struct {
	Type        EventType
	Stream      uint32
	Name        string
	Body        []byte
	Token       wire.Token
	Delay       time.Duration
	Traceparent string
	Err         *Error
}
