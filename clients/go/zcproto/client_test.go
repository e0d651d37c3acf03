package zcproto

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

func TestConcurrentCallsGetTheirOwnResponsesInAnyOrder(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	first := begin(t, client.Session, "echo", map[string]any{"n": 1})
	one := peer.request("echo")
	second := begin(t, client.Session, "echo", map[string]any{"n": 2})
	two := peer.request("echo")
	peer.respond(two, "two")
	second.succeeds("two")
	peer.respond(one, "one")
	first.succeeds("one")
	if one.token != tokenOf(1) || one.Meta.DeadlineMs != 30_000 {
		t.Errorf("got %+v", one.Meta)
	}
}

func TestCallsWaitForAFreeStream(t *testing.T) {
	server := newFakeServer(t)
	server.welcome["max_streams"] = 1
	client, peer := server.opened(Options{})
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	second := begin(t, client.Session, "second", nil)
	cancelled := begin(t, client.Session, "third", nil)
	cancelled.cancel()
	cancelled.fails(Cancelled)
	peer.none()
	peer.respond(one, 1)
	first.succeeds(int64(1))
	peer.respond(peer.request("second"), 2)
	second.succeeds(int64(2))
}

func TestTimedOutCallIsCancelledWithoutAffectingOthers(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{Timeout: 2 * time.Second})
	slow := begin(t, client.Session, "slow", nil)
	request := peer.request("slow")
	server.clock.advance(time.Second)
	other := begin(t, client.Session, "other", nil)
	pending := peer.request("other")
	server.clock.advance(time.Second)
	slow.fails(DeadlineExceeded)
	slow.fails(context.DeadlineExceeded)
	if frame := peer.next(wire.Cancel); frame.Stream != request.stream || frame.Token != tokenOf(1) {
		t.Errorf("got a CANCEL of %d", frame.Stream)
	}
	peer.fail(request, Cancelled, nil)
	peer.respond(pending, "yes")
	other.succeeds("yes")
}

func TestCancelledCallHasTheCauseOfItsContext(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "slow", nil)
	peer.request("slow")
	call.cancel()
	call.fails(Cancelled)
	call.fails(context.Canceled)
	peer.next(wire.Cancel)
}

func TestInvalidParamsAreRefusedBeforeSending(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	for _, params := range []any{make(chan int), map[string]any{"f": func() {}}, 1, "text"} {
		if err := client.Call(context.Background(), "echo", params, nil); !errors.Is(err, InvalidArgument) {
			t.Errorf("%T: got %v", params, err)
		}
	}
	peer.none()
}

func TestLargeFirstCallIsPrecededByASmallOne(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = peer.server.reconnected()
	shown := peer.request("session.info")
	call := begin(t, client.Session, "big", map[string]any{"data": strings.Repeat("x", 20_000)})
	small := peer.request("session.info")
	peer.respond(shown, map[string]any{})
	peer.respond(small, map[string]any{})
	peer.respond(peer.request("big"), "done")
	call.succeeds("done")
}

func TestErrorHasCodeMessageAndDetails(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "missing", nil)
	request := peer.request("missing")
	peer.sendWith(wire.Error, request.stream, []any{5, "no\x1b[31m such", map[string]any{"n": 1}}, request.token, 0)
	call.fails(NotFound)
	var failure *Error
	if !errors.As(call.err, &failure) || failure.Message != `no\x1b[31m such` || failure.Details["n"] != int64(1) {
		t.Errorf("got %#v", failure)
	}
	call = begin(t, client.Session, "odd", nil)
	peer.fail(peer.request("odd"), Code(99), nil)
	call.fails(Unknown)
	if !strings.Contains(call.err.Error(), "99") {
		t.Errorf("got %v", call.err)
	}
}

func TestResultThatDoesNotSuitItsTargetIsInternal(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	done := make(chan error, 1)
	go func() {
		var number int
		done <- client.Call(context.Background(), "name", nil, &number)
	}()
	peer.respond(peer.request("name"), "text")
	if err := <-done; !errors.Is(err, Internal) {
		t.Errorf("got %v", err)
	}
}

