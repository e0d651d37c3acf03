package conversation

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/vectors"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const serverTime = 1_767_225_600_000

var token = wire.Token{1, 2, 3}

// A peer is the server's end of a conversation in a test.
type peer struct {
	*testing.T
	*Conversation
	now     Instant
	counter uint64
	decoder wire.Decoder
}

var plainWelcome = map[string]any{
	"server": "test", "versions": []int{1}, "max_frame": 1 << 20, "max_streams": 4, "idle_timeout_ms": 300_000,
	"tolerance_ms": 30_000, "sts": map[string]any{"max_age": 0, "include_subdomains": false},
	"streams": map[string]any{"max_open": 2, "max_item": 1_024}, "calls": map[string]any{"max": 32},
}

// newPeer returns a peer whose conversation awaits WELCOME, and whose client's clock is an hour slow.
func newPeer(t *testing.T) *peer {
	return &peer{
		T: t, Conversation: New(Settings{}), now: Instant{Wall: serverTime - 3_600_000, Mono: time.Hour},
		decoder: wire.Decoder{Receiver: wire.Server, Limit: math.MaxUint32, Extensions: wire.Streams | wire.Calls},
	}
}

// welcomed returns a peer that has sent WELCOME.
func welcomed(t *testing.T, more ...map[string]any) *peer {
	p := newPeer(t)
	events := p.send(wire.Welcome, 0, wire.Token{}, merged(plainWelcome, more...))
	if len(events) != 1 || events[0].Type != Welcomed {
		t.Fatalf("WELCOME gave %+v", events)
	}
	return p
}

func merged(base map[string]any, more ...map[string]any) map[string]any {
	all := map[string]any{}
	for _, part := range append([]map[string]any{base}, more...) {
		for key, value := range part {
			all[key] = value
		}
	}
	return all
}

