package conversation

import (
	"bytes"
	"strings"
	"testing"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

func (p *peer) open(window wire.Grant) *ItemStream {
	p.Helper()
	stream, err := p.Open("tokens", nil, token, wire.Meta{}, window, p.now)
	if err != nil {
		p.Fatal(err)
	}
	p.sent()
	return stream
}

func (p *peer) take(stream *ItemStream) []byte {
	p.Helper()
	body, err := stream.Take(p.now)
	if err != nil {
		p.Fatal(err)
	}
	return body
}

func TestStreamsNeedAServerThatHasThem(t *testing.T) {
	p := newPeer(t)
	without := merged(plainWelcome)
	delete(without, "streams")
	delete(without, "calls")
	p.send(wire.Welcome, 0, wire.Token{}, without)
	_, err := p.Open("tokens", nil, token, wire.Meta{}, wire.Grant{}, p.now)
	wantCode(t, err, wire.Unimplemented)
	_, err = p.Handle(token, nil, 1, p.now)
	wantCode(t, err, wire.Unimplemented)
	p.wantEnd(p.send(wire.Item, 1, token, 1), wire.ProtocolError, "kind")
}

func TestOpenStreamsAreLimited(t *testing.T) {
	p := welcomed(t)
	first := p.open(wire.Grant{})
	p.open(wire.Grant{})
	_, err := p.Open("tokens", nil, token, wire.Meta{}, wire.Grant{}, p.now)
	if fault := wantCode(t, err, wire.ResourceExhausted); fault.Details["limit"] != int64(2) {
		t.Error(fault.Details)
	}
	p.send(wire.Response, first.Number, token, nil)
	p.open(wire.Grant{})
}

func TestItemsAreTakenInOrderAndCreditFollows(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 4, Bytes: 10_000})
	for item := range 4 {
		if events := p.send(wire.Item, stream.Number, token, item); len(events) != 1 || events[0].Type != Item {
			t.Fatalf("%+v", events)
		}
	}
	if p.QueuedBytes() != 0 || !stream.HasBegun {
		t.Error("credit was granted for items that were not taken")
	}
	for item := range 4 {
		if body := p.take(stream); !bytes.Equal(body, []byte{byte(item)}) {
			t.Errorf("item %d is %x", item, body)
		}
		if frames := p.sent(); len(frames) != item%2 {
			t.Errorf("%d frames after item %d", len(frames), item)
		}
	}
	if stream.granted != (wire.Grant{Items: 8, Bytes: 10_000 + 4*65}) {
		t.Errorf("granted: %+v", stream.granted)
	}
}

func TestItemBeyondTheCreditIsFatal(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 10, Bytes: 1})
	p.send(wire.Item, stream.Number, token, "may exceed the bytes")
	p.wantEnd(p.send(wire.Item, stream.Number, token, 2), wire.ProtocolError, "beyond the credit")
}

func TestItemThatIsTooLargeIsFatal(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 10, Bytes: 10_000})
	p.wantEnd(p.send(wire.Item, stream.Number, token, strings.Repeat("x", 1_000)), wire.FrameTooLarge, "item")
}

func TestItemsOfTheApplicationNeedCredit(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{})
	if stream.MaySend() {
		t.Error("an item may be sent without credit")
	}
	if events := p.send(wire.Credit, stream.Number, token, []int{2, 66}); len(events) != 1 || events[0].Type != CreditRaised {
		t.Fatalf("%+v", events)
	}
	wantCode(t, stream.Send(strings.Repeat("x", 1_000), p.now), wire.InvalidArgument)
	wantCode(t, stream.Send(func() {}, p.now), wire.InvalidArgument)
	for _, mayGoOn := range []bool{true, false} {
		if err := stream.Send(1, p.now); err != nil || stream.MaySend() != mayGoOn {
			t.Error(err)
		}
	}
	stream.End(p.now)
	stream.End(p.now)
	if frames := p.sent(); len(frames) != 3 || frames[2].Kind != wire.End {
		t.Errorf("%+v", frames)
	}
	p.wantEnd(p.send(wire.Credit, stream.Number, token, []int{1, 66}), wire.ProtocolError, "lower")
}

func TestItemOnARequestIsFatal(t *testing.T) {
	p := welcomed(t)
	p.wantEnd(p.send(wire.Item, p.request("echo", nil), token, 1), wire.ProtocolError, "stream of a REQUEST")
}

func TestStreamThatIsLeftDropsItems(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 10, Bytes: 1_000})
	p.send(wire.Item, stream.Number, token, 1)
	p.Cancel(stream.Number, p.now)
	p.Cancel(stream.Number, p.now)
	if frames := p.sent(); len(frames) != 1 || frames[0].Kind != wire.Cancel || stream.HasItem() {
		t.Errorf("%+v", frames)
	}
	for range 20 {
		if events := p.send(wire.Item, stream.Number, token, 1); len(events) != 0 {
			t.Fatalf("%+v", events)
		}
	}
	p.wantFailure(p.send(wire.Error, stream.Number, token, []any{1, ""}), wire.Cancelled)
	if !stream.IsOver() || p.InFlight() != 0 {
		t.Error("the stream is not over after its answer")
	}
	p.send(wire.Item, stream.Number, token, 1)
	if p.DroppedUnknown != 1 {
		t.Error("a late item was not dropped")
	}
}

