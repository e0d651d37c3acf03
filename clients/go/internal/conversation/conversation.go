// Package conversation is the client's end of a connection, without I/O: bytes and time in; events, bytes and the next deadline
// out (zcp1.md, sections 6 to 8, 18 and 19).
//
// It decides about WELCOME, the clock offset, the freshness of received frames, which request an answer belongs to, what can be
// sent now, keepalive, and what ends the connection. It knows nothing of sockets, TLS, clocks, retries, and of sessions only
// their tokens. It has no lock: its user calls it under one.
//
// Rules where the protocol leaves the choice to a client:
//
//   - After an error of the server a client only ends the connection and reports why: it has no ERROR to send.
//   - An answer with an invalid body fails its call with INTERNAL (it may have run). An invalid WELCOME, GOAWAY, EVENT or ERROR on
//     stream 0 ends the connection.
//   - A stale answer, ITEM or CREDIT fails its call with DATA_LOSS. A stale CALL is refused, a stale WITHDRAW is honoured, and any
//     other stale frame is dropped and counted. ERROR STALE_TIMESTAMP is processed even if it is stale itself.
//   - The bytes of an incomplete frame count as a sign of life, until it has taken FrameTimeout.
//   - Until a RESPONSE shows that the server accepted a token, frames are limited as on a connection without a session.
//   - At most one PONG waits to be sent.
//   - Frames that answer no request are read at a limited rate.
package conversation

