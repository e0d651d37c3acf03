package zcproto

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Endpoints of the tests: two servers, given by their IP addresses.
const (
	serverA = "192.0.2.1"
	serverB = "192.0.2.2"
	both    = serverA + "," + serverB
)

func (p *fakeConnection) isAt(ip string) *fakeConnection {
	p.t.Helper()
	if at := p.connection.endpoint.IP.String(); at != ip {
		p.t.Fatalf("it has connected to %s instead of %s", at, ip)
	}
	return p
}

// tries checks which IP addresses are tried next.
func (s *fakeServer) tries(ips ...string) {
	s.t.Helper()
	for _, ip := range ips {
		select {
		case tried := <-s.tried:
			if tried != ip {
				s.t.Errorf("%s was tried instead of %s", tried, ip)
			}
		case <-time.After(patience):
			s.t.Fatalf("%s was not tried", ip)
		}
	}
}

// triesNothing checks that no further IP address was tried.
func (s *fakeServer) triesNothing() {
	s.t.Helper()
	select {
	case tried := <-s.tried:
		s.t.Errorf("%s was tried", tried)
	default:
	}
}

// connecting opens a client that is listed, and returns its error.
func connecting(s *fakeServer, text string) (*Client, <-chan error) {
	client := s.clientOf(text, Options{AddressOrder: ListedOrder})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	return client, done
}