func encoded(t *testing.T, value any) []byte {
	t.Helper()
	body, err := msgpack.Append(nil, value)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// frame returns a frame of the server, made now.
func (p *peer) frame(kind wire.Kind, stream uint32, token wire.Token, body any) *wire.Frame {
	frame := &wire.Frame{
		Kind: kind, Stream: stream, Token: token, Salt: 7, Counter: p.counter,
		Timestamp: uint64(p.now.Wall + 3_600_000),
	}
	if kind.HasBody() {
		frame.Body = encoded(p.T, body)
	}
	p.counter++
	return frame
}

func (p *peer) send(kind wire.Kind, stream uint32, token wire.Token, body any) []Event {
	return p.Receive(p.frame(kind, stream, token, body).Append(nil), p.now)
}

func (p *peer) sendStale(kind wire.Kind, stream uint32, token wire.Token, body any) []Event {
	frame := p.frame(kind, stream, token, body)
	frame.Timestamp -= 30_001
	return p.Receive(frame.Append(nil), p.now)
}

// sent returns the frames that the client has sent since the last time.
func (p *peer) sent() []wire.Frame {
	p.Helper()
	p.decoder.Feed(bytes.Clone(p.Output(nil)))
	var frames []wire.Frame
	for {
		frame, isFrame, fault := p.decoder.Next()
		if fault != nil {
			p.Fatal(fault)
		}
		if !isFrame {
			return frames
		}
		frames = append(frames, frame)
	}
}

func (p *peer) request(method string, params any) uint32 {
	p.Helper()
	number, err := p.Request(method, params, token, wire.Meta{}, p.now)
	if err != nil {
		p.Fatal(err)
	}
	return number
}

func (p *peer) wantEnd(events []Event, code wire.Code, reason string) {
	p.Helper()
	if len(events) == 0 || events[len(events)-1].Type != Ended || p.State() != Closed {
		p.Fatalf("the connection did not end: %+v", events)
	}
	if err := events[len(events)-1].Err; err.Code != code || !strings.Contains(err.Message, reason) {
		p.Errorf("it ended with %v", err)
	}
}

func (p *peer) wantFailure(events []Event, code wire.Code) {
	p.Helper()
	if len(events) != 1 || events[0].Type != Failure || events[0].Err.Code != code {
		p.Fatalf("%+v instead of a failure with %v", events, code)
	}
}

func wantCode(t *testing.T, err error, code wire.Code) *Error {
	t.Helper()
	var found *Error
	if !errors.As(err, &found) || found.Code != code {
		t.Fatalf("%v instead of %v", err, code)
	}
	return found
}

// TestExampleConversations replays both conversations of the specification from the client's side, byte for byte.
func TestExampleConversations(t *testing.T) {
	for _, file := range []string{"conversation", "streaming/conversation"} {
		t.Run(file, func(t *testing.T) { replay(t, file) })
	}
}

func replay(t *testing.T, file string) {
	type step struct {
		From  string          `json:"from"`
		Kind  string          `json:"kind"`
		Bytes vectors.Hex     `json:"bytes"`
		Now   json.Number     `json:"now"`
		Body  json.RawMessage `json:"body"`
	}
	conversation := New(Settings{})
	var stream *ItemStream
	for number, step := range vectors.Load[step](t, file) {
		wall, err := json.Number(strings.Trim(string(step.Now), `"`)).Int64()
		if err != nil {
			t.Fatal(err)
		}
		now := Instant{Wall: wall}
		if step.From == "server" {
			for _, event := range conversation.Receive(step.Bytes, now) {
				if event.Type == Ended {
					t.Fatalf("frame %d ended the connection: %v", number+1, event.Err)
				}
			}
			continue
		}
		decoder := wire.Decoder{Receiver: wire.Server, Limit: 1 << 20, Extensions: wire.Streams | wire.Calls}
		decoder.Feed(step.Bytes)
		frame, _, _ := decoder.Next()
		switch frame.Kind {
		case wire.Request, wire.Open:
			message, err := wire.ParseRequest(frame.Kind, frame.Body, 32)
			if err != nil {
				t.Fatal(err)
			}
			var params any
			if message.Params != nil {
				params = message.Params
			}
			if frame.Kind == wire.Open {
				stream, err = conversation.Open(message.Method, params, frame.Token, message.Meta, *message.Meta.Credit, now)
			} else if message.Method == "session.handle" {
				_, err = conversation.Handle(frame.Token, []string{"approve"}, 4, now)
			} else {
				_, err = conversation.Request(message.Method, params, frame.Token, message.Meta, now)
			}
			if err != nil {
				t.Fatal(err)
			}
		case wire.Cancel:
			conversation.Cancel(frame.Stream, now)
		case wire.Ping:
			conversation.Ping(now)
		case wire.Credit:
			for stream.HasItem() {
				if _, err := stream.Take(now); err != nil {
					t.Fatal(err)
				}
			}
			// The example grants other totals than this client, all at once.
			conversation.Output(nil)
			conversation.counter = frame.Counter
			continue
		case wire.Result:
			conversation.Answer(frame.Stream, true, now)
		default:
			t.Fatalf("frame %d is %v", number+1, frame.Kind)
		}
		if sent := conversation.Output(nil); !bytes.Equal(sent, step.Bytes) {
			t.Errorf("frame %d, %s:\n%x instead of\n%x", number+1, step.Kind, sent, []byte(step.Bytes))
		}
	}
}

func TestClockOffsetComesFromWelcomeAndFromServerTime(t *testing.T) {
	p := welcomed(t)
	if p.ClockOffset() != 3_600_000 {
		t.Errorf("the offset is %d", p.ClockOffset())
	}
	number := p.request("echo", nil)
	if frame := p.sent()[0]; frame.Timestamp != serverTime {
		t.Errorf("the timestamp is %d", frame.Timestamp)
	}
	// The local clock is set forward by a minute: frames of the server look stale, and theirs reach the server so.
	p.now.Wall += 60_000
	frame := p.frame(wire.Error, number, token, []any{67, "stale", map[string]any{"server_time": int64(serverTime + 5)}})
	frame.Timestamp = serverTime + 5
	p.wantFailure(p.Receive(frame.Append(nil), p.now), wire.StaleTimestamp)
	if p.ClockOffset() != 3_600_000-60_000+5 {
		t.Errorf("the corrected offset is %d", p.ClockOffset())
	}
}

func TestFirstFrameMustBeAValidWelcome(t *testing.T) {
	for name, change := range map[string]func(*wire.Frame){
		"another kind":        func(f *wire.Frame) { f.Kind, f.Body = wire.Ping, nil },
		"a counter":           func(f *wire.Frame) { f.Counter = 1 },
		"a time out of range": func(f *wire.Frame) { f.Timestamp = 1<<62 + 1 },
		"no map":              func(f *wire.Frame) { f.Body = []byte{0x90} },
		"no body":             func(f *wire.Frame) { f.Body = nil },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t)
			frame := p.frame(wire.Welcome, 0, wire.Token{}, plainWelcome)
			change(frame)
			p.wantEnd(p.Receive(frame.Append(nil), p.now), wire.ProtocolError, "")
		})
	}
	for key, value := range map[string]any{
		"server": 1, "versions": []int{2}, "max_frame": 63, "max_streams": 0, "idle_timeout_ms": -1, "tolerance_ms": 1.5,
		"sts": map[string]any{"max_age": 1}, "streams": map[string]any{"max_open": 1}, "calls": 1,
	} {
		t.Run(key, func(t *testing.T) {
			p := newPeer(t)
			p.wantEnd(p.send(wire.Welcome, 0, wire.Token{}, merged(plainWelcome, map[string]any{key: value})), wire.ProtocolError, "WELCOME")
		})
	}
	p := welcomed(t)
	p.wantEnd(p.send(wire.Welcome, 0, wire.Token{}, plainWelcome), wire.ProtocolError, "twice")
}

