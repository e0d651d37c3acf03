package zcproto

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// crowded returns a client of a server that allows one request on each connection.
func crowded(t *testing.T, most int) (*fakeServer, *Client, *fakeConnection) {
	server := newFakeServer(t)
	server.welcome["max_streams"] = 1
	client, peer := server.opened(Options{MaxConnections: most})
	return server, client, peer
}

func TestExtraConnectionTakesTheCallsThatTheServerAllowsNoMoreOf(t *testing.T) {
	server, client, peer := crowded(t, 2)
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	second := begin(t, client.Session, "second", nil)
	other := <-server.extra
	shown := other.request("session.info")
	if shown.token != tokenOf(1) {
		t.Error("the session was not shown")
	}
	other.respond(shown, map[string]any{})
	two := other.request("second")
	third := begin(t, client.Session, "third", nil)
	other.none()
	other.respond(two, 2)
	second.succeeds(int64(2))
	other.respond(other.request("third"), 3) // whichever has room first
	third.succeeds(int64(3))
	peer.respond(one, 1)
	first.succeeds(int64(1))
	fourth := begin(t, client.Session, "fourth", nil)
	peer.respond(peer.request("fourth"), 4)
	fourth.succeeds(int64(4))
	if len(server.extra) > 0 {
		t.Error("there are more connections than allowed")
	}
}

func TestExtraConnectionIsOffByDefault(t *testing.T) {
	server, client, peer := crowded(t, 0)
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	second := begin(t, client.Session, "second", nil)
	peer.respond(one, 1)
	first.succeeds(int64(1))
	peer.respond(peer.request("second"), 2)
	second.succeeds(int64(2))
	if dials := server.dialed(); dials != 1 {
		t.Errorf("it has connected %d times", dials)
	}
}

func TestFailureOfAnExtraConnectionFailsNoCall(t *testing.T) {
	server, client, peer := crowded(t, 2)
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	server.failNext(&ConnectError{Reason: "too many connections"})
	second := begin(t, client.Session, "second", nil)
	eventually(t, func() bool {
		client.shared.mu.Lock()
		defer client.shared.mu.Unlock()
		return client.shared.connections.extra.notBefore == server.clock.now()+50*time.Millisecond
	})
	peer.respond(one, 1)
	first.succeeds(int64(1))
	peer.respond(peer.request("second"), 2)
	second.succeeds(int64(2))
}

// withExtra returns a client with a extra connection, on which a call is in flight.
func withExtra(t *testing.T) (server *fakeServer, client *Client, peer, other *fakeConnection, call *call) {
	server, client, peer = crowded(t, 2)
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	call = begin(t, client.Session, "second", nil)
	other = <-server.extra
	other.respond(other.request("session.info"), map[string]any{})
	other.next(wire.Request)
	peer.respond(one, 1)
	first.succeeds(int64(1))
	return server, client, peer, other, call
}

func TestExtraConnectionIsClosedWhenItIsIdle(t *testing.T) {
	server, client, _, other, call := withExtra(t)
	server.clock.awaitTimer(t, extraIdle)
	call.cancel()
	call.fails(Cancelled)
	server.clock.advance(extraIdle)
	<-other.connection.ended
	if !other.isShut {
		t.Error("no close_notify was sent")
	}
	if _, found := client.Endpoint(); !found {
		t.Error("the other connection was closed too")
	}
}

func TestLossOfAnExtraConnectionLosesItsCallsAlone(t *testing.T) {
	server, client, peer, other, call := withExtra(t)
	other.finish(newTLSError(TLSTruncated, nil))
	call.isClosed(false)
	third := begin(t, client.Session, "third", nil)
	peer.respond(peer.request("third"), 3)
	third.succeeds(int64(3))
	if dials := server.dialed(); dials != 2 {
		t.Errorf("it has connected %d times", dials)
	}
}

func TestGoAwayOnAnExtraConnectionLetsItsCallsFinish(t *testing.T) {
	server, client, _, other, call := withExtra(t)
	other.goAway("draining", time.Second)
	other.finish(io.EOF)
	server.clock.awaitTimer(t, 50*time.Millisecond) // the call was certainly not run
	call.cancel()
	call.wait()
	if _, found := client.Endpoint(); !found {
		t.Error("the other connection was given up")
	}
}

// beside returns a client with a session that can be refreshed, and its extra connection, where a call waits for room.
func beside(t *testing.T, prepare func(*Client, *fakeConnection)) (client *Client, peer, other *fakeConnection) {
	server := newFakeServer(t)
	server.welcome["max_streams"] = 1
	client, peer = server.openedWith(Options{MaxConnections: 2}, refreshable(1))
	prepare(client, peer)
	begin(t, client.Session, "first", nil)
	one := peer.request("first")
	begin(t, client.Session, "second", nil)
	other = <-server.extra
	peer.respond(one, 1)
	return client, peer, other
}