func TestWaitingItemsCanBeTakenAfterTheAnswer(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 2, Bytes: 1_000})
	p.send(wire.Item, stream.Number, token, 1)
	p.send(wire.Response, stream.Number, token, nil)
	p.take(stream)
	if stream.HasItem() || p.QueuedBytes() != 0 {
		t.Error("credit was granted on a stream that is over")
	}
}

func TestInvalidItemFailsItsStream(t *testing.T) {
	p := welcomed(t)
	stream := p.open(wire.Grant{Items: 2, Bytes: 1_000})
	frame := p.frame(wire.Item, stream.Number, token, nil)
	frame.Body = []byte{0xc1}
	p.Receive(frame.Append(nil), p.now)
	_, err := stream.Take(p.now)
	wantCode(t, err, wire.Internal)
}

func TestStaleItemOrCreditFailsItsStream(t *testing.T) {
	for kind, body := range map[wire.Kind]any{wire.Item: 1, wire.Credit: []int{1, 1}} {
		p := welcomed(t)
		stream := p.open(wire.Grant{Items: 2, Bytes: 1_000})
		p.wantFailure(p.sendStale(kind, stream.Number, token, body), wire.DataLoss)
		if frames := p.sent(); len(frames) != 1 || frames[0].Kind != wire.Cancel || !stream.WasLost {
			t.Errorf("%v: %+v", kind, frames)
		}
		p.sendStale(kind, stream.Number, token, body)
		if p.DroppedStale != 1 {
			t.Errorf("%v was not dropped on a stream that was left", kind)
		}
	}
}

// --- calls of the server -----------------------------------------------------------------------------

func handling(t *testing.T) *peer {
	p := welcomed(t)
	number, err := p.Handle(token, []string{"approve"}, 2, p.now)
	if err != nil {
		t.Fatal(err)
	}
	p.send(wire.Response, number, token, map[string]any{})
	p.sent()
	return p
}

func call(method string, deadline any) []any {
	return []any{method, map[string]any{"tool": "shell"}, map[string]any{"deadline_ms": deadline}}
}

// wantAnswer checks the one frame that was sent.
func (p *peer) wantAnswer(kind wire.Kind, code wire.Code) {
	p.Helper()
	frames := p.sent()
	if len(frames) != 1 || frames[0].Kind != kind {
		p.Fatalf("%+v", frames)
	}
	if kind == wire.Failure {
		if found, _, _, err := wire.ParseError(frames[0].Body, 32); err != nil || found != code {
			p.Errorf("%v instead of %v: %v", found, code, err)
		}
	}
	if p.CallsInFlight() != 0 {
		p.Error("an answered call is in flight")
	}
}

func TestCallsAreAnsweredOnce(t *testing.T) {
	p := handling(t)
	events := p.send(wire.Call, 1, token, call("approve", 1_000))
	if len(events) != 1 || events[0].Type != Call || events[0].Name != "approve" || events[0].Delay.Milliseconds() != 1_000 {
		t.Fatalf("%+v", events)
	}
	p.Answer(1, true, p.now)
	p.wantAnswer(wire.Result, 0)
	p.Answer(1, false, p.now)
	p.Fail(1, &Error{Code: wire.Internal}, p.now)
	if p.QueuedBytes() != 0 {
		t.Error("a call was answered twice")
	}
}

func TestCallsThatCannotBeRunAreRefused(t *testing.T) {
	for name, example := range map[string]struct {
		token wire.Token
		body  any
		code  wire.Code
	}{
		"another session": {wire.Token{8}, call("approve", 1), wire.Unauthenticated},
		"another method":  {token, call("other", 1), wire.Unimplemented},
		"no form":         {token, "approve", wire.InvalidArgument},
		"no deadline":     {token, []any{"approve", nil}, wire.InvalidArgument},
		"the past":        {token, call("approve", -1), wire.DeadlineExceeded},
	} {
		p := handling(t)
		if events := p.send(wire.Call, 1, example.token, example.body); len(events) != 0 {
			t.Errorf("%s: %+v", name, events)
		}
		p.wantAnswer(wire.Failure, example.code)
	}
	p := handling(t)
	p.sendStale(wire.Call, 1, token, call("approve", 1))
	p.wantAnswer(wire.Failure, wire.StaleTimestamp)
	p.send(wire.Call, 1, token, call("approve", 1))
	p.wantEnd(p.send(wire.Call, 1, token, call("approve", 1)), wire.ProtocolError, "in flight")
}

func TestCallBeforeRegistrationIsFatal(t *testing.T) {
	p := welcomed(t)
	p.wantEnd(p.send(wire.Call, 1, token, call("approve", 1)), wire.ProtocolError, "kind")
}

