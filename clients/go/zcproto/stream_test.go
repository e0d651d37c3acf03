package zcproto

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

func (p *fakeConnection) item(request fakeRequest, value any) {
	p.sendWith(wire.Item, request.stream, value, request.token, 0)
}

func TestStreamYieldsItemsAndThenItsResult(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "words", map[string]any{"text": "to be"}, Window(2, 1_000))
	request := peer.requestOf(wire.Open, "words")
	if *request.Meta.Credit != (wire.Grant{Items: 2, Bytes: 1_000}) || request.Meta.HasDeadline {
		t.Errorf("got %+v", request.Meta)
	}
	peer.item(request, "to")
	peer.item(request, "be")
	var words []string
	for word, err := range Items[string](stream) {
		if err != nil {
			t.Fatal(err)
		}
		if words = append(words, word); len(words) == 2 {
			peer.respond(request, map[string]any{"words": 2})
		}
	}
	if len(words) != 2 || words[0] != "to" || words[1] != "be" {
		t.Errorf("got %v", words)
	}
	var result struct {
		Words int `msgpack:"words"`
	}
	if err := stream.Result(&result); err != nil || result.Words != 2 {
		t.Errorf("got %v, %v", result, err)
	}
	peer.next(wire.Credit)
}

func TestItemsComeBeforeTheErrorOfAStream(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "words", nil)
	request := peer.requestOf(wire.Open, "words")
	peer.together(func() {
		peer.item(request, "one")
		peer.fail(request, Internal, nil)
	})
	var word string
	if err := stream.Recv(&word); err != nil || word != "one" {
		t.Errorf("got %q, %v", word, err)
	}
	if err := stream.Recv(&word); !errors.Is(err, Internal) {
		t.Errorf("got %v", err)
	}
	if err := stream.Result(nil); !errors.Is(err, Internal) {
		t.Errorf("got %v", err)
	}
}

func TestLeavingALoopCancelsTheStream(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "words", nil)
	request := peer.requestOf(wire.Open, "words")
	peer.item(request, "one")
	for range Items[string](stream) {
		break
	}
	peer.next(wire.Cancel)
	if err := stream.Result(nil); !errors.Is(err, Cancelled) {
		t.Errorf("got %v", err)
	}
}

func TestItemsAreSentWithCreditAlone(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "upload", nil)
	request := peer.requestOf(wire.Open, "upload")
	sent := make(chan error, 1)
	go func() { sent <- stream.Send("one") }()
	peer.none()
	peer.sendWith(wire.Credit, request.stream, []any{1, 1_000}, request.token, 0)
	if frame := peer.next(wire.Item); frame.Token != tokenOf(1) {
		t.Error("the item has another token")
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	_ = stream.CloseSend()
	peer.next(wire.End)
	if err := stream.Send("two"); !errors.Is(err, FailedPrecondition) {
		t.Errorf("got %v", err)
	}
	go func() { peer.respond(request, 1) }()
	var count int
	if err := stream.Result(&count); err != nil || count != 1 {
		t.Errorf("got %d, %v", count, err)
	}
}

func TestSendEndsWithItsStream(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "upload", nil)
	request := peer.requestOf(wire.Open, "upload")
	sent := make(chan error, 1)
	go func() { sent <- stream.Send("one") }()
	peer.fail(request, PermissionDenied, nil)
	if err := <-sent; err != io.EOF {
		t.Errorf("got %v", err)
	}
	if err := stream.Result(nil); !errors.Is(err, PermissionDenied) {
		t.Errorf("got %v", err)
	}
}

func TestItemTimeoutEndsTheStream(t *testing.T) {
	client, peer := newFakeServer(t).opened(Options{})
	stream := client.Stream(context.Background(), "words", nil, ItemTimeout(time.Minute))
	peer.requestOf(wire.Open, "words")
	received := make(chan error, 1)
	go func() { received <- stream.Recv(nil) }()
	peer.server.clock.awaitTimer(t, time.Minute)
	peer.server.clock.advance(time.Minute)
	if err := <-received; !errors.Is(err, DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	peer.next(wire.Cancel)
}

func TestInterruptedStreamIsOpenedAgainOnlyWithReopen(t *testing.T) {
	server := newFakeServer(t)
	client, peer := server.opened(Options{})
	plain := client.Stream(context.Background(), "log", nil)
	request := peer.requestOf(wire.Open, "log")
	peer.item(request, 1)
	again := client.Stream(context.Background(), "log", map[string]any{"name": "x", "after": 0}, Reopen(func(last Raw) map[string]any {
		return map[string]any{"after": last}
	}))
	request = peer.requestOf(wire.Open, "log")
	peer.item(request, 7)
	var number int
	if err := again.Recv(&number); err != nil || number != 7 {
		t.Fatalf("got %d, %v", number, err)
	}
	peer.finish(newTLSError(TLSTruncated, nil))
	if err := plain.Result(nil); !isClosed(err) {
		t.Errorf("got %v", err)
	}
	peer = server.reconnected()
	peer.respond(peer.request("session.info"), map[string]any{})
	request = peer.soon(wire.Open, "log")
	if request.param("after") != int64(7) || request.param("name") != "x" {
		t.Errorf("got %s", request.Params)
	}
	peer.item(request, 8)
	if err := again.Recv(&number); err != nil || number != 8 {
		t.Errorf("got %d, %v", number, err)
	}
	_ = again.Close()
}