func TestRequestsBeforeWelcomeAndAfterTheEndAreRefused(t *testing.T) {
	p := newPeer(t)
	_, err := p.Request("echo", nil, token, wire.Meta{}, p.now)
	wantCode(t, err, wire.Unavailable)
	p = welcomed(t)
	p.End()
	if _, err = p.Request("echo", nil, token, wire.Meta{}, p.now); !errors.Is(err, ErrEnded) {
		t.Error(err)
	}
	if p.Receive([]byte{1, 2, 3}, p.now) != nil || p.QueuedBytes() != 0 {
		t.Error("a closed connection goes on")
	}
}

func TestAnswersInAnyOrder(t *testing.T) {
	p := welcomed(t)
	first, second, third := p.request("a", nil), p.request("b", nil), p.request("c", nil)
	events := p.send(wire.Response, third, token, "three")
	if len(events) != 1 || events[0].Type != Response || events[0].Stream != third || !bytes.Equal(events[0].Body, encoded(t, "three")) {
		t.Errorf("%+v", events)
	}
	p.wantFailure(p.send(wire.Error, first, token, []any{5, "none", map[string]any{"a": 1}}), wire.NotFound)
	bad := p.frame(wire.Response, second, token, nil)
	bad.Body = []byte{0xc1}
	p.wantFailure(p.Receive(bad.Append(nil), p.now), wire.Internal)
	if events := p.send(wire.Response, second, token, nil); len(events) != 0 || p.DroppedUnknown != 1 || p.InFlight() != 0 {
		t.Errorf("a second answer gave %+v", events)
	}
}

func TestNumbersSkipThoseInFlightAndZero(t *testing.T) {
	p := welcomed(t)
	p.AssumeNumber(math.MaxUint32)
	if first, second := p.request("a", nil), p.request("b", nil); first != math.MaxUint32 || second != 1 {
		t.Errorf("%d, %d", first, second)
	}
	p.AssumeNumber(math.MaxUint32)
	if third := p.request("c", nil); third != 2 {
		t.Errorf("%d is in flight", third)
	}
}

