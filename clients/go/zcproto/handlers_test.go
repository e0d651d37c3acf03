package zcproto

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// handle registers a handler and waits for the registration.
func handle(t *testing.T, session *Session, peer *fakeConnection, method string, handler Handler) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- session.Handle(context.Background(), method, handler) }()
	peer.respond(peer.request("session.handle"), map[string]any{})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func (p *fakeConnection) call(number uint32, method string, token wire.Token) {
	p.sendWith(wire.Call, number, []any{method, map[string]any{"tool": "shell"}, map[string]any{"deadline_ms": 120_000}}, token, 0)
}

func TestCallOfTheServerIsAnsweredByItsHandler(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	handle(t, client.Session, peer, "approve", func(_ context.Context, call *ServerCall) (any, error) {
		var params struct {
			Tool string `msgpack:"tool"`
		}
		err := call.Decode(&params)
		return call.User + " " + call.Method + " " + params.Tool, err
	})
	peer.call(2, "approve", tokenOf(1))
	frame := peer.next(wire.Result)
	if value, _ := msgpack.Decode(frame.Body, 32); value != "ada approve shell" || frame.Stream != 2 || frame.Token != tokenOf(1) {
		t.Errorf("got %v", value)
	}
}

func TestErrorOfAHandlerIsAnswered(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	outcome := error(nil)
	handle(t, client.Session, peer, "fail", func(context.Context, *ServerCall) (any, error) { return func() {}, outcome })
	for number, test := range []struct {
		err  error
		code Code
	}{{PermissionDenied, PermissionDenied}, {&Error{Code: NotFound}, NotFound}, {errors.New("bug"), Internal}, {nil, InvalidArgument}} {
		outcome = test.err
		peer.call(uint32(number+1), "fail", tokenOf(1))
		code, _, _, err := wire.ParseError(peer.next(wire.Failure).Body, 32)
		if Code(code) != test.code || err != nil {
			t.Errorf("%v: got %v", test.err, code)
		}
	}
	peer.call(9, "other", tokenOf(1))
	if code, _, _, _ := wire.ParseError(peer.next(wire.Failure).Body, 32); code != wire.Unimplemented {
		t.Errorf("got %v", code)
	}
}

func TestPanicOfAHandlerIsAnsweredAsInternalAndLogged(t *testing.T) {
	var log bytes.Buffer
	client, peer := newFakeServer(t).opened(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	handle(t, client.Session, peer, "crash", func(context.Context, *ServerCall) (any, error) {
		panic("no tea")
	})
	for number := range uint32(2) { // the second one: nothing counts as running
		peer.call(number+1, "crash", tokenOf(1))
		code, message, _, err := wire.ParseError(peer.next(wire.Failure).Body, 32)
		if code != wire.Internal || message != "the handler failed" || err != nil {
			t.Errorf("got %v %s", code, message)
		}
	}
	client.shared.mu.Lock() // the log is written before the answer
	defer client.shared.mu.Unlock()
	if text := log.String(); !strings.Contains(text, "no tea") || !strings.Contains(text, "handlers_test.go") {
		t.Errorf("the log has no stack: %s", text)
	}
}

func TestWithdrawnCallIsAnsweredOnceAndItsNumberIsFree(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	begun, release := make(chan context.Context), make(chan struct{})
	handle(t, client.Session, peer, "ask", func(ctx context.Context, _ *ServerCall) (any, error) {
		begun <- ctx
		<-release
		return "late", nil
	})
	peer.call(1, "ask", tokenOf(1))
	ctx := <-begun
	peer.sendWith(wire.Withdraw, 1, nil, tokenOf(1), 0)
	if code, _, _, _ := wire.ParseError(peer.next(wire.Failure).Body, 32); code != wire.Cancelled {
		t.Errorf("got %v", code)
	}
	<-ctx.Done()
	peer.call(1, "ask", tokenOf(1))
	<-begun
	close(release)
	peer.next(wire.Result)
	peer.none()
}

func TestHandlersAreLimitedAndRegisteredAgain(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{MaxCalls: 1})
	begun := make(chan context.Context, 1)
	handle(t, client.Session, peer, "ask", func(ctx context.Context, _ *ServerCall) (any, error) {
		begun <- ctx
		<-ctx.Done()
		return nil, ctx.Err()
	})
	peer.call(1, "ask", tokenOf(1))
	ctx := <-begun
	peer.call(2, "ask", tokenOf(1))
	if code, _, _, _ := wire.ParseError(peer.next(wire.Failure).Body, 32); code != wire.ResourceExhausted {
		t.Errorf("got %v", code)
	}
	peer.finish(newTLSError(TLSTruncated, nil))
	<-ctx.Done()
	peer = server.reconnected()
	request := peer.request("session.handle")
	if request.token != tokenOf(1) || request.param("max") != int64(1) {
		t.Errorf("got %s", request.Params)
	}
}

func TestCallWithTheNewTokenInTheReadOfARefreshReachesItsHandler(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return true, nil })
	peer.sendWith(wire.Event, 0, []any{"session.expiring", nil}, tokenOf(1), 0)
	request := peer.request("session.refresh")
	peer.together(func() {
		peer.respond(request, refreshable(2))
		peer.call(1, "ask", tokenOf(2))
	})
	if frame := peer.next(wire.Result); frame.Token != tokenOf(2) {
		t.Error("the answer has another token")
	}
}

func TestSessionOfHandlersIsShownBeforeItsIdleTimeout(t *testing.T) {
	client, peer := openedWith(t, Options{}, sessionResult(1, map[string]any{"idle_timeout_ms": 60_000}))
	handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return nil, nil })
	clock := peer.server.clock
	clock.advance(30 * time.Second) // half of the timeout is left
	clock.awaitTimer(t, 15*time.Second)
	peer.none()
	clock.advance(15 * time.Second)
	peer.respond(peer.request("session.handle"), map[string]any{})
}
