package zcproto

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

func refreshable(number byte) map[string]any {
	token := bytes.Repeat([]byte{number + 100}, 32)
	return sessionResult(number, map[string]any{"refresh_token": token, "refresh_expires_at": testWall + 1<<40})
}

// openedWith returns a client whose session.open had this result.
func openedWith(t *testing.T, options Options, result map[string]any) (*Client, *fakeConnection) {
	t.Helper()
	return newFakeServer(t).openedWith(options, result)
}

func (s *fakeServer) openedWith(options Options, result map[string]any) (*Client, *fakeConnection) {
	s.t.Helper()
	return s.openedAt("fake", options, result)
}

func TestSessionOpenHasNoTokenButTheCredentials(t *testing.T) {
	server := newFakeServer(t)
	client := server.client(Options{Credentials: APIKey("ada", testKey), ClientName: "test/1"})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	request := peer.request("session.open")
	if request.token != (wire.Token{}) || request.param("user") != "ada" || request.param("key") != testKey ||
		request.param("scheme") != "api_key" || request.param("client") != "test/1" {
		t.Errorf("got %s", request.Params)
	}
	peer.respond(request, sessionResult(1, nil))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	info, open := client.Info()
	if !open || info.ID != "s-1" || info.User != "ada" || info.ExpiresAt.UnixMilli() != testWall+7_200_000 || info.Bound {
		t.Errorf("got %+v", info)
	}
}

func TestRefusedSessionOpenIsNotRetried(t *testing.T) {
	server := newFakeServer(t)
	client := server.client(Options{Credentials: APIKey("ada", testKey)})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	peer.fail(peer.request("session.open"), Unauthenticated, nil)
	if err := <-done; !errors.Is(err, Unauthenticated) {
		t.Errorf("got %v", err)
	}
	peer.none()
}