import (
	"errors"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// FrameTimeout is the time from the header of a frame to its last byte after which the connection counts as lost.
const FrameTimeout = 5 * time.Minute

const (
	maxConsecutiveStale = 10
	// maxServerTime is the largest accepted time of the server: those derived from a larger one could exceed 64 bits.
	maxServerTime = 1 << 62
)

// An Instant is one reading of both clocks.
type Instant struct {
	// Wall is this machine's time in milliseconds since 1970.
	Wall int64
	// Mono is a time that never jumps, since any beginning.
	Mono time.Duration
}

// Settings of a conversation; a zero field has its default.
type Settings struct {
	// MaxFrame is the largest length accepted from the server after WELCOME. Default: 1,048,576.
	MaxFrame uint32
	// Tolerance is how far a timestamp may be off. Default: 30 s.
	Tolerance time.Duration
	// MaxDepth is how deep bodies may be nested. Default: 32.
	MaxDepth int
}

// A State is the state of a connection.
type State byte

const (
	// AwaitingWelcome: nothing can be sent, and only WELCOME can arrive.
	AwaitingWelcome State = iota
	// Open: both sides can send.
	Open
	// Draining: GOAWAY was received. Answers still arrive; no new requests can be sent.
	Draining
	// Closed: input is ignored. Queued bytes are still sent.
	Closed
)

// A Conversation is one connection to a server. Requests can be made after the event Welcomed.
type Conversation struct {
	// DroppedStale and DroppedUnknown count frames without an effect.
	DroppedStale, DroppedUnknown int

	settings Settings
	state    State
	welcome  *Welcome
	decoder  wire.Decoder
	events   []Event
	scratch  []byte // for bodies

	salt        uint64
	lastCounter uint64 // received
	stale       int    // in a row
	offset      int64  // of the server's clock, in milliseconds
	partial     Instant
	hasPartial  bool // since partial there is the header of an incomplete frame

	out       []byte
	counter   uint64 // sent
	isBlocked bool   // the transport cannot send
	pongOwed  bool
	pongToken wire.Token // of the latest PING without a PONG

	requests  requests
	calls     serverCalls
	open      int // streams of items in flight
	keepalive keepalive
	silence   silence
	flood     floodLimit
}

// New returns a conversation that awaits WELCOME.
func New(settings Settings) *Conversation {
	if settings.MaxFrame == 0 {
		settings.MaxFrame = 1 << 20
	}
	if settings.Tolerance == 0 {
		settings.Tolerance = 30 * time.Second
	}
	if settings.MaxDepth == 0 {
		settings.MaxDepth = msgpack.MaxDepth
	}
	return &Conversation{
		settings:  settings,
		decoder:   wire.Decoder{Receiver: wire.Client, Limit: min(settings.MaxFrame, wire.MaxLengthBeforeSession)},
		requests:  newRequests(),
		calls:     newServerCalls(),
		keepalive: newKeepalive(),
		silence:   silence{pingAt: never},
	}
}

// State returns the state of the connection.
func (c *Conversation) State() State { return c.state }

// Welcome returns what the server announced, nil before WELCOME.
func (c *Conversation) Welcome() *Welcome { return c.welcome }

// Salt returns the salt of the connection, which is part of what devices sign.
func (c *Conversation) Salt() uint64 { return c.salt }

// ClockOffset returns how far the server's clock is ahead of this one, in milliseconds.
func (c *Conversation) ClockOffset() int64 { return c.offset }

// InFlight returns the number of requests without an answer, streams of items included.
func (c *Conversation) InFlight() int { return len(c.requests.inFlight) }

// HasSession reports whether the server has accepted a token on this connection.
func (c *Conversation) HasSession() bool { return len(c.requests.tokens) > 0 }

// SendLimit returns the largest length that can be sent now.
func (c *Conversation) SendLimit() uint32 {
	switch {
	case c.welcome == nil:
		return 0
	case c.HasSession():
		return c.welcome.MaxFrame
	default:
		return min(c.welcome.MaxFrame, wire.MaxLengthBeforeSession)
	}
}

// --- receiving ---------------------------------------------------------------------------------------

// Receive processes decrypted bytes. The events, and the bodies in them, are valid until the next call. After Ended the rest of
// the bytes is ignored: send what is queued, then close.
func (c *Conversation) Receive(data []byte, now Instant) []Event {
	c.events = c.events[:0]
	if c.state == Closed {
		return nil
	}
	c.silence.heard(now.Mono)
	if fault := c.receive(data, now); fault != nil {
		c.end(fault.Code, fault.Reason)
	}
	if c.pongOwed && !c.isBlocked {
		c.sendPong(now)
	}
	return c.events
}

func (c *Conversation) receive(data []byte, now Instant) *wire.Fault {
	c.decoder.Feed(data)
	judgedAt := now.Wall
	if c.hasPartial {
		judgedAt = c.partial.Wall
	}
	for {
		frame, isFrame, fault := c.decoder.Next()
		if fault != nil {
			return fault
		}
		if !isFrame {
			break
		}
		if fault := c.receiveFrame(&frame, judgedAt, now); fault != nil {
			return fault
		}
		if c.state == Closed {
			return nil
		}
		c.hasPartial = false
		judgedAt = now.Wall
	}
	if c.decoder.Buffered() < wire.HeaderSize {
		return nil
	}
	if !c.hasPartial {
		c.partial, c.hasPartial = now, true
	}
	c.keepalive.received(now.Mono)
	if now.Mono >= c.partial.Mono+FrameTimeout {
		c.end(0, "a frame of the server took too long to arrive")
	}
	return nil
}

func (c *Conversation) receiveFrame(frame *wire.Frame, judgedAt int64, now Instant) *wire.Fault {
	if c.welcome == nil {
		return c.receiveFirst(frame, now)
	}
	if frame.Salt != c.salt {
		return &wire.Fault{Code: wire.Replayed, Reason: "nonce belongs to another connection"}
	}
	if frame.Counter <= c.lastCounter {
		return &wire.Fault{Code: wire.Replayed, Reason: "nonce counter did not increase"}
	}
	c.lastCounter = frame.Counter
	if !c.isFresh(frame.Timestamp, judgedAt) && !c.correctsClock(frame) {
		return c.receiveStale(frame, now)
	}
	c.stale = 0
	c.keepalive.received(now.Mono)
	isOfCall := frame.Kind == wire.Call || frame.Kind == wire.Withdraw // their numbers are the server's
	if isOfCall || !c.requests.has(frame.Stream) {
		c.flood.count(len(frame.Body), now.Mono)
	}
	return c.receiveFresh(frame, now)
}

// serverTime converts a time of this machine, which may be set to any, to that of the server.
func (c *Conversation) serverTime(wall int64) uint64 {
	return uint64(max(wall+c.offset, 0))
}

// isFresh compares a timestamp with this machine's time; both edges of the tolerance are inside.
func (c *Conversation) isFresh(timestamp uint64, wall int64) bool {
	now := c.serverTime(wall)
	return max(now, timestamp)-min(now, timestamp) <= uint64(c.settings.Tolerance.Milliseconds())
}

// correctsClock reports whether a stale frame is an ERROR STALE_TIMESTAMP.
func (c *Conversation) correctsClock(frame *wire.Frame) bool {
	if frame.Kind != wire.Error {
		return false
	}
	code, _, _, err := wire.ParseError(frame.Body, c.settings.MaxDepth)
	return err == nil && code == wire.StaleTimestamp
}

// ReadingDelay returns for how long to stop reading, because too many frames have come that answer no request.
func (c *Conversation) ReadingDelay(now Instant) time.Duration {
	return c.flood.delay(now.Mono)
}

func (c *Conversation) receiveFirst(frame *wire.Frame, now Instant) *wire.Fault {
	switch {
	case frame.Kind != wire.Welcome:
		return broken("the first frame is not WELCOME")
	case frame.Counter != 0:
		return broken("WELCOME must have counter 0")
	case frame.Timestamp > maxServerTime:
		return broken("the server's time is out of range")
	}
	welcome, fault := parseWelcome(frame.Body, c.settings.MaxDepth)
	if fault != nil {
		return fault
	}
	c.welcome = welcome
	c.salt = frame.Salt
	c.offset = int64(frame.Timestamp) - now.Wall
	c.decoder.Limit = c.settings.MaxFrame
	if welcome.Streams != nil {
		c.decoder.MaxItem = welcome.Streams.MaxItem
		c.decoder.Extensions |= wire.Streams
	}
	c.keepalive.start(welcome.IdleTimeout, now.Mono)
	c.state = Open
	c.emit(Event{Type: Welcomed})
	return nil
}

func (c *Conversation) receiveStale(frame *wire.Frame, now Instant) *wire.Fault {
	c.stale++
	if c.stale >= maxConsecutiveStale {
		return &wire.Fault{Code: wire.StaleTimestamp, Reason: "ten consecutive stale frames"}
	}
	found, isInFlight := c.requests.inFlight[frame.Stream]
	switch frame.Kind {
	case wire.Call:
		return c.receiveCall(frame, true, now)
	case wire.Withdraw:
		return c.receiveWithdraw(frame, now)
	case wire.Response, wire.Error:
		if frame.Stream != 0 && isInFlight {
			if found.items != nil {
				found.items.WasLost = true
			}
			c.answered(frame.Stream)
			c.fail(frame.Stream, wire.DataLoss, "the answer was delayed for too long; check whether the request took effect")
			return nil
		}
	case wire.Item, wire.Credit:
		if isInFlight && found.items != nil && found.items.state != itemsLeaving {
			found.items.WasLost = true
			c.Cancel(frame.Stream, now) // a lost item would go unnoticed, and lost credit would block the stream
			c.fail(frame.Stream, wire.DataLoss, "an item was delayed for too long; the stream is incomplete")
			return nil
		}
	}
	c.DroppedStale++
	return nil
}

func (c *Conversation) receiveFresh(frame *wire.Frame, now Instant) *wire.Fault {
	if !frame.Kind.HasBody() && len(frame.Body) > 0 {
		return broken("this kind of frame must not have a body")
	}
	switch frame.Kind {
	case wire.Response:
		c.receiveResponse(frame)
	case wire.Error:
		return c.receiveError(frame, now)
	case wire.Item, wire.Credit:
		return c.receiveOfStream(frame)
	case wire.Event:
		return c.receiveEvent(frame)
	case wire.Call:
		return c.receiveCall(frame, false, now)
	case wire.Withdraw:
		return c.receiveWithdraw(frame, now)
	case wire.GoAway:
		return c.receiveGoAway(frame)
	case wire.Welcome:
		return broken("WELCOME was sent twice")
	case wire.Ping:
		c.pongOwed, c.pongToken = true, frame.Token
	case wire.Pong:
		c.keepalive.pongReceived()
	}
	return nil
}

func (c *Conversation) receiveResponse(frame *wire.Frame) {
	if !c.requests.has(frame.Stream) {
		c.DroppedUnknown++
		return
	}
	request := c.answered(frame.Stream)
	if err := msgpack.Scan(frame.Body, c.settings.MaxDepth); err != nil {
		c.fail(frame.Stream, wire.Internal, "the response is invalid: "+err.Error())
		return
	}
	if old, renewed, ok := c.requests.succeeded(request, frame.Body); ok {
		c.calls.tokenRenewed(old, renewed) // a CALL with the new token may be in the same read
	}
	c.emit(Event{Type: Response, Stream: frame.Stream, Body: frame.Body})
}

func (c *Conversation) receiveError(frame *wire.Frame, now Instant) *wire.Fault {
	code, message, details, err := wire.ParseError(frame.Body, c.settings.MaxDepth)
	if err != nil {
		if frame.Stream == 0 {
			return broken("ERROR is invalid: " + err.Error())
		}
		code, message, details = wire.Internal, "the response is invalid: "+err.Error(), nil
	}
	if time, isInt := details["server_time"].(int64); isInt && code == wire.StaleTimestamp && 0 <= time && time <= maxServerTime {
		c.offset = time - now.Wall
	}
	if frame.Stream == 0 {
		if !code.IsKnown() {
			code = wire.Unknown
		}
		c.end(code, message)
		return nil
	}
	if !c.requests.has(frame.Stream) {
		c.DroppedUnknown++
		return nil
	}
	c.requests.failed(c.answered(frame.Stream), code)
	c.emit(Event{Type: Failure, Stream: frame.Stream, Err: &Error{code, message, details}})
	return nil
}

func (c *Conversation) receiveEvent(frame *wire.Frame) *wire.Fault {
	name, data, err := wire.ParseEvent(frame.Body, c.settings.MaxDepth)
	if err != nil {
		return broken("EVENT is invalid: " + err.Error())
	}
	if name == "session.revoked" {
		delete(c.requests.tokens, frame.Token)
	}
	c.emit(Event{Type: Notice, Name: name, Body: data, Token: frame.Token})
	return nil
}

func (c *Conversation) receiveGoAway(frame *wire.Frame) *wire.Fault {
	reason, delay, fault := parseGoAway(frame.Body, c.settings.MaxDepth)
	if fault != nil {
		return fault
	}
	c.state = Draining
	c.emit(Event{Type: GoAway, Name: reason, Delay: delay})
	return nil
}

func (c *Conversation) emit(event Event) {
	c.events = append(c.events, event)
}

func (c *Conversation) fail(stream uint32, code wire.Code, message string) {
	c.emit(Event{Type: Failure, Stream: stream, Err: &Error{code, message, nil}})
}

func broken(reason string) *wire.Fault {
	return &wire.Fault{Code: wire.ProtocolError, Reason: reason}
}

// --- time --------------------------------------------------------------------------------------------

// Ping queues a PING.
func (c *Conversation) Ping(now Instant) {
	if c.state == Open || c.state == Draining {
		c.send(wire.Ping, 0, wire.Token{}, nil, now)
	}
}

// NextDeadline returns when to call HandleTimeout, as an Instant's Mono; false for never. It changes only with WELCOME and with
// HandleTimeout.
func (c *Conversation) NextDeadline() (time.Duration, bool) {
	deadline := c.keepalive.deadline()
	return deadline, c.state != Closed && deadline != never
}

// HandleTimeout sends a PING on a silent connection. It returns Ended, and true, if an earlier one had no answer: the server is
// unreachable, so close without close_notify. Calling it early has no effect.
func (c *Conversation) HandleTimeout(now Instant) (Event, bool) {
	if c.state == Closed {
		return Event{}, false
	}
	switch c.keepalive.check(now.Mono) {
	case unreachable:
		c.events = c.events[:0]
		c.end(0, "the server does not respond")
		return c.events[0], true
	case pingDue:
		if !c.isBlocked {
			c.Ping(now)
			c.keepalive.hasSent = false
		}
	}
	return Event{}, false
}

// --- the end -----------------------------------------------------------------------------------------

// End records that the transport has ended, or that it will be closed after the queued bytes.
func (c *Conversation) End() { c.state = Closed }

func (c *Conversation) end(code wire.Code, reason string) {
	c.state = Closed
	c.emit(Event{Type: Ended, Err: &Error{code, reason, nil}})
}

// --- bytes out ---------------------------------------------------------------------------------------

// BlockOutput records that the transport cannot send: PONGs wait.
func (c *Conversation) BlockOutput() { c.isBlocked = true }

// UnblockOutput records that the transport can send again, and queues the PONG that waits.
func (c *Conversation) UnblockOutput(now Instant) {
	c.isBlocked = false
	c.calls.blockedFailures = 0
	if c.pongOwed {
		c.sendPong(now)
	}
}

func (c *Conversation) sendPong(now Instant) {
	c.pongOwed = false
	c.send(wire.Pong, 0, c.pongToken, nil, now)
}

// QueuedBytes returns the number of bytes that wait for Output.
func (c *Conversation) QueuedBytes() int { return len(c.out) }

// Output returns all queued frames, which may be none. It takes a buffer that is no longer used, or nil, for the next ones.
func (c *Conversation) Output(spare []byte) []byte {
	out := c.out
	c.out = spare[:0]
	return out
}

// send queues a frame, with the counter and the time of this moment.
func (c *Conversation) send(kind wire.Kind, stream uint32, token wire.Token, body []byte, now Instant) {
	if c.state == Closed {
		return
	}
	c.keepalive.hasSent = true
	c.counter++
	frame := wire.Frame{
		Kind:      kind,
		Stream:    stream,
		Timestamp: c.serverTime(now.Wall),
		Salt:      c.salt,
		Counter:   c.counter,
		Token:     token,
		Body:      body,
	}
	c.silence.sent += wire.HeaderSize + len(body)
	c.out = frame.Append(c.out)
}

// ErrEnded says that the connection has ended.
var ErrEnded = errors.New("the connection has ended")

// An Error is the failure of a call, or why a request cannot be sent.
type Error struct {
	Code    wire.Code
	Message string
	Details map[string]any
}

func (e *Error) Error() string { return e.Code.String() + ": " + e.Message }
