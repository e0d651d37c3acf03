package conversation

import (
	"fmt"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Methods that are sent without a token and answered with one.
const (
	sessionOpen    = "session.open"
	sessionRefresh = "session.refresh"
	sessionHandle  = "session.handle"
)

// maxScratch is the largest buffer for bodies that is kept.
const maxScratch = 1 << 16

// requests are those without an answer, and the tokens that the server has accepted on this connection. A request is a REQUEST or
// an OPEN: their numbers are one space.
type requests struct {
	inFlight map[uint32]request
	tokens   map[wire.Token]struct{}
	next     uint32 // the number of the next request, unless it is in flight
}

type request struct {
	method string      // only of those that open a session
	token  wire.Token  // of a refresh: the one that the answer replaces
	items  *ItemStream // of an OPEN
}

func newRequests() requests {
	return requests{inFlight: map[uint32]request{}, tokens: map[wire.Token]struct{}{}, next: 1}
}

func (r *requests) has(stream uint32) bool {
	_, has := r.inFlight[stream]
	return has
}

func (r *requests) freeNumber() uint32 {
	for {
		number := r.next
		r.next++
		if r.next == 0 {
			r.next = 1
		}
		if !r.has(number) {
			return number
		}
	}
}

// sentToken returns the token in the frame of a request.
func (r request) sentToken() wire.Token {
	if r.method != "" {
		return wire.Token{}
	}
	return r.token
}

// succeeded learns from a RESPONSE which token the server accepts. After session.refresh it returns the old and the new token of
// the session.
func (r *requests) succeeded(request request, body []byte) (old, renewed wire.Token, isRefreshed bool) {
	accepted := request.token
	if request.method != "" {
		accepted = issuedToken(body)
	}
	if accepted == (wire.Token{}) {
		return
	}
	r.tokens[accepted] = struct{}{}
	if request.method != sessionRefresh {
		return
	}
	delete(r.tokens, request.token)
	return request.token, accepted, true
}

// failed learns from an ERROR which token the server no longer accepts.
func (r *requests) failed(request request, code wire.Code) {
	switch code {
	case wire.Unauthenticated, wire.TokenExpired, wire.TokenRevoked, wire.SessionReplaced:
		delete(r.tokens, request.sentToken())
	}
}

// issuedToken returns the token in the result of session.open or session.refresh, or none.
func issuedToken(body []byte) (token wire.Token) {
	var result struct {
		Token []byte `msgpack:"token"`
	}
	if msgpack.Unmarshal(body, &result, msgpack.MaxDepth) == nil && len(result.Token) == wire.TokenSize {
		copy(token[:], result.Token)
	}
	return token
}

// Request queues a REQUEST and returns its number, which identifies the answer. Params are a map, a struct, a msgpack.Raw or nil.
//
// Methods that open a session are sent without a token; that of session.refresh is the one that the answer replaces.
// It returns an Error for a request that cannot be sent: InvalidArgument (if it is too large, with the details size and limit),
// ResourceExhausted if as many are in flight as the server takes, Unavailable after GOAWAY. After the end it returns ErrEnded.
func (c *Conversation) Request(method string, params any, token wire.Token, meta wire.Meta, now Instant) (uint32, error) {
	if err := c.checkOpen(); err != nil {
		return 0, err
	}
	meta.Credit = nil
	return c.request(wire.Request, method, params, token, &meta, now)
}

// Handle queues a session.handle, which registers methods for calls of the server in the session of a token; at most so many run
// at once. It returns the errors of Request, and Unimplemented if the server calls no clients.
func (c *Conversation) Handle(token wire.Token, methods []string, most int, now Instant) (uint32, error) {
	if err := c.checkOpen(); err != nil {
		return 0, err
	}
	if c.welcome.Calls == nil {
		return 0, &Error{Code: wire.Unimplemented, Message: "this server does not call clients"}
	}
	params := struct {
		Methods []string `msgpack:"methods"`
		Max     int      `msgpack:"max"`
	}{append([]string{}, methods...), most}
	number, err := c.request(wire.Request, sessionHandle, params, token, &wire.Meta{}, now)
	if err == nil {
		c.calls.register(token, methods)
		c.decoder.Extensions |= wire.Calls
	}
	return number, err
}

// ShowRenewed queues a session.info with the token of a session that was refreshed on another connection: streams and calls of the
// session need it here, too (zcp1.md, section 18.7). After GOAWAY and above max_streams it is sent as well, because the server looks
// at the token before it refuses the request. It returns false if this connection does not use the session, or has ended.
func (c *Conversation) ShowRenewed(old, renewed wire.Token, now Instant) (uint32, bool) {
	if _, isUsed := c.requests.tokens[old]; !isUsed || c.state != Open && c.state != Draining {
		return 0, false
	}
	delete(c.requests.tokens, old)
	c.requests.tokens[renewed] = struct{}{} // until it is refused
	c.calls.tokenRenewed(old, renewed)
	body, err := wire.AppendRequest(nil, "session.info", nil, &wire.Meta{})
	if err != nil {
		return 0, false
	}
	return c.sendRequest(wire.Request, "session.info", renewed, body, now), true
}

// checkOpen returns an error if no request can be sent now.
func (c *Conversation) checkOpen() error {
	switch c.state {
	case Open:
		return nil
	case Draining:
		return &Error{Code: wire.Unavailable, Message: "the server accepts no new requests on this connection"}
	case Closed:
		return ErrEnded
	default:
		return &Error{Code: wire.Unavailable, Message: "the server has not sent its WELCOME yet"}
	}
}

func (c *Conversation) request(
	kind wire.Kind, method string, params any, token wire.Token, meta *wire.Meta, now Instant,
) (uint32, error) {
	if len(c.requests.inFlight) >= c.welcome.MaxStreams {
		return 0, &Error{Code: wire.ResourceExhausted, Message: "too many requests in flight on this connection"}
	}
	body, err := wire.AppendRequest(c.scratch[:0], method, params, meta)
	if err != nil {
		return 0, &Error{Code: wire.InvalidArgument, Message: err.Error()}
	}
	c.keepScratch(body)
	if fault := tooLarge("request", body, c.SendLimit()); fault != nil {
		return 0, fault
	}
	return c.sendRequest(kind, method, token, body, now), nil
}

func (c *Conversation) sendRequest(kind wire.Kind, method string, token wire.Token, body []byte, now Instant) uint32 {
	if len(c.requests.inFlight) == 0 {
		c.silence.heardAt = max(c.silence.heardAt, now.Mono)
	}
	number := c.requests.freeNumber()
	made := request{token: token}
	if method == sessionOpen || method == sessionRefresh {
		made.method = method
	}
	c.requests.inFlight[number] = made
	c.send(kind, number, made.sentToken(), body, now)
	return number
}

// keepScratch keeps the memory of a body for the next one, unless it is large.
func (c *Conversation) keepScratch(body []byte) {
	if cap(body) <= maxScratch {
		c.scratch = body
	}
}

func tooLarge(what string, body []byte, limit uint32) error {
	size := wire.MinLength + len(body)
	if uint64(size) <= uint64(limit) {
		return nil
	}
	return &Error{
		Code:    wire.InvalidArgument,
		Message: fmt.Sprintf("the %s has %d bytes; the server accepts %d", what, size, limit),
		Details: map[string]any{"size": int64(size), "limit": int64(limit)},
	}
}

// answered removes a request that is in flight, and ends its items.
func (c *Conversation) answered(stream uint32) request {
	found := c.requests.inFlight[stream]
	delete(c.requests.inFlight, stream)
	if found.items != nil {
		c.open--
		found.items.state = itemsNone
	}
	return found
}

// Cancel queues a CANCEL, once for a stream of items. The request stays in flight until its answer. Without effect on one that is
// not in flight.
func (c *Conversation) Cancel(stream uint32, now Instant) {
	found, isInFlight := c.requests.inFlight[stream]
	if !isInFlight || found.items != nil && found.items.state == itemsLeaving {
		return
	}
	if found.items != nil {
		found.items.leave()
	}
	c.send(wire.Cancel, stream, found.sentToken(), nil, now)
}

// SessionEnded forgets the token of a session that has ended.
func (c *Conversation) SessionEnded(token wire.Token) {
	delete(c.requests.tokens, token)
	c.calls.sessionEnded(token)
}