// --- the table of section 11.1 ---------------------------------------------------------------------------------------------

func TestUnavailableIsRetriedAfterItsDelay(t *testing.T) {
	for _, code := range []Code{Unavailable, ResourceExhausted} {
		server := newFakeServer(t)
		client, peer := server.opened(Options{})
		call := begin(t, client.Session, "busy", nil)
		peer.fail(peer.request("busy"), code, map[string]any{"retry_after_ms": 200})
		server.clock.awaitTimer(t, 250*time.Millisecond) // and half of 100 ms of jitter
		server.clock.advance(249 * time.Millisecond)
		peer.none()
		server.clock.advance(time.Millisecond)
		peer.respond(peer.request("busy"), "done")
		call.succeeds("done")
	}
}

func TestRetryBeyondTheTimeoutIsNotWaitedFor(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "busy", nil)
	peer.fail(peer.request("busy"), Unavailable, map[string]any{"retry_after_ms": 60_000})
	call.fails(Unavailable)
}

func TestErrorsThatAreReported(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	for _, code := range []Code{
		DeadlineExceeded, Cancelled, Internal, Unknown, DataLoss, InvalidArgument, NotFound, PermissionDenied, Unimplemented,
		FailedPrecondition, Unauthenticated,
	} {
		call := begin(t, client.Session, "fail", nil)
		peer.fail(peer.request("fail"), code, nil)
		call.fails(code)
	}
	call := begin(t, client.Session, "fail", nil)
	peer.fail(peer.request("fail"), ResourceExhausted, map[string]any{"limit": 5})
	call.fails(ResourceExhausted)
	peer.none()
}

func TestStaleTimestampIsRetriedAtOnceOnce(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	call := begin(t, client.Session, "late", nil)
	ahead := server.clock.wall() + 3_600_000
	peer.fail(peer.request("late"), StaleTimestamp, map[string]any{"server_time": ahead})
	frame := peer.next(wire.Request)
	if frame.Timestamp != uint64(ahead) {
		t.Errorf("got a timestamp of %d", frame.Timestamp)
	}
	answer := []any{int(StaleTimestamp), "because", map[string]any{"server_time": ahead}}
	peer.sendWith(wire.Error, frame.Stream, answer, frame.Token, time.Hour)
	call.fails(StaleTimestamp)
}

func TestExpiredTokenOpensASessionAndIsRetriedOnce(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.respond(peer.request("session.open"), sessionResult(2, nil))
	again := peer.request("work")
	if again.token != tokenOf(2) {
		t.Error("the call was not repeated with the new token")
	}
	peer.fail(again, TokenExpired, nil)
	call.fails(TokenExpired)
}

func TestEndedSessionFailsEveryCallUntilTheApplicationOpensAnother(t *testing.T) {
	for _, code := range []Code{TokenRevoked, SessionReplaced} {
		client, peer := newFakeServer(t).opened(Options{})
		call := begin(t, client.Session, "work", nil)
		peer.fail(peer.request("work"), code, nil)
		call.fails(code)
		begin(t, client.Session, "more", nil).fails(code)
		peer.none()
		opened := make(chan error, 1)
		go func() {
			_, err := client.Open(context.Background())
			opened <- err
		}()
		peer.respond(peer.request("session.open"), sessionResult(2, nil))
		if err := <-opened; err != nil {
			t.Fatal(err)
		}
	}
}

