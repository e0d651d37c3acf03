package conversation

import "github.com/zcproto/zcproto/clients/go/internal/wire"

// The contexts of the test vectors begin in the middle of a conversation. The functions below bring one there where frames alone
// cannot.

// AssumeNumber sets the number of the next request.
func (c *Conversation) AssumeNumber(number uint32) { c.requests.next = number }

// AssumeCall records a call of the server that is in flight.
func (c *Conversation) AssumeCall(number uint32, token wire.Token) { c.calls.inFlight[number] = token }

// AssumeCredit sets what the server allows to send, and what it has sent, all of which was taken. No more is granted.
func (s *ItemStream) AssumeCredit(allowed, received wire.Grant) {
	s.allowed, s.received, s.taken, s.window = allowed, received, received, wire.Grant{}
}