func TestWithdrawnCallIsAnsweredAtOnce(t *testing.T) {
	p := handling(t)
	p.send(wire.Call, 1, token, call("approve", 1_000))
	p.send(wire.Withdraw, 1, wire.Token{8}, nil)
	if p.DroppedUnknown != 1 {
		t.Error("WITHDRAW with another token had an effect")
	}
	if events := p.sendStale(wire.Withdraw, 1, token, nil); len(events) != 1 || events[0].Type != Withdrawn {
		t.Fatalf("%+v", events)
	}
	p.wantAnswer(wire.Failure, wire.Cancelled)
}

func TestCallsFollowARefreshedToken(t *testing.T) {
	p := handling(t)
	renewed := wire.Token{4}
	number := p.request("session.refresh", nil)
	answer := p.frame(wire.Response, number, wire.Token{}, map[string]any{"token": renewed[:]}).Append(nil)
	// The call is in the same read as the answer.
	events := p.Receive(p.frame(wire.Call, 1, renewed, call("approve", 1)).Append(answer), p.now)
	if len(events) != 2 || events[1].Type != Call || events[1].Token != renewed {
		t.Fatalf("%+v", events)
	}
	if events := p.send(wire.Call, 2, token, call("approve", 1)); len(events) != 1 {
		t.Error("a call with the token before was refused")
	}
	p.SessionEnded(renewed)
	p.sent()
	p.send(wire.Call, 3, renewed, call("approve", 1))
	if frames := p.sent(); len(frames) != 1 || frames[0].Kind != wire.Failure {
		t.Errorf("%+v", frames)
	}
}

func TestServerThatReadsNoAnswersIsAFault(t *testing.T) {
	for name, answer := range map[string]func(*peer, uint32){
		"other":   func(*peer, uint32) {},
		"approve": func(p *peer, number uint32) { p.Fail(number, &Error{Code: wire.ResourceExhausted}, p.now) },
	} {
		p := handling(t)
		p.BlockOutput()
		var events []Event
		for number := range uint32(2_000) {
			events = p.send(wire.Call, number+1, token, call(name, 1))
			if p.State() == Closed {
				break
			}
			answer(p, number+1)
		}
		p.wantEnd(events, wire.ProtocolError, "reads no answers")
	}
	p := handling(t)
	p.BlockOutput()
	for number := range uint32(5_000) {
		if number%500 == 0 {
			p.UnblockOutput(p.now)
			p.BlockOutput()
		}
		p.send(wire.Call, number+1, token, call("other", 1))
	}
	if p.State() != Open {
		t.Error("a server that reads its answers was cut off")
	}
}

func TestResultsThatCannotBeSentAreFailures(t *testing.T) {
	for _, value := range []any{func() {}, strings.Repeat("x", 1<<20)} {
		p := handling(t)
		p.send(wire.Call, 1, token, call("approve", 1))
		p.Answer(1, value, p.now)
		p.wantAnswer(wire.Failure, wire.Internal)
	}
	p := handling(t)
	p.send(wire.Call, 1, token, call("approve", 1))
	p.Fail(1, &Error{Code: wire.Replayed, Message: strings.Repeat("x", 1<<20)}, p.now)
	p.wantAnswer(wire.Failure, wire.Unknown)
}

func TestInvalidCreditIsFatal(t *testing.T) {
	for _, body := range []any{nil, []int{1}, []int{-1, 1}, []any{1.0, 1}, []any{nil, nil}, []uint64{1 << 53, 1}, []any{"1", 1}} {
		p := welcomed(t)
		stream := p.open(wire.Grant{})
		p.wantEnd(p.send(wire.Credit, stream.Number, token, body), wire.ProtocolError, "CREDIT is invalid")
	}
}

func TestNothingNewIsOpenedWhileDraining(t *testing.T) {
	p := welcomed(t)
	p.send(wire.GoAway, 0, wire.Token{}, map[string]any{"reason": "draining", "retry_after_ms": 0})
	_, err := p.Open("tokens", nil, token, wire.Meta{}, wire.Grant{}, p.now)
	wantCode(t, err, wire.Unavailable)
	_, err = p.Handle(token, nil, 1, p.now)
	wantCode(t, err, wire.Unavailable)
	p = welcomed(t)
	_, err = p.Open("No Such", nil, token, wire.Meta{}, wire.Grant{}, p.now)
	wantCode(t, err, wire.InvalidArgument)
}

func TestWithdrawWithABodyIsFatal(t *testing.T) {
	p := handling(t)
	frame := p.frame(wire.Withdraw, 1, token, nil)
	frame.Body = []byte{0xc0}
	frame.Timestamp = 0
	p.wantEnd(p.Receive(frame.Append(nil), p.now), wire.ProtocolError, "body")
}

func TestFailuresCarryDetails(t *testing.T) {
	p := handling(t)
	p.send(wire.Call, 1, token, call("approve", 1))
	p.Fail(1, &Error{Code: wire.NotFound, Message: "none", Details: map[string]any{"id": "x"}}, p.now)
	code, message, details, err := wire.ParseError(p.sent()[0].Body, 32)
	if err != nil || code != wire.NotFound || message != "none" || details["id"] != "x" {
		t.Errorf("%v %q %v: %v", code, message, details, err)
	}
}