func TestLostConnectionRetriesOnlyIdempotentCalls(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	lost := begin(t, client.Session, "lost", nil)
	peer.request("lost")
	safe := begin(t, client.Session, "safe", nil, IdempotencyKey("order-7"))
	if key := peer.request("safe").Meta.IdempotencyKey; key != "order-7" {
		t.Errorf("got the key %q", key)
	}
	peer.finish(newTLSError(TLSTruncated, nil))
	lost.isClosed(false)
	var failure *TLSError
	if !errors.As(lost.err, &failure) || failure.Failure != TLSTruncated {
		t.Errorf("got %v", lost.err)
	}
	peer = server.reconnected()
	peer.respond(peer.request("session.info"), map[string]any{})
	peer.respond(peer.soon(wire.Request, "safe"), "done")
	safe.succeeds("done")
}

func TestGoAwayAndThenACleanEndRetriesTheCall(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	call := begin(t, client.Session, "work", nil)
	peer.request("work")
	peer.goAway("draining", 0)
	peer.finish(io.EOF)
	peer = server.reconnected()
	peer.respond(peer.request("session.info"), map[string]any{})
	peer.respond(peer.soon(wire.Request, "work"), "done")
	call.succeeds("done")
}

func TestGoAwayAndThenATruncationReportsTheCall(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "work", nil)
	peer.request("work")
	peer.goAway("draining", 0)
	peer.finish(newTLSError(TLSTruncated, nil))
	call.isClosed(false)
	_ = client
}

func TestGoAwayLetsCallsFinishAndOpensAnotherConnection(t *testing.T) {
	server := newFakeServer(t)
	client, old := server.opened(Options{})
	running := begin(t, client.Session, "old", nil)
	request := old.request("old")
	old.goAway("draining", 100*time.Millisecond)
	server.clock.awaitTimer(t, 150*time.Millisecond) // with half of 100 ms of jitter
	next := begin(t, client.Session, "new", nil)
	server.clock.advance(150 * time.Millisecond)
	peer := server.accept()
	first := peer.next(wire.Request) // session.info and the call, in either order
	second := peer.next(wire.Request)
	for _, frame := range []wire.Frame{first, second} {
		peer.sendWith(wire.Response, frame.Stream, "done", frame.Token, 0)
	}
	next.succeeds("done")
	old.respond(request, "late")
	running.succeeds("late")
	<-old.connection.released
}

// --- connecting -----------------------------------------------------------------------------------------------------------

func TestErrorOfTheFirstAttemptIsReported(t *testing.T) {
	for _, failure := range []error{
		&ConnectError{Reason: "unreachable"}, newTLSError(TLSPinMismatch, nil), configError("bad"), &ClosedError{Reason: "no"},
	} {
		server := newFakeServer(t)
		server.failNext(failure)
		if err := server.client(Options{}).open(context.Background()); !errors.Is(err, failure) {
			t.Errorf("got %v instead of %v", err, failure)
		}
	}
}

func TestRefusedFirstAttemptIsRepeatedUntilTheServerListens(t *testing.T) {
	server := newFakeServer(t)
	refused := &ConnectError{Reason: "refused", Refused: true}
	server.failNext(refused, refused, refused)
	client := server.client(Options{})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	for delay := 50 * time.Millisecond; delay <= 200*time.Millisecond; delay *= 2 {
		server.clock.awaitTimer(t, delay)
		server.clock.advance(delay)
	}
	server.accept()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	server.failNext(refused)
	late := server.client(Options{StartTimeout: -1})
	if err := late.open(context.Background()); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
}

func TestGoAwayAtTheFirstConnectionIsRetriedWithinTheStartTimeout(t *testing.T) {
	server := newFakeServer(t)
	server.goAways = []time.Duration{200 * time.Millisecond, 0}
	client := server.client(Options{StartTimeout: time.Second})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	for _, delay := range []time.Duration{250 * time.Millisecond, 100 * time.Millisecond} { // with jitter
		server.clock.awaitTimer(t, delay)
		server.clock.advance(delay)
	}
	server.accept()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	server.goAways = []time.Duration{2 * time.Second}
	var connect *ConnectError
	if err := server.client(Options{StartTimeout: time.Second}).open(context.Background()); !errors.As(err, &connect) {
		t.Errorf("got %v", err)
	}
}