func TestAddressesAreSeparatedByCommas(t *testing.T) {
	addresses, err := parseAddresses("a, B:1,[::1]:2,a:7443,192.0.2.1")
	if text := joinAddresses(addresses); err != nil || text != "a:7443,b:1,[::1]:2,192.0.2.1:7443" {
		t.Errorf("got %s, %v", text, err)
	}
	var many []string
	for number := range maxAddresses + 1 {
		many = append(many, netip.AddrFrom4([4]byte{192, 0, 2, byte(number)}).String())
	}
	for _, text := range []string{"", ",", "a,", "a,,b", "a,b c", strings.Join(many, ",")} {
		var config *ConfigError
		if _, err := parseAddresses(text); !errors.As(err, &config) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	if _, err := parseAddresses(strings.Join(many[1:], ",")); err != nil {
		t.Error(err)
	}
}

func TestEndpointsOfANameAlternateFamilies(t *testing.T) {
	var ips []netip.Addr
	for _, text := range []string{"2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2", "2001:db8::3"} {
		ips = append(ips, netip.MustParseAddr(text))
	}
	e := newEndpoints(nil, ListedOrder, func() float64 { return 0 })
	var sorted []string
	for _, endpoint := range e.sorted(address{"a", 1}, ips) {
		sorted = append(sorted, endpoint.IP.String())
	}
	if got := strings.Join(sorted, " "); got != "2001:db8::1 192.0.2.1 2001:db8::2 192.0.2.2 2001:db8::3" {
		t.Errorf("got %s", got)
	}
	if text := (Endpoint{"a", 1, ips[0]}).String(); text != "a:1 (2001:db8::1)" {
		t.Errorf("got %s", text)
	}
	if text := (Endpoint{"192.0.2.1", 1, ips[2]}).String(); text != "192.0.2.1:1" {
		t.Errorf("got %s", text)
	}
}

func TestRandomOrderSpreadsClients(t *testing.T) {
	addresses, _ := parseAddresses("a,b,c")
	seen := map[string]int{}
	e := newEndpoints(addresses, RandomOrder, systemRandom)
	for range 1_000 {
		seen[joinAddresses(e.nextOrder())]++
	}
	if len(seen) != 6 {
		t.Errorf("got %v", seen)
	}
}

func TestRefusedEndpointIsFollowedByTheNextOneAtOnce(t *testing.T) {
	server := newFakeServer(t)
	server.set(serverA, refused)
	client, done := connecting(server, both)
	server.accept().isAt(serverB)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if endpoint, found := client.Endpoint(); !found || endpoint.Host != serverB || client.Address() != "192.0.2.1:7443,192.0.2.2:7443" {
		t.Errorf("got %v of %s", endpoint, client.Address())
	}
}

func TestSilentEndpointIsFollowedByTheNextOneSoon(t *testing.T) {
	for fault, delay := range map[endpointFault]time.Duration{silent: attemptDelay, frozen: handshakeDelay} {
		server := newFakeServer(t)
		server.set(serverA, fault)
		_, done := connecting(server, both)
		server.tries(serverA)
		server.clock.awaitTimer(t, delay)
		server.triesNothing()
		server.clock.advance(delay)
		peer := server.accept().isAt(serverB)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		server.set(serverA, 0)
		peer.finish(newTLSError(TLSTruncated, nil))
		server.accept().isAt(serverA) // it has not failed: it does not rest
	}
}

func TestLossConnectsToAnotherEndpointAtOnce(t *testing.T) {
	server := newFakeServer(t)
	endpoints := make(chan Endpoint, 10)
	client, peer := server.openedAt(both, Options{AddressOrder: ListedOrder, OnConnected: func(_ *Client, at Endpoint) { endpoints <- at }}, sessionResult(1, nil))
	peer.isAt(serverA)
	lost := begin(t, client.Session, "lost", nil)
	peer.request("lost")
	safe := begin(t, client.Session, "safe", nil, IdempotencyKey("order-7"))
	peer.request("safe")
	peer.finish(newTLSError(TLSTruncated, nil))
	lost.isClosed(false)
	peer = server.accept().isAt(serverB)
	peer.respond(peer.request("session.info"), map[string]any{})
	peer.respond(peer.soon(wire.Request, "safe"), "done")
	safe.succeeds("done")
	for _, ip := range []string{serverA, serverB} {
		if at := <-endpoints; at.IP.String() != ip {
			t.Errorf("got %s instead of %s", at, ip)
		}
	}
	peer.none()
}

func TestServerThatGoesAwayIsLeftForAsLongAsItAsks(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.openedAt(both, Options{AddressOrder: ListedOrder}, sessionResult(1, nil))
	call := begin(t, client.Session, "work", nil)
	request := peer.request("work")
	peer.goAway("draining", 10*time.Second)
	next := server.accept().isAt(serverB)
	next.respond(next.request("session.info"), map[string]any{})
	peer.respond(request, "done")
	call.succeeds("done")
	other := begin(t, client.Session, "more", nil)
	next.respond(next.request("more"), 1)
	other.succeeds(int64(1))
	for range 2 {
		next.finish(newTLSError(TLSTruncated, nil))
		next = server.reconnected().isAt(serverB)
	}
	server.clock.advance(10 * time.Second)
	next.finish(newTLSError(TLSTruncated, nil))
	server.accept().isAt(serverA)
}

func TestCallRefusedByADrainingServerIsSentToAnotherOneSoon(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.openedAt(both, Options{AddressOrder: ListedOrder}, sessionResult(1, nil))
	call := begin(t, client.Session, "work", nil)
	request := peer.request("work")
	peer.goAway("draining", time.Minute)
	peer.fail(request, Unavailable, map[string]any{"retry_after_ms": 60_000})
	next := server.accept().isAt(serverB)
	next.respond(next.request("session.info"), map[string]any{})
	next.respond(next.soon(wire.Request, "work"), "done")
	call.succeeds("done")
}

func TestIdleConnectionIsMadeAgainToTheSameEndpoint(t *testing.T) {
	server := newFakeServer(t)
	server.set(serverA, refused)
	client, peer := server.openedAt(both, Options{AddressOrder: ListedOrder}, sessionResult(1, nil))
	server.set(serverA, 0)
	peer.isAt(serverB).goAway("idle", 0)
	peer.finish(io.EOF)
	<-peer.connection.ended
	begin(t, client.Session, "work", nil)
	server.accept().isAt(serverB)
}

func TestEachEndpointHasItsOwnDelays(t *testing.T) {
	server := newFakeServer(t)
	_, peer := server.openedAt(both, Options{AddressOrder: ListedOrder}, sessionResult(1, nil))
	server.set(serverA, refused)
	server.set(serverB, refused)
	server.tries(serverA)
	peer.finish(newTLSError(TLSTruncated, nil))
	server.tries(serverB) // the other one rests
	delay := 50 * time.Millisecond
	for range 12 {
		server.clock.awaitTimer(t, delay)
		server.triesNothing()
		server.clock.advance(delay)
		server.tries(serverA, serverB)
		delay = min(delay*2, 15*time.Second)
	}
	server.clock.awaitTimer(t, delay)
	server.set(serverB, 0)
	server.clock.advance(delay)
	peer = server.accept().isAt(serverB)
	peer.finish(newTLSError(TLSTruncated, nil)) // it has not lasted, and the other one rests too
	server.clock.awaitTimer(t, 15*time.Second)
}

func TestPermanentFailureOfAllEndpointsIsReported(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.openedAt(both, Options{AddressOrder: ListedOrder, Timeout: NoTimeout}, sessionResult(1, nil))
	server.set(serverA, untrusted)
	server.set(serverB, refused)
	peer.finish(newTLSError(TLSTruncated, nil))
	<-peer.connection.ended
	call := begin(t, client.Session, "work", nil)
	server.clock.awaitTimer(t, 50*time.Millisecond)
	server.set(serverB, untrusted)
	advanceUntil(server, call.done)
	var failure *TLSError
	if !errors.As(call.err, &failure) || failure.Failure != TLSPinMismatch ||
		!strings.Contains(failure.Detail, "none of 2 addresses can be reached") {
		t.Errorf("got %v", call.err)
	}
	server.set(serverB, 0)
	begin(t, client.Session, "work", nil) // tries again at once
	server.accept().isAt(serverB)
}

func TestErrorOfThisEndIsReportedWhateverOtherEndpointsDo(t *testing.T) {
	server := newFakeServer(t)
	server.failNext(&CertificateError{Message: "unusable"})
	_, done := connecting(server, both)
	var certificate *CertificateError
	if err := <-done; !errors.As(err, &certificate) {
		t.Errorf("got %v", err)
	}
}

func TestSlowNameDelaysOthersOnlyForAMoment(t *testing.T) {
	server := newFakeServer(t)
	gate := make(chan struct{})
	server.gates["slow"], server.ips["slow"], server.ips["fast"] = gate, []string{serverA}, []string{serverB}
	server.set(serverB, silent)
	_, done := connecting(server, "slow,fast")
	server.clock.awaitTimer(t, resolutionDelay)
	server.triesNothing()
	server.clock.advance(resolutionDelay)
	server.tries(serverB)
	close(gate) // it joins the round
	server.clock.awaitTimer(t, attemptDelay)
	server.clock.advance(attemptDelay)
	server.accept().isAt(serverA)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestNameWithoutAddressesIsSkipped(t *testing.T) {
	server := newFakeServer(t)
	server.ips["gone"] = []string{}
	_, done := connecting(server, "gone,"+serverB)
	server.accept().isAt(serverB)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	_, done = connecting(server, "gone")
	var connect *ConnectError
	if err := <-done; !errors.As(err, &connect) || strings.Contains(err.Error(), "none of") {
		t.Errorf("got %v", err)
	}
}

func TestNamesAreResolvedAgainInEachRound(t *testing.T) {
	server := newFakeServer(t)
	server.ips["name"] = []string{serverA}
	_, peer := server.openedAt("name", Options{}, sessionResult(1, nil))
	server.mu.Lock()
	server.ips["name"] = []string{serverB}
	server.mu.Unlock()
	peer.finish(newTLSError(TLSTruncated, nil))
	server.reconnected().isAt(serverB)
}

func TestLostRefreshIsSentToAnotherServerWithTheSameToken(t *testing.T) {
	server := newFakeServer(t)
	client := server.clientOf(both, Options{AddressOrder: ListedOrder, Credentials: APIKey("ada", testKey)})
	done := make(chan error, 1)
	go func() { done <- client.open(context.Background()) }()
	peer := server.accept()
	peer.respond(peer.request("session.open"), refreshable(1))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	call := begin(t, client.Session, "work", nil)
	peer.fail(peer.request("work"), TokenExpired, nil)
	first := peer.request("session.refresh")
	peer.finish(newTLSError(TLSTruncated, nil))
	peer = server.accept().isAt(serverB)
	again := peer.request("session.refresh")
	if string(again.param("refresh_token").([]byte)) != string(first.param("refresh_token").([]byte)) {
		t.Error("another refresh token was sent")
	}
	peer.respond(again, refreshable(2))
	peer.respond(peer.request("work"), "done")
	call.succeeds("done")
}
