package zcproto

import (
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// hung returns a client of two servers, with two calls in flight on the first, which has not answered the PING after 5 s.
func hung(t *testing.T) (server *fakeServer, client *Client, first *fakeConnection, repeated, other *call) {
	server = newFakeServer(t)
	client, first = server.openedAt(both, Options{AddressOrder: ListedOrder}, sessionResult(1, nil))
	server.clock.advance(time.Minute) // of silence without requests, which does not matter
	first.none()
	repeated = begin(t, client.Session, "repeated", nil, IdempotencyKey("key"))
	first.request("repeated")
	other = begin(t, client.Session, "other", nil)
	first.request("other")
	server.clock.advance(silenceOfTests - time.Millisecond)
	first.none()
	server.clock.advance(time.Millisecond)
	first.next(wire.Ping)
	server.clock.advance(2*time.Second - time.Millisecond)
	if server.dialed() != 1 {
		t.Error("it has connected too early")
	}
	return server, client, first, repeated, other
}

const silenceOfTests = 5 * time.Second

func TestClientMovesFromAServerThatHangs(t *testing.T) {
	server, client, first, repeated, other := hung(t)
	server.clock.advance(time.Millisecond)
	second := (<-server.extra).isAt(serverB)
	shown := second.request("session.info")
	if shown.token != tokenOf(1) {
		t.Error("the session was not shown")
	}
	if endpoint, _ := client.Endpoint(); endpoint.IP.String() != serverA {
		t.Error("it has moved before the session was accepted")
	}
	second.respond(shown, map[string]any{})
	other.isClosed(false)
	second = server.accept().isAt(serverB)
	second.respond(second.request("session.info"), map[string]any{})
	second.respond(second.soon(wire.Request, "repeated"), "done")
	repeated.succeeds("done")
	<-first.connection.ended
	if !first.isReset {
		t.Error("the old connection is open")
	}
}

func TestClientStaysIfTheServerAnswersAgain(t *testing.T) {
	server, client, first, repeated, _ := hung(t)
	server.clock.advance(time.Millisecond)
	second := <-server.extra
	shown := second.request("session.info")
	first.send(wire.Pong, 0, nil)
	eventually(t, func() bool {
		client.shared.mu.Lock()
		defer client.shared.mu.Unlock()
		return !first.connection.conv.IsSilent()
	})
	second.respond(shown, map[string]any{})
	<-second.connection.ended
	if endpoint, _ := client.Endpoint(); endpoint.IP.String() != serverA {
		t.Error("it has moved")
	}
	server.clock.advance(silenceOfTests) // it looks again
	first.next(wire.Ping)
	repeated.cancel()
	repeated.fails(Cancelled)
}

func TestClientStaysIfTheOtherServerRefusesTheSession(t *testing.T) {
	server, _, first, repeated, _ := hung(t)
	server.clock.advance(time.Millisecond)
	second := <-server.extra
	second.fail(second.request("session.info"), Unavailable, nil)
	<-second.connection.ended
	second = advanceUntil(server, server.extra) // after a delay
	second.respond(second.request("session.info"), map[string]any{})
	second = server.accept().isAt(serverB)
	second.respond(second.request("session.info"), map[string]any{})
	second.respond(second.soon(wire.Request, "repeated"), "done")
	repeated.succeeds("done")
	<-first.connection.ended
}

func TestCallThatTimesOutSendsPing(t *testing.T) {
	server := newFakeServer(t)
	client, first := server.openedAt(both, Options{AddressOrder: ListedOrder, Timeout: 3 * time.Second}, sessionResult(1, nil))
	late := begin(t, client.Session, "late", nil)
	first.request("late")
	server.clock.awaitTimer(t, 3*time.Second)
	server.clock.advance(3 * time.Second)
	late.fails(DeadlineExceeded)
	first.next(wire.Ping)
	first.next(wire.Cancel)
	server.clock.advance(2 * time.Second)
	(<-server.extra).isAt(serverB)
}

func TestServerWithoutAnotherIsNotAskedWhetherItHangs(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{Timeout: time.Hour})
	begin(t, client.Session, "slow", nil)
	peer.request("slow")
	server.clock.advance(time.Minute)
	peer.none()
	if server.dialed() != 1 {
		t.Error("it has connected again")
	}
}