func TestReconnectBacksOffUntilAConnectionHasLasted(t *testing.T) {
	server := newFakeServer(t)
	_, peer := server.opened(Options{})
	delay := 50 * time.Millisecond // half of the ceiling, from 100 ms to 30 s
	for range 12 {
		peer.finish(newTLSError(TLSTruncated, nil))
		server.clock.awaitTimer(t, delay)
		server.clock.advance(delay)
		peer = server.accept()
		delay = min(delay*2, 15*time.Second)
	}
	server.clock.advance(stableAfter)
	peer.finish(newTLSError(TLSTruncated, nil))
	server.clock.awaitTimer(t, 50*time.Millisecond)
	server.clock.advance(50 * time.Millisecond)
	server.accept()
}

func TestPinMismatchOnReconnectIsReported(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	server.failNext(newTLSError(TLSPinMismatch, nil), newTLSError(TLSPinMismatch, nil))
	peer.finish(newTLSError(TLSTruncated, nil))
	<-peer.connection.ended
	call := begin(t, client.Session, "work", nil)
	advanceUntil(server, call.done)
	var failure *TLSError
	if !errors.As(call.err, &failure) || failure.Failure != TLSPinMismatch {
		t.Errorf("got %v", call.err)
	}
}

func TestIdleConnectionIsMadeAgainByTheNextCall(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	peer.goAway("idle", 0)
	peer.finish(io.EOF)
	<-peer.connection.ended
	server.clock.advance(time.Hour / 2)
	if dials := server.dialed(); dials != 1 {
		t.Errorf("it has connected %d times", dials)
	}
	call := begin(t, client.Session, "work", nil)
	peer = server.accept()
	for range 2 {
		frame := peer.next(wire.Request)
		peer.sendWith(wire.Response, frame.Stream, "done", frame.Token, 0)
	}
	call.succeeds("done")
}

func TestUnansweredPingAbortsTheConnection(t *testing.T) {
	server := newFakeServer(t)
	server.welcome["idle_timeout_ms"] = 30_000
	client, peer := server.opened(Options{Timeout: NoTimeout})
	call := begin(t, client.Session, "slow", nil)
	if peer.request("slow").Meta.HasDeadline {
		t.Error("a call without a timeout has a deadline")
	}
	server.clock.advance(10 * time.Second)
	server.clock.advance(10 * time.Second)
	peer.next(wire.Ping)
	server.clock.advance(10 * time.Second)
	call.isClosed(false)
	if !peer.isReset {
		t.Error("the connection was not reset")
	}
}

func TestFatalErrorIsReportedWithItsCode(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "work", nil)
	peer.request("work")
	peer.send(wire.Error, 0, []any{int(Replayed), "wrong counter"})
	call.isClosed(false)
	call.fails(Replayed)
}

func TestCloseEndsEverythingAndIsIdempotent(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	call := begin(t, client.Session, "slow", nil)
	peer.request("slow")
	closed := make(chan struct{})
	go func() {
		_ = client.Close()
		_ = client.Close()
		close(closed)
	}()
	peer.respond(peer.request("session.close"), map[string]any{})
	<-closed
	call.isClosed(true)
	if !peer.isShut {
		t.Error("no close_notify was sent")
	}
	begin(t, client.Session, "late", nil).isClosed(true)
	if _, err := client.NextEvent(context.Background()); !isClosed(err) {
		t.Errorf("got %v", err)
	}
	if _, err := client.SessionFor(context.Background(), APIKey("bob", "k")); !isClosed(err) {
		t.Errorf("got %v", err)
	}
}

func TestServerThatReadsNothingHoldsRequestsBack(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	peer.block(maxUnsent + 1)
	first := begin(t, client.Session, "first", nil)
	request := peer.request("first")
	eventually(t, func() bool {
		peer.connection.mu.Lock()
		defer peer.connection.mu.Unlock()
		return peer.connection.isPaused
	})
	second := begin(t, client.Session, "second", nil)
	second.cancel()
	second.fails(Cancelled)
	peer.none()
	third := begin(t, client.Session, "third", nil)
	peer.block(0)
	peer.respond(peer.request("third"), 3)
	third.succeeds(int64(3))
	peer.respond(request, 1)
	first.succeeds(int64(1))
}