func TestRequestsInFlightAreLimited(t *testing.T) {
	p := welcomed(t)
	for range 4 {
		p.request("echo", nil)
	}
	_, err := p.Request("echo", nil, token, wire.Meta{}, p.now)
	wantCode(t, err, wire.ResourceExhausted)
}

func TestLargeFramesNeedASession(t *testing.T) {
	p := welcomed(t)
	large := map[string]any{"text": strings.Repeat("x", 20_000)}
	_, err := p.Request("echo", large, token, wire.Meta{}, p.now)
	if fault := wantCode(t, err, wire.InvalidArgument); fault.Details["limit"] != int64(16_384) {
		t.Errorf("%v", fault.Details)
	}
	p.send(wire.Response, p.request("session.info", nil), token, nil)
	if _, err := p.Request("echo", large, token, wire.Meta{}, p.now); err != nil || !p.HasSession() {
		t.Error(err)
	}
	p.SessionEnded(token)
	_, err = p.Request("echo", large, token, wire.Meta{}, p.now)
	wantCode(t, err, wire.InvalidArgument)
}

func TestSessionsComeAndGoWithTheirTokens(t *testing.T) {
	p := welcomed(t)
	issued := wire.Token{9}
	number := p.request("session.open", nil)
	if frame := p.sent()[0]; frame.Token != (wire.Token{}) {
		t.Error("session.open was sent with a token")
	}
	p.send(wire.Response, number, wire.Token{}, map[string]any{"token": issued[:]})
	if !p.HasSession() {
		t.Error("an opened session does not count")
	}
	p.send(wire.Event, 0, issued, []any{"session.revoked", map[string]any{"reason": "test"}})
	if p.HasSession() {
		t.Error("a revoked session counts")
	}
	for _, code := range []wire.Code{wire.Unauthenticated, wire.TokenExpired, wire.TokenRevoked, wire.SessionReplaced} {
		p.send(wire.Response, p.request("echo", nil), token, nil)
		p.send(wire.Error, p.request("echo", nil), token, []any{int(code), ""})
		if p.HasSession() {
			t.Errorf("a session counts after %v", code)
		}
	}
}

func TestCancelledRequestStaysInFlight(t *testing.T) {
	p := welcomed(t)
	number := p.request("sleep", nil)
	p.Cancel(number, p.now)
	frames := p.sent()
	if len(frames) != 2 || frames[1].Kind != wire.Cancel || frames[1].Token != token || p.InFlight() != 1 {
		t.Errorf("%+v", frames)
	}
	p.Cancel(77, p.now)
	if p.QueuedBytes() != 0 {
		t.Error("CANCEL was sent for no request")
	}
	p.wantFailure(p.send(wire.Error, number, token, []any{1, ""}), wire.Cancelled)
}

func TestStaleFrames(t *testing.T) {
	p := welcomed(t)
	p.wantFailure(p.sendStale(wire.Response, p.request("a", nil), token, nil), wire.DataLoss)
	p.wantFailure(p.sendStale(wire.Error, p.request("a", nil), token, []any{5, ""}), wire.DataLoss)
	for range 7 {
		if events := p.sendStale(wire.Ping, 0, token, nil); len(events) != 0 {
			t.Fatalf("%+v", events)
		}
	}
	if p.DroppedStale != 7 || p.send(wire.Pong, 0, token, nil) != nil && p.State() == Closed {
		t.Error("a stale PING had an effect")
	}
	for range 9 {
		p.sendStale(wire.Event, 0, token, []any{"x", nil})
	}
	p.wantEnd(p.sendStale(wire.Ping, 0, token, nil), wire.StaleTimestamp, "ten")
}