func TestInvalidResultOfSessionOpenIsRefused(t *testing.T) {
	for name, value := range map[string]any{
		"token": []byte("short"), "id": 1, "user": nil, "expires_at": "soon", "idle_timeout_ms": nil, "bound": 1, "refresh_token": []byte{1},
	} {
		server := newFakeServer(t)
		client := server.client(Options{Credentials: APIKey("ada", testKey)})
		done := make(chan error, 1)
		go func() { done <- client.open(context.Background()) }()
		peer := server.accept()
		peer.respond(peer.request("session.open"), sessionResult(1, map[string]any{name: value}))
		if err := <-done; !errors.Is(err, ProtocolError) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestVeryLargeTimesOfTheServerAreAccepted(t *testing.T) {
	client, _ := openedWith(t, Options{}, sessionResult(1, map[string]any{
		"expires_at": uint64(1<<64 - 1), "idle_timeout_ms": int64(1<<63 - 1),
	}))
	client.shared.mu.Lock()
	defer client.shared.mu.Unlock()
	if client.sessions.usableUntil != forever {
		t.Errorf("usable until %v", client.sessions.usableUntil)
	}
}

func TestSessionIsRefreshedOnceAndCallsWait(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	clock := peer.server.clock
	clock.advance(49 * time.Minute)
	peer.none()
	clock.advance(30 * time.Second) // 82.5 % of an hour
	request := peer.request("session.refresh")
	if request.token != (wire.Token{}) || !bytes.Equal(request.param("refresh_token").([]byte), bytes.Repeat([]byte{101}, 32)) {
		t.Errorf("got %s", request.Params)
	}
	first, second := begin(t, client.Session, "work", nil), begin(t, client.Session, "work", nil)
	peer.none()
	peer.respond(request, refreshable(2))
	for range 2 {
		call := peer.request("work")
		if call.token != tokenOf(2) {
			t.Error("a call has the old token")
		}
		peer.respond(call, "done")
	}
	first.succeeds("done")
	second.succeeds("done")
	peer.none()
}

func TestExpiredTokenIsRefreshedOnceForAllCalls(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	calls := []*call{begin(t, client.Session, "work", nil), begin(t, client.Session, "work", nil), begin(t, client.Session, "work", nil)}
	var requests []fakeRequest
	for range calls {
		requests = append(requests, peer.request("work"))
	}
	for _, request := range requests {
		peer.fail(request, TokenExpired, nil)
	}
	peer.respond(peer.request("session.refresh"), refreshable(2))
	for range calls {
		peer.respond(peer.request("work"), "done")
	}
	for _, call := range calls {
		call.succeeds("done")
	}
}

func TestExpiredRefreshTokenOpensASession(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.fail(peer.request("session.refresh"), TokenExpired, nil)
	peer.respond(peer.request("session.open"), sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestRevokedRefreshTokenEndsTheSession(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.fail(peer.request("session.refresh"), TokenRevoked, nil)
	call.fails(TokenRevoked)
	begin(t, client.Session, "work", nil).fails(TokenRevoked)
	peer.none()
}

func TestLostRefreshIsSentAgainWithTheSameToken(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.request("session.refresh")
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = peer.server.reconnected()
	again := peer.request("session.refresh")
	if !bytes.Equal(again.param("refresh_token").([]byte), bytes.Repeat([]byte{101}, 32)) {
		t.Error("another refresh token was sent")
	}
	peer.respond(again, refreshable(2))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestUsedRefreshTokenIsNotSentAfterTheGraceThatItsFirstUseBegan(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	for range 2 {
		peer.request("session.refresh")
		peer.server.clock.advance(3 * time.Second)
		peer.finish(newTLSError(TLSTruncated, nil))
		peer = peer.server.reconnected()
	}
	peer.respond(peer.request("session.open"), sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestUsedRefreshTokenIsNotSentAfterALongReconnect(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.request("session.refresh")
	peer.finish(newTLSError(TLSTruncated, nil))
	peer.server.clock.advance(5 * time.Second)
	peer = peer.server.reconnected()
	peer.respond(peer.request("session.open"), sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestRefreshThatWasNotRunDoesNotBeginTheGrace(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.request("session.refresh")
	peer.goAway("draining", 0)
	peer.server.clock.advance(6 * time.Second)
	peer.finish(io.EOF)
	peer = peer.server.reconnected()
	peer.respond(peer.request("session.refresh"), refreshable(2))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestServerThatOpensExpiredSessionsCausesNoStorm(t *testing.T) {
	expired := sessionResult(1, map[string]any{"expires_at": 0})
	server := newFakeServer(t)
	client := server.client(Options{Credentials: APIKey("ada", testKey), Timeout: NoTimeout})
	go func() { _ = client.open(context.Background()) }()
	peer := server.accept()
	for jitter := 50 * time.Millisecond; jitter <= 800*time.Millisecond; jitter *= 2 {
		peer.respond(peer.request("session.open"), expired)
		server.clock.awaitTimer(t, time.Second+jitter)
		peer.none()
		server.clock.advance(time.Second + jitter)
	}
}

func TestEventsOfTheSession(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	peer.sendWith(wire.Event, 0, []any{"session.expiring", map[string]any{"expires_at": 1}}, tokenOf(1), 0)
	peer.respond(peer.request("session.refresh"), refreshable(2))
	peer.sendWith(wire.Event, 0, []any{"session.revoked", map[string]any{"reason": "admin"}}, tokenOf(2), 0)
	peer.fail(peer.request("session.info"), SessionReplaced, nil)
	for _, name := range []string{"session.expiring", "session.revoked"} {
		if event, err := client.NextEvent(context.Background()); err != nil || event.Name != name {
			t.Errorf("got %v, %v", event, err)
		}
	}
	eventually(t, func() bool {
		_, open := client.Info()
		return !open
	})
	begin(t, client.Session, "work", nil).fails(SessionReplaced)
}

// --- devices and logins ------------------------------------------------------------------------------------------------------

func testDevice(t *testing.T) *Device {
	t.Helper()
	device, err := DeviceFromSeed(bytes.Repeat([]byte{5}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return device
}

func TestDeviceSignsSessionOpenAndAttachesOnReconnect(t *testing.T) {
	server := newFakeServer(t)
	device := testDevice(t)
	client := server.client(Options{Credentials: DeviceKey(device, "laptop")})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	request := peer.request("session.open")
	signed := wire.OpenMessage(peer.salt, peer.leafHash(), "laptop")
	if !ed25519.Verify(device.PublicKey(), signed, request.param("signature").([]byte)) || request.param("device") != "laptop" {
		t.Error("the signature is invalid")
	}
	peer.respond(request, sessionResult(1, map[string]any{"bound": true}))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = server.reconnected()
	request = peer.request("session.attach")
	signed = wire.AttachMessage(peer.salt, peer.leafHash(), tokenOf(1))
	if !ed25519.Verify(device.PublicKey(), signed, request.param("signature").([]byte)) || request.token != tokenOf(1) {
		t.Error("the signature is invalid")
	}
	peer.respond(request, map[string]any{})
}

func TestDeviceRegistersItsHandlersBeforeOtherRequests(t *testing.T) {
	server := newFakeServer(t)
	options := Options{Credentials: DeviceKey(testDevice(t), "laptop")}
	client, peer := server.openedWith(options, sessionResult(1, map[string]any{"bound": true}))
	handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return true, nil })
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = server.reconnected()
	attaching := peer.request("session.attach")
	call := begin(t, client.Session, "work", nil)
	peer.none()
	peer.respond(attaching, map[string]any{})
	registering := peer.request("session.handle")
	peer.none()
	peer.respond(registering, map[string]any{})
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestRefusedCallsShareOneAttach(t *testing.T) {
	client, peer := openedWith(t, Options{Credentials: DeviceKey(testDevice(t), "d")}, sessionResult(1, map[string]any{"bound": true}))
	first, second := begin(t, client.Session, "work", nil), begin(t, client.Session, "work", nil)
	one, two := peer.request("work"), peer.request("work")
	peer.together(func() {
		peer.fail(one, Unauthenticated, map[string]any{"attach": true})
		peer.fail(two, Unauthenticated, map[string]any{"attach": true})
	})
	attaching := peer.request("session.attach")
	peer.none()
	peer.respond(attaching, map[string]any{})
	for range 2 {
		frame := peer.next(wire.Request)
		message, _ := wire.ParseRequest(wire.Request, frame.Body, msgpack.MaxDepth)
		for message.Method == "session.attach" { // the second one was refused after the first had attached
			peer.sendWith(wire.Response, frame.Stream, map[string]any{}, frame.Token, 0)
			frame = peer.next(wire.Request)
			message, _ = wire.ParseRequest(wire.Request, frame.Body, msgpack.MaxDepth)
		}
		peer.sendWith(wire.Response, frame.Stream, "done", frame.Token, 0)
	}
	first.succeeds("done")
	second.succeeds("done")
}

func unknown() map[string]any { return map[string]any{"reason": "unknown_token"} }

func TestUnknownSessionIsOpenedAgainOnceForAllCallsAfterADelay(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	one, two := begin(t, client.Session, "one", nil), begin(t, client.Session, "two", nil)
	frames := []wire.Frame{peer.next(wire.Request), peer.next(wire.Request)}
	peer.together(func() {
		for _, frame := range frames {
			peer.fail(fakeRequest{stream: frame.Stream, token: frame.Token}, Unauthenticated, unknown())
		}
	})
	peer.server.clock.awaitTimer(t, 50*time.Millisecond)
	peer.none()
	peer.respond(peer.soon(wire.Request, "session.open"), sessionResult(2, nil))
	for range 2 {
		frame := peer.next(wire.Request)
		if frame.Token != tokenOf(2) {
			t.Errorf("sent with %v", frame.Token)
		}
		peer.sendWith(wire.Response, frame.Stream, "done", frame.Token, 0)
	}
	one.succeeds("done")
	two.succeeds("done")
	peer.none()
	client.shared.mu.Lock()
	defer client.shared.mu.Unlock()
	if ceiling := client.sessions.reopenings.ceiling; ceiling != 2*firstDelay {
		t.Errorf("the next delay is up to %v: it has grown with each call", ceiling)
	}
}

func TestUnknownSessionIsReportedTheSecondTimeAndDelaysGrow(t *testing.T) {
	client, peer := openedWith(t, Options{}, sessionResult(1, nil))
	delay := 50 * time.Millisecond
	for number := byte(2); number < 5; number++ {
		call := begin(t, client.Session, "work", nil)
		peer.fail(peer.request("work"), Unauthenticated, unknown())
		peer.server.clock.awaitTimer(t, delay)
		peer.respond(peer.soon(wire.Request, "session.open"), sessionResult(number, nil))
		peer.fail(peer.request("work"), Unauthenticated, unknown())
		call.fails(Unauthenticated)
		delay *= 2
	}
}

func TestSessionIsOpenedIfItsRefreshTokenIsUnknownAndItsTokenHasExpired(t *testing.T) {
	client, peer := openedWith(t, Options{}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	peer.fail(peer.request("session.refresh"), Unauthenticated, nil)
	peer.server.clock.awaitTimer(t, 50*time.Millisecond)
	peer.respond(peer.soon(wire.Request, "session.open"), sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestUnknownSessionWithoutCredentialsIsReported(t *testing.T) {
	server := newFakeServer(t)
	client := server.client(Options{NoSession: true})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), Unauthenticated, unknown())
	call.fails(Unauthenticated)
	peer.none()
}

func TestUnknownSessionThatOnlyHandlesCallsIsOpenedAgain(t *testing.T) {
	client, peer := openedWith(t, Options{}, sessionResult(1, nil))
	handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return nil, nil })
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = peer.server.reconnected()
	peer.fail(peer.request("session.handle"), Unauthenticated, unknown())
	peer.respond(peer.soon(wire.Request, "session.open"), sessionResult(2, nil))
	if registered := peer.request("session.handle"); registered.token != tokenOf(2) {
		t.Errorf("registered with %v", registered.token)
	}
}

func TestSessionOfAnotherCertificateIsOpenedAgain(t *testing.T) {
	client, peer := openedWith(t, Options{Credentials: ClientCertificate("ada")}, refreshable(1))
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), Unauthenticated, map[string]any{"certificate": true})
	request := peer.request("session.open")
	if request.param("scheme") != "tls" || request.param("user") != "ada" {
		t.Errorf("got %s", request.Params)
	}
	peer.respond(request, sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestLoginIsFetchedForEachSession(t *testing.T) {
	count := 0
	login := LoginWith(func(context.Context) (Login, error) {
		count++
		return Login{Scheme: "ticket", Fields: map[string]any{"number": count}}, nil
	})
	server := newFakeServer(t)
	client := server.client(Options{Credentials: login})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	request := peer.request("session.open")
	if request.param("scheme") != "ticket" || request.param("number") != int64(1) {
		t.Errorf("got %s", request.Params)
	}
	peer.respond(request, sessionResult(1, nil))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	request = peer.request("session.open")
	if request.param("number") != int64(2) {
		t.Errorf("got %s", request.Params)
	}
	peer.respond(request, sessionResult(2, nil))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}

func TestFailedLoginReachesTheCall(t *testing.T) {
	server := newFakeServer(t)
	broken := errors.New("the provider is down")
	client := server.client(Options{Credentials: LoginWith(func(context.Context) (Login, error) { return Login{}, broken })})
	err := client.open(context.Background())
	var login *LoginError
	if !errors.As(err, &login) || !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	server = newFakeServer(t)
	client = server.client(Options{Credentials: LoginWith(func(context.Context) (Login, error) { return Login{}, nil })})
	if err := client.open(context.Background()); !errors.As(err, &login) {
		t.Errorf("got %v", err)
	}
}

func TestCredentialsThatAreIncompleteAreRefused(t *testing.T) {
	for _, credentials := range []Credentials{APIKey("", "k"), APIKey("ada", ""), DeviceKey(nil, "d"), DeviceKey(testDevice(t), ""), LoginWith(nil)} {
		_, err := Dial(context.Background(), "localhost", Options{Credentials: credentials})
		var config *ConfigError
		if !errors.As(err, &config) {
			t.Errorf("%s: got %v", credentials, err)
		}
	}
}

// --- users ---------------------------------------------------------------------------------------------------------------------

func openUser(t *testing.T, client *Client, peer *fakeConnection, user string, number byte) *Session {
	t.Helper()
	type opened struct {
		session *Session
		err     error
	}
	done := make(chan opened, 1)
	go func() {
		session, err := client.SessionFor(context.Background(), APIKey(user, testKey))
		done <- opened{session, err}
	}()
	request := peer.request("session.open")
	if request.param("user") != user {
		t.Errorf("got %s", request.Params)
	}
	peer.respond(request, sessionResult(number, map[string]any{"user": user}))
	result := <-done
	if result.err != nil {
		t.Fatal(result.err)
	}
	return result.session
}

func TestUsersHaveTheirOwnSessionsAndEventsOnOneConnection(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	bob := openUser(t, client, peer, "bob", 2)
	call := begin(t, bob, "work", nil)
	request := peer.request("work")
	if request.token != tokenOf(2) {
		t.Error("the call has the token of another user")
	}
	peer.fail(request, TokenRevoked, nil)
	call.fails(TokenRevoked)
	own := begin(t, client.Session, "work", nil)
	peer.respond(peer.request("work"), "mine")
	own.succeeds("mine")

	carol := openUser(t, client, peer, "carol", 3)
	peer.sendWith(wire.Event, 0, []any{"note", nil}, tokenOf(3), 0)
	if event, err := carol.NextEvent(context.Background()); err != nil || event.Name != "note" {
		t.Errorf("got %v, %v", event, err)
	}
	closed := make(chan struct{})
	go func() {
		_ = carol.Close()
		close(closed)
	}()
	peer.respond(peer.request("session.close"), map[string]any{})
	<-closed
	peer.sendWith(wire.Event, 0, []any{"late", nil}, tokenOf(3), 0)
	peer.send(wire.Event, 0, []any{"for.all", nil})
	if event, err := client.NextEvent(context.Background()); err != nil || event.Name != "for.all" {
		t.Errorf("got %v, %v", event, err)
	}
}

func TestReconnectShowsEachSession(t *testing.T) {
	server := newFakeServer(t)
	connected := make(chan bool, 10)
	client, peer := server.opened(Options{OnConnected: func(client *Client, _ Endpoint) {
		_, isOpen := client.Info()
		connected <- isOpen
	}})
	if !<-connected {
		t.Error("OnConnected was called before the session was open")
	}
	openUser(t, client, peer, "bob", 2)
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = server.reconnected()
	tokens := map[wire.Token]bool{}
	for range 2 {
		request := peer.request("session.info")
		tokens[request.token] = true
		peer.respond(request, map[string]any{})
	}
	if !tokens[tokenOf(1)] || !tokens[tokenOf(2)] {
		t.Error("a session was not shown")
	}
	<-connected
}