func TestRefreshedTokenIsShownOnEachConnectionAlsoOneThatDrainsOrIsFull(t *testing.T) {
	for _, drains := range []bool{false, true} {
		client, peer, other := beside(t, func(*Client, *fakeConnection) {})
		second := peer.request("second")
		third := begin(t, client.Session, "third", nil)
		other.respond(other.request("session.info"), map[string]any{})
		onOther := other.request("third")
		peer.respond(second, 2)
		if drains {
			other.goAway("draining", 0)
		}
		peer.sendWith(wire.Event, 0, []any{"session.expiring", nil}, tokenOf(1), 0)
		peer.respond(peer.request("session.refresh"), refreshable(2))
		if shown := other.request("session.info"); shown.token != tokenOf(2) {
			t.Errorf("the token %v was shown", shown.token)
		}
		other.respond(onOther, 3)
		third.succeeds(int64(3))
	}
}

func TestSessionIsRefreshedWhereThereIsRoom(t *testing.T) {
	client, peer, other := beside(t, func(*Client, *fakeConnection) {})
	second := peer.request("second")
	other.respond(other.request("session.info"), map[string]any{})
	peer.sendWith(wire.Event, 0, []any{"session.expiring", nil}, tokenOf(1), 0)
	other.respond(other.request("session.refresh"), refreshable(2))
	if shown := peer.request("session.info"); shown.token != tokenOf(2) {
		t.Errorf("the token %v was shown", shown.token)
	}
	peer.respond(second, 2)
	if info, _ := client.Info(); info.ID == "" {
		t.Error("there is no session")
	}
}

func TestHandlersAreRegisteredOnAnExtraConnectionBeforeItIsUsed(t *testing.T) {
	client, peer, other := beside(t, func(client *Client, peer *fakeConnection) {
		handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return true, nil })
	})
	peer.request("second")
	registered := other.request("session.handle")
	begin(t, client.Session, "third", nil)
	other.none()
	other.respond(registered, map[string]any{})
	other.request("third")
	other.call(1, "ask", tokenOf(1))
	other.next(wire.Result)
}

func TestHandlerAddedLaterIsRegisteredOnEachConnection(t *testing.T) {
	client, peer, other := beside(t, func(*Client, *fakeConnection) {})
	peer.respond(peer.request("second"), 2)
	other.respond(other.request("session.info"), map[string]any{})
	handle(t, client.Session, peer, "ask", func(context.Context, *ServerCall) (any, error) { return true, nil })
	if names := other.request("session.handle").param("methods"); len(names.([]any)) != 1 {
		t.Errorf("got %v", names)
	}
}

func TestExtraConnectionThatHangsIsLostOnceTheMainOneAnswers(t *testing.T) {
	server := newFakeServer(t)
	server.welcome["max_streams"] = 1
	client, peer := server.openedAt(both, Options{MaxConnections: 2, AddressOrder: ListedOrder}, sessionResult(1, nil))
	first := begin(t, client.Session, "first", nil)
	one := peer.request("first")
	second := begin(t, client.Session, "second", nil)
	other := <-server.extra
	other.respond(other.request("session.info"), map[string]any{})
	other.request("second")
	peer.respond(one, 1)
	first.succeeds(int64(1))
	server.clock.advance(silenceOfTests)
	other.next(wire.Ping)
	server.clock.advance(2 * time.Second)
	peer.next(wire.Ping) // the server may hang
	peer.send(wire.Pong, 0, nil)
	eventually(t, func() bool {
		client.shared.mu.Lock()
		defer client.shared.mu.Unlock()
		return peer.connection.conv.HasAnsweredSince(other.connection.conv)
	})
	server.clock.advance(2 * time.Second)
	second.isClosed(false)
	if endpoint, _ := client.Endpoint(); endpoint.IP.String() != serverA || server.dialed() != 2 {
		t.Error("it has left a server that answers")
	}
}

func TestEventsOfTheSessionComeFromOneConnection(t *testing.T) {
	_, client, peer, other, _ := withExtra(t)
	for _, connection := range []*fakeConnection{other, peer} {
		connection.sendWith(wire.Event, 0, []any{"session.expiring", map[string]any{"expires_at": 1}}, tokenOf(1), 0)
		connection.send(wire.Event, 0, []any{"pins.next", nil})
		connection.sendWith(wire.Event, 0, []any{"of.the.application", nil}, tokenOf(1), 0)
	}
	got := map[string]int{}
	for range 4 {
		event, err := client.NextEvent(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		got[event.Name]++
	}
	if got["session.expiring"] != 1 || got["pins.next"] != 1 || got["of.the.application"] != 2 {
		t.Errorf("got %v", got)
	}
}

func TestMaxConnectionsIsLimited(t *testing.T) {
	for _, most := range []int{-1, maxConnections + 1} {
		var config *ConfigError
		if _, err := Dial(context.Background(), "localhost", Options{MaxConnections: most}); !errors.As(err, &config) {
			t.Errorf("%d: got %v", most, err)
		}
	}
}