func TestReplayedFramesEndTheConnection(t *testing.T) {
	p := welcomed(t)
	frame := p.frame(wire.Ping, 0, token, nil)
	p.Receive(frame.Append(nil), p.now)
	p.wantEnd(p.Receive(frame.Append(nil), p.now), wire.Replayed, "counter")
	p = welcomed(t)
	frame = p.frame(wire.Ping, 0, token, nil)
	frame.Salt++
	p.wantEnd(p.Receive(frame.Append(nil), p.now), wire.Replayed, "another connection")
}

func TestFrameIsJudgedWhenItsHeaderArrives(t *testing.T) {
	p := welcomed(t)
	number := p.request("echo", nil)
	data := p.frame(wire.Response, number, token, strings.Repeat("x", 100)).Append(nil)
	p.Receive(data[:70], p.now)
	p.now.Wall += 60_000
	p.now.Mono += time.Minute
	if events := p.Receive(data[70:], p.now); len(events) != 1 || events[0].Type != Response {
		t.Errorf("%+v", events)
	}
}

func TestFrameThatNeverEndsIsAFault(t *testing.T) {
	p := welcomed(t)
	data := p.frame(wire.Response, p.request("echo", nil), token, strings.Repeat("x", 1_000)).Append(nil)
	p.Receive(data[:100], p.now)
	for minute := range 5 {
		p.now.Mono += time.Minute
		events := p.Receive(data[100+minute:101+minute], p.now)
		if minute < 4 && len(events) > 0 {
			t.Fatalf("after %d minutes: %+v", minute+1, events)
		}
		if minute == 4 {
			p.wantEnd(events, 0, "too long")
		}
	}
}

func TestPingsAreAnsweredByOnePongWhileBlocked(t *testing.T) {
	p := welcomed(t)
	p.send(wire.Ping, 0, token, nil)
	if frames := p.sent(); len(frames) != 1 || frames[0].Kind != wire.Pong || frames[0].Token != token {
		t.Fatalf("%+v", frames)
	}
	p.BlockOutput()
	for range 1_000 {
		p.send(wire.Ping, 0, wire.Token{5}, nil)
	}
	if p.QueuedBytes() != 0 {
		t.Error("PONGs were queued for a server that reads nothing")
	}
	p.UnblockOutput(p.now)
	if frames := p.sent(); len(frames) != 1 || frames[0].Token != (wire.Token{5}) {
		t.Errorf("%+v", frames)
	}
}

func TestKeepalive(t *testing.T) {
	p := welcomed(t)
	start := p.now.Mono
	deadline, ok := p.NextDeadline()
	if !ok || deadline != start+100*time.Second {
		t.Fatalf("the first check is at %v", deadline-start)
	}
	at := func(after time.Duration) (Event, bool) {
		p.now.Mono = start + after
		return p.HandleTimeout(p.now)
	}
	if _, ended := at(99 * time.Second); ended || p.QueuedBytes() != 0 {
		t.Error("a PING was sent too early")
	}
	at(100 * time.Second)
	if frames := p.sent(); len(frames) != 1 || frames[0].Kind != wire.Ping {
		t.Fatalf("%+v", frames)
	}
	p.send(wire.Pong, 0, token, nil)
	if _, ended := at(110 * time.Second); ended {
		t.Error("it ended in spite of the PONG")
	}
	p.request("echo", nil)
	p.send(wire.Ping, 0, token, nil)
	p.sent()
	if _, ended := at(200 * time.Second); ended || p.QueuedBytes() != 0 {
		t.Error("a PING was sent in spite of other traffic")
	}
	at(300 * time.Second)
	if event, ended := at(310 * time.Second); !ended || event.Type != Ended || p.State() != Closed {
		t.Error("the server counts as alive without a PONG")
	}
	if _, ok := p.NextDeadline(); ok {
		t.Error("a closed connection has a deadline")
	}
	p = welcomed(t, map[string]any{"idle_timeout_ms": 0})
	if _, ok := p.NextDeadline(); ok {
		t.Error("a server without an idle timeout gets PINGs")
	}
}