// --- events and secrets -----------------------------------------------------------------------------------------------------

func TestEventsAreQueuedAndBounded(t *testing.T) {
	queue := newEventQueue()
	for number := range maxEvents + 5 {
		queue.put(fmt.Sprint(number), []byte{0xc0})
	}
	first, err := queue.next(context.Background())
	if err != nil || first.Name != "5" || queue.dropped != 5 {
		t.Errorf("got %v, %v after %d were dropped", first, err, queue.dropped)
	}
	queue.put("large", append([]byte{0xc6, 0, 0x40, 0, 0}, make([]byte, 4<<20)...))
	if large, err := queue.next(context.Background()); err != nil || large.Name != "large" || queue.size != 0 {
		t.Errorf("got %v, %v, with %d bytes left", large.Name, err, queue.size)
	}
	queue.put("last", []byte{0xc0})
	queue.close()
	if last, err := queue.next(context.Background()); err != nil || last.Name != "last" {
		t.Errorf("got %v, %v", last, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := newEventQueue().next(ctx); !errors.Is(err, Cancelled) {
		t.Errorf("got %v", err)
	}
}

func TestEventReachesTheApplication(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	peer.send(wire.Event, 0, []any{"pins.next", map[string]any{"pins": []any{"sha256/x"}, "from": 1}})
	event, err := client.NextEvent(context.Background())
	var data struct {
		Pins []string `msgpack:"pins"`
	}
	if err != nil || event.Name != "pins.next" || event.Decode(&data) != nil || data.Pins[0] != "sha256/x" {
		t.Errorf("got %v, %v", event, err)
	}
	events := make(chan Event, 1)
	_, peer = newFakeServer(t).opened(Options{OnEvent: func(event Event) { events <- event }})
	peer.send(wire.Event, 0, []any{"later.feature", nil})
	if event := <-events; event.Name != "later.feature" {
		t.Errorf("got %v", event)
	}
}

func TestNoSecretIsInFormattedOutput(t *testing.T) {
	device, err := DeviceFromSeed(bytes.Repeat([]byte{9}, 32))
	if err != nil {
		t.Fatal(err)
	}
	options := Options{Credentials: APIKey("ada", testKey)}
	client, peer := newFakeServer(t).opened(options)
	stream := client.Stream(context.Background(), "s", nil)
	peer.requestOf(wire.Open, "s")
	eventually(t, func() bool { // fmt reads fields without the mutex
		client.shared.mu.Lock()
		defer client.shared.mu.Unlock()
		return !peer.connection.isWriting
	})
	login := Login{Scheme: "password", Fields: map[string]any{"password": testKey}}
	secrets := []string{testKey, fmt.Sprint(bytes.Repeat([]byte{1}, 32)), fmt.Sprintf("%x", bytes.Repeat([]byte{1}, 32)),
		client.Token(), fmt.Sprint(bytes.Repeat([]byte{9}, 32)), fmt.Sprintf("%x", bytes.Repeat([]byte{9}, 32)),
		fmt.Sprintf("%#v", bytes.Repeat([]byte{1}, 32)), fmt.Sprintf("%x", testKey)}
	info, _ := client.Info()
	for _, value := range []any{
		client, *client, client.Session, stream, device, *device, options,
		options.Credentials, DeviceKey(device, "laptop"), login, info, []any{login}, tokenOf(1),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%x", "%q"} {
			text := fmt.Sprintf(verb, value)
			for _, secret := range secrets {
				if strings.Contains(text, secret) {
					t.Errorf("%s of %T has a secret: %s", verb, value, text)
				}
			}
		}
	}
}
