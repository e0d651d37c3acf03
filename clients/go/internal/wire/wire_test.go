package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/zcproto/zcproto/clients/go/internal/vectors"
)

func TestDecoderKeepsNoMoreThanItWasFed(t *testing.T) {
	decoder := &Decoder{Receiver: Client, Limit: 1 << 30}
	frame := Frame{Kind: Response, Stream: 1}
	data := frame.Append(nil)
	binary.BigEndian.PutUint32(data, 1<<30)
	decoder.Feed(data)
	if _, isFrame, fault := decoder.Next(); isFrame || fault != nil {
		t.Fatal("a frame was complete too early")
	}
	if cap(decoder.partial) > firstCapacity {
		t.Errorf("68 bytes of a frame took %d", cap(decoder.partial))
	}
	chunk := make([]byte, 1000)
	for range 1000 {
		decoder.Feed(chunk)
		if cap(decoder.partial) > 2*len(decoder.partial)+firstCapacity {
			t.Fatalf("%d bytes of a frame took %d", len(decoder.partial), cap(decoder.partial))
		}
	}
}

func TestDecoderKeepsNothingWhileIdle(t *testing.T) {
	decoder := &Decoder{Receiver: Client, Limit: 1 << 20}
	frame := Frame{Kind: Pong}
	decoder.Feed(frame.Append(nil))
	if _, isFrame, fault := decoder.Next(); !isFrame || fault != nil {
		t.Fatal(fault)
	}
	if _, isFrame, _ := decoder.Next(); isFrame || decoder.data != nil || decoder.partial != nil {
		t.Error("bytes of an earlier read are kept")
	}
}

func TestAcceptedLengthStaysAcceptedUnderASmallerLimit(t *testing.T) {
	decoder := &Decoder{Receiver: Client, Limit: 1 << 20}
	frame := Frame{Kind: Response, Stream: 1, Body: make([]byte, 50_000)}
	data := frame.Append(nil)
	decoder.Feed(data[:10])
	_, _, _ = decoder.Next()
	decoder.Limit = MaxLengthBeforeSession
	decoder.Feed(data[10:])
	if _, isFrame, fault := decoder.Next(); !isFrame || fault != nil {
		t.Fatal(fault)
	}
	decoder.Feed(data)
	if _, _, fault := decoder.Next(); fault == nil || fault.Code != FrameTooLarge {
		t.Errorf("the next frame gave %v", fault)
	}
}

func TestTokensAreNeverDisplayed(t *testing.T) {
	token := Token([]byte("secret secret secret secret secr"))
	for _, format := range []string{"%v", "%s", "%q", "%x", "%X", "%d", "%+v", "%#v"} {
		for _, value := range []any{token, &token, []Token{token}, struct{ Token Token }{token}} {
			text := fmt.Sprintf(format, value)
			for _, leak := range []string{"secret", "736563726574", "115"} {
				if strings.Contains(text, leak) {
					t.Errorf("%s: %s", format, text)
				}
			}
		}
	}
	if back, ok := ParseToken(token.Text()); !ok || back != token {
		t.Error("the text form does not lead back")
	}
}

func TestEscapeKeepsTextOnOneLine(t *testing.T) {
	for text, safe := range map[string]string{
		"plain ünïcode":     "plain ünïcode",
		"a\nb\tc\r":         `a\nb\tc\r`,
		"\x1b[2J\x00":       `\x1b[2J\x00`,
		"right \u202e left": `right \u202e left`,
		"\U000e0001":        `\U000e0001`,
		"non\u00a0break":    `non\xa0break`,
	} {
		if found := Escape(text, 100); found != safe {
			t.Errorf("%q became %q", text, found)
		}
	}
	if found := Escape("äöü", 2); found != "äö..." {
		t.Errorf("cut to %q", found)
	}
}

func TestRequestsAreRefusedBeforeTheyAreSent(t *testing.T) {
	for name, example := range map[string]struct {
		method string
		params any
		meta   Meta
	}{
		"no method":       {"", nil, Meta{}},
		"a long method":   {strings.Repeat("a", 129), nil, Meta{}},
		"an upper method": {"Echo", nil, Meta{}},
		"an array":        {"echo", []int{1}, Meta{}},
		"a number":        {"echo", 5, Meta{}},
		"a long key":      {"echo", nil, Meta{IdempotencyKey: strings.Repeat("ä", 65)}},
	} {
		if body, err := AppendRequest(nil, example.method, example.params, &example.meta); err == nil {
			t.Errorf("%s: %x", name, body)
		}
	}
	body, err := AppendRequest(nil, "m", map[string]int{"a": 1}, &Meta{HasDeadline: true, DeadlineMs: 5, Credit: &Grant{2, 3}})
	if err != nil {
		t.Fatal(err)
	}
	message, err := ParseRequest(Open, body, 32)
	if err != nil || message.Method != "m" || message.Meta.DeadlineMs != 5 || *message.Meta.Credit != (Grant{2, 3}) {
		t.Errorf("%+v: %v", message, err)
	}
}

func FuzzDecoder(f *testing.F) {
	for _, name := range []string{"frames", "headers", "segments", "streaming/items"} {
		for _, vector := range vectors.Load[vectors.Vector](f, name) {
			f.Add([]byte(vector.Bytes), byte(68))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, cut byte) {
		whole, wholeLeft, wholeFault := decode(data)
		at := min(int(cut), len(data))
		parts, partsLeft, partsFault := decode(data[:at], data[at:])
		if !bytes.Equal(whole, parts) || wholeLeft != partsLeft || (wholeFault == nil) != (partsFault == nil) {
			t.Fatalf("the frames depend on a cut at %d", at)
		}
		if wholeFault == nil && len(whole)+wholeLeft != len(data) {
			t.Fatal("bytes were lost")
		}
	})
}

// decode returns the frames of bytes that come in pieces, encoded again.
func decode(pieces ...[]byte) (frames []byte, left int, fault *Fault) {
	decoder := &Decoder{Receiver: Client, Limit: 1 << 20, Extensions: Streams | Calls, MaxItem: 4096}
	for _, piece := range pieces {
		decoder.Feed(piece)
		for {
			frame, isFrame, fault := decoder.Next()
			if fault != nil {
				return frames, 0, fault
			}
			if !isFrame {
				break
			}
			frames = frame.Append(frames)
		}
	}
	return frames, decoder.Buffered(), nil
}

func BenchmarkDecoder(b *testing.B) {
	frame := Frame{Kind: Response, Stream: 1, Body: make([]byte, 200)}
	var data []byte
	for range 16 {
		data = frame.Append(data)
	}
	decoder := &Decoder{Receiver: Client, Limit: 1 << 20}
	b.ReportAllocs()
	for range b.N {
		decoder.Feed(data)
		for {
			if _, isFrame, _ := decoder.Next(); !isFrame {
				break
			}
		}
	}
}