func TestFloodSlowsDownReading(t *testing.T) {
	p := welcomed(t)
	for range 8_000 {
		p.send(wire.Event, 0, token, []any{"x", nil})
	}
	if delay := p.ReadingDelay(p.now); delay <= 0 || delay > 2*time.Second {
		t.Errorf("the delay is %v", delay)
	}
	p.now.Mono += 10 * time.Second
	if delay := p.ReadingDelay(p.now); delay != 0 {
		t.Errorf("the delay is %v after a pause", delay)
	}
}

func TestGoAwayDrains(t *testing.T) {
	p := welcomed(t)
	number := p.request("echo", nil)
	events := p.send(wire.GoAway, 0, wire.Token{}, map[string]any{"reason": "draining", "retry_after_ms": 1_500})
	if len(events) != 1 || events[0].Name != "draining" || events[0].Delay != 1_500*time.Millisecond {
		t.Errorf("%+v", events)
	}
	_, err := p.Request("echo", nil, token, wire.Meta{}, p.now)
	wantCode(t, err, wire.Unavailable)
	if events := p.send(wire.Response, number, token, nil); len(events) != 1 {
		t.Error("answers no longer come")
	}
	p.wantEnd(p.send(wire.GoAway, 0, wire.Token{}, map[string]any{"reason": "x", "retry_after_ms": -1}), wire.ProtocolError, "GOAWAY")
}

func TestFatalErrorEndsTheConnection(t *testing.T) {
	p := welcomed(t)
	p.wantEnd(p.send(wire.Error, 0, wire.Token{}, []any{66, "replayed"}), wire.Replayed, "replayed")
	p = welcomed(t)
	p.wantEnd(p.send(wire.Error, 0, wire.Token{}, []any{9999, "from the future"}), wire.Unknown, "future")
	p = welcomed(t)
	p.wantEnd(p.send(wire.Error, 0, wire.Token{}, "no"), wire.ProtocolError, "ERROR is invalid")
}

func TestDeadlineAndKeyTravelInMeta(t *testing.T) {
	p := welcomed(t)
	meta := wire.Meta{HasDeadline: true, DeadlineMs: 2_000, IdempotencyKey: "k"}
	if _, err := p.Request("echo", nil, token, meta, p.now); err != nil {
		t.Fatal(err)
	}
	message, err := wire.ParseRequest(wire.Request, p.sent()[0].Body, 32)
	if err != nil || message.Meta != meta {
		t.Errorf("%+v: %v", message, err)
	}
}

func TestWhatTheServerAnnouncesIsBounded(t *testing.T) {
	p := newPeer(t)
	if p.Welcome() != nil || p.SendLimit() != 0 {
		t.Error("there are limits before WELCOME")
	}
	most := uint64(math.MaxUint64)
	p = welcomed(t, map[string]any{"max_frame": most, "idle_timeout_ms": most, "max_streams": most})
	welcome := p.Welcome()
	if welcome.MaxFrame != math.MaxUint32 || welcome.IdleTimeout <= 0 || welcome.MaxStreams != math.MaxInt32 || p.Salt() != 7 {
		t.Errorf("%+v", welcome)
	}
	if deadline, ok := p.NextDeadline(); !ok || deadline < p.now.Mono {
		t.Errorf("the next check is at %v", deadline)
	}
	if p.SendLimit() != 16_384 {
		t.Errorf("the limit without a session is %d", p.SendLimit())
	}
}

func TestOpeningWithoutATokenGivesNoSession(t *testing.T) {
	for _, result := range []any{nil, map[string]any{}, map[string]any{"token": []byte("short")}, map[string]any{"token": 5}} {
		p := welcomed(t)
		events := p.send(wire.Response, p.request("session.open", nil), wire.Token{}, result)
		if len(events) != 1 || p.HasSession() {
			t.Errorf("%v gave a session", result)
		}
	}
}
