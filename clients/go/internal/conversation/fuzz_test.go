package conversation

import (
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/vectors"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// FuzzConversation feeds bytes in pieces to a conversation with a request, a stream and a registered method in flight: nothing may
// fail, and what it sends must stay in proportion to what it receives.
func FuzzConversation(f *testing.F) {
	for _, name := range []string{"conversation", "streaming/conversation"} {
		var all []byte
		for _, vector := range vectors.Load[vectors.Vector](f, name) {
			all = append(all, vector.Bytes...)
			f.Add([]byte(vector.Bytes), uint16(30))
		}
		f.Add(all, uint16(100))
	}
	for _, name := range []string{"frames", "freshness", "streams", "streaming/items", "streaming/calls"} {
		for _, vector := range vectors.Load[vectors.Vector](f, name) {
			f.Add([]byte(vector.Bytes), uint16(1))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		c := New(Settings{})
		now := Instant{Wall: serverTime}
		salt, _ := encodedWelcome(t)
		c.Receive(salt, now)
		stream, err := c.Open("m", nil, token, wire.Meta{}, wire.Grant{Items: 4, Bytes: 4_096}, now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Request("echo", nil, token, wire.Meta{}, now); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Handle(token, []string{"approve"}, 2, now); err != nil {
			t.Fatal(err)
		}
		for len(data) > 0 {
			piece := data[:min(len(data), int(size)+1)]
			data = data[len(piece):]
			for _, event := range c.Receive(repaired(piece, c), now) {
				switch event.Type {
				case Item:
					if _, err := stream.Take(now); err != nil {
						c.Cancel(event.Stream, now)
					}
				case CreditRaised:
					if stream.MaySend() {
						_ = stream.Send("item", now)
					}
				case Call:
					c.Answer(event.Stream, event.Name, now)
				case Ended:
					if c.State() != Closed {
						t.Fatal("ended and not closed")
					}
				}
			}
			now.Mono += time.Second
			c.HandleTimeout(now)
			if c.QueuedBytes() > 1<<16+4*len(piece) {
				t.Fatalf("%d bytes are queued", c.QueuedBytes())
			}
			c.Output(nil)
		}
	})
}

func encodedWelcome(t *testing.T) ([]byte, uint64) {
	frame := wire.Frame{Kind: wire.Welcome, Timestamp: serverTime, Salt: 7, Body: encoded(t, plainWelcome)}
	return frame.Append(nil), frame.Salt
}

// repaired gives a frame the salt, counter and time that it must have, so that the fuzzer reaches what is behind those checks.
func repaired(data []byte, c *Conversation) []byte {
	decoder := wire.Decoder{Receiver: wire.Client, Limit: 1 << 20, Extensions: wire.Streams | wire.Calls}
	decoder.Feed(data)
	frame, isFrame, _ := decoder.Next()
	if !isFrame {
		return data
	}
	size := len(frame.Append(nil))
	frame.Salt, frame.Counter, frame.Timestamp = c.Salt(), c.lastCounter+1, serverTime
	return append(frame.Append(nil), data[size:]...)
}
