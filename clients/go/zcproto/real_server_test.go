package zcproto_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/zcproto"
)

var ctx = context.Background()

const app = `
import asyncio
from collections.abc import AsyncIterator

import zcproto
from zcproto import BUILT_IN_SCHEMES, App, CallableAuthenticator, Context, Items

used = set()


async def redeem(user: str, ticket: int) -> str | None:
    if (user, ticket) in used:
        return None
    used.add((user, ticket))
    return user


app = App(authenticators=[BUILT_IN_SCHEMES, CallableAuthenticator("ticket", redeem)])


@app.method("echo")
async def echo(value: object = None) -> object:
    return value


@app.method("sleep")
async def sleep(ms: int) -> dict:
    await asyncio.sleep(ms / 1000)
    return {}


@app.method("count")
async def count(context: Context, n: int) -> AsyncIterator[int]:
    for number in range(n):
        yield number
    context.result = {"sent": n}


@app.method("total")
async def total(numbers: Items[int]) -> int:
    result = 0
    async for number in numbers:
        result += number
    return result


@app.method("ask")
async def ask(context: Context, method: str) -> object:
    return await context.client.call(method, {"user": context.user}, timeout=30.0)
`

// newAppServer starts a server with the application, and a user ada.
func newAppServer(t *testing.T) (s *server, key string) {
	s = newServer(t, "[sessions]\nper_user = 1000\n")
	s.write("everything.py", app)
	key = s.addUser("ada")
	return s.start("everything:app"), key
}

func TestWithARealServer(t *testing.T) {
	s, key := newAppServer(t)
	for name, test := range map[string]func(*testing.T, *server, string){
		"values":     testValues,
		"concurrent": testConcurrentCalls,
		"large":      testLargeFirstCall,
		"errors":     testErrors,
		"wrong key":  testWrongKey,
		"revoked":    testRevokedSession,
		"device":     testDeviceIsAttachedAfterACut,
		"login":      testLogin,
		"cut":        testCutRetriesIdempotentCalls,
		"truncated":  testTruncatingProxy,
		"pins":       testPins,
		"streams":    testStreams,
		"calls":      testCallsOfTheServer,
		"users":      testUsers,
		"cuts":       testManyCuts,
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			test(t, s, key)
		})
	}
	if log := s.text(); strings.Contains(log, key) {
		t.Error("the log of the server has a key")
	}
}

func testValues(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	value := map[string]any{
		"text": "漢字 😀", "bytes": []byte{0, 255}, "nothing": nil, "float": 1.5, "yes": true,
		"numbers": []any{int64(0), int64(-1), int64(-1 << 63), uint64(1<<64 - 1)},
	}
	var result any
	if err := client.Call(ctx, "echo", map[string]any{"value": value}, &result); err != nil || !reflect.DeepEqual(result, value) {
		t.Errorf("got %v, %v", result, err)
	}
	if welcome, found := client.Welcome(); !found || welcome.MaxFrame != 1<<20 || !welcome.HasStreams || !welcome.HasCalls {
		t.Errorf("got %+v", welcome)
	}
}

func testConcurrentCalls(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	var calls sync.WaitGroup
	for number := range 1_000 { // more than the server has streams
		calls.Add(1)
		go func() {
			defer calls.Done()
			var result int
			if err := client.Call(ctx, "echo", map[string]any{"value": number}, &result); err != nil || result != number {
				t.Errorf("%d: got %d, %v", number, result, err)
			}
		}()
	}
	calls.Wait()
}

func testLargeFirstCall(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	client.Cut() // the next connection has no session yet
	text := strings.Repeat("x", 500_000)
	var result string
	err := client.Call(ctx, "echo", map[string]any{"value": text}, &result, zcproto.IdempotencyKey("large"))
	if err != nil || result != text {
		t.Errorf("got %d bytes, %v", len(result), err)
	}
}

func testErrors(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	cancelled, stop := context.WithCancel(ctx)
	time.AfterFunc(20*time.Millisecond, stop)
	for want, err := range map[error]error{
		zcproto.Unimplemented:    client.Call(ctx, "no.such.method", nil, nil),
		zcproto.InvalidArgument:  client.Call(ctx, "sleep", map[string]any{"minutes": 1}, nil),
		zcproto.DeadlineExceeded: client.Call(short, "sleep", map[string]any{"ms": 60_000}, nil),
		context.Canceled:         client.Call(cancelled, "sleep", map[string]any{"ms": 60_000}, nil),
	} {
		if !errors.Is(err, want) {
			t.Errorf("got %v instead of %v", err, want)
		}
	}
	if err := client.Call(ctx, "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

func testWrongKey(t *testing.T, s *server, _ string) {
	options := s.options()
	options.Credentials = zcproto.APIKey("ada", "wrong")
	if _, err := zcproto.Dial(ctx, s.address(), options); !errors.Is(err, zcproto.Unauthenticated) {
		t.Errorf("got %v", err)
	}
	options.Credentials = nil
	client := s.dial(options)
	if err := client.Call(ctx, "echo", nil, nil); !errors.Is(err, zcproto.Unauthenticated) {
		t.Errorf("got %v", err)
	}
	var info struct {
		Versions []int `msgpack:"versions"`
	}
	if err := client.Call(ctx, "server.info", nil, &info); err != nil || len(info.Versions) != 1 {
		t.Errorf("got %v, %v", info, err)
	}
}

func testRevokedSession(t *testing.T, s *server, key string) {
	first, second := s.dialAs("ada", key), s.dialAs("ada", key)
	info, _ := first.Info()
	if err := second.Call(ctx, "session.revoke", map[string]any{"id": info.ID}, nil); err != nil {
		t.Fatal(err)
	}
	if event, err := first.NextEvent(ctx); err != nil || event.Name != "session.revoked" {
		t.Errorf("got %v, %v", event, err)
	}
	if err := first.Call(ctx, "echo", nil, nil); !errors.Is(err, zcproto.TokenRevoked) {
		t.Errorf("got %v", err)
	}
	if again, err := first.Open(ctx); err != nil || again.ID == info.ID {
		t.Errorf("got %v, %v", again, err)
	}
	if err := first.Call(ctx, "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

func testDeviceIsAttachedAfterACut(t *testing.T, s *server, _ string) {
	path := filepath.Join(t.TempDir(), "laptop.key")
	device := must(zcproto.CreateDevice(path))
	code := s.run("pair", "--user", "ada")
	if user, err := zcproto.Enroll(ctx, s.address(), code, device, "laptop", s.options()); err != nil || user != "ada" {
		t.Fatalf("got %q, %v", user, err)
	}
	if _, err := zcproto.Enroll(ctx, s.address(), code, device, "laptop", s.options()); !errors.Is(err, zcproto.Unauthenticated) {
		t.Errorf("got %v", err)
	}
	options := s.options()
	options.Credentials = zcproto.DeviceKey(must(zcproto.LoadDevice(path)), "laptop")
	client := s.dial(options)
	before, _ := client.Info()
	client.Cut()
	if err := client.Call(ctx, "echo", nil, nil, zcproto.IdempotencyKey("after the cut")); err != nil {
		t.Fatal(err)
	}
	if after, _ := client.Info(); !before.Bound || after.ID != before.ID {
		t.Errorf("got %v after %v", after, before)
	}
}

func testLogin(t *testing.T, s *server, _ string) {
	ticket := 0
	options := s.options()
	options.Credentials = zcproto.LoginWith(func(context.Context) (zcproto.Login, error) {
		ticket++
		return zcproto.Login{Scheme: "ticket", Fields: map[string]any{"user": "eve", "ticket": ticket}}, nil
	})
	client := s.dial(options)
	if info, _ := client.Info(); info.User != "eve" {
		t.Errorf("got %v", info)
	}
}

func testCutRetriesIdempotentCalls(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	before, _ := client.Info()
	lost, retried := make(chan error, 1), make(chan error, 1)
	go func() { lost <- client.Call(ctx, "sleep", map[string]any{"ms": 300}, nil) }()
	go func() {
		retried <- client.Call(ctx, "sleep", map[string]any{"ms": 300}, nil, zcproto.IdempotencyKey("retried"))
	}()
	if err := client.Call(ctx, "sleep", map[string]any{"ms": 50}, nil); err != nil {
		t.Fatal(err)
	}
	client.Cut()
	var closed *zcproto.ClosedError
	if err := <-lost; !errors.As(err, &closed) || closed.Clean {
		t.Errorf("got %v", err)
	}
	if err := <-retried; err != nil {
		t.Error(err)
	}
	if after, _ := client.Info(); after.ID != before.ID {
		t.Error("the session has changed")
	}
}

func testTruncatingProxy(t *testing.T, s *server, key string) {
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	defer listener.Close()
	near := make(chan *net.TCPConn, 10)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", "127.0.0.1:"+s.port)
			if err != nil {
				return
			}
			near <- conn.(*net.TCPConn)
			go func() { _, _ = io.Copy(conn, far) }()
			go func() { _, _ = io.Copy(far, conn) }()
		}
	}()
	options := s.options()
	options.Credentials = zcproto.APIKey("ada", key)
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	client, err := zcproto.Dial(ctx, "localhost:"+port, options)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	done := make(chan error, 1)
	go func() { done <- client.Call(ctx, "sleep", map[string]any{"ms": 60_000}, nil) }()
	if err := client.Call(ctx, "echo", nil, nil); err != nil {
		t.Fatal(err)
	}
	_ = (<-near).CloseWrite()
	var failure *zcproto.TLSError
	if err := <-done; !errors.As(err, &failure) || failure.Failure != zcproto.TLSTruncated {
		t.Errorf("got %v", err)
	}
}

func testPins(t *testing.T, s *server, _ string) {
	pins := strings.Fields(s.run("cert", "pins", "--plain"))
	backup := "sha256/" + strings.Repeat("A", 43) + "="
	for _, test := range []struct {
		pins     []string
		name, ca string
		want     zcproto.TLSFailure
	}{
		{append(pins, backup), "", "", ""},
		{pins, "", s.caFile(), ""},
		{[]string{backup}, "", "", zcproto.TLSPinMismatch},
		{[]string{backup}, "", s.caFile(), zcproto.TLSPinMismatch},
		{pins, "other.example", "", zcproto.TLSCertificateNameMismatch},
	} {
		options := s.options()
		options.CAFile, options.Pins, options.ServerName = test.ca, test.pins, test.name
		client, err := zcproto.Dial(ctx, s.address(), options)
		var failure *zcproto.TLSError
		if err == nil {
			_ = client.Close()
		} else if !errors.As(err, &failure) {
			failure = &zcproto.TLSError{}
		}
		if (err == nil) != (test.want == "") || failure != nil && failure.Failure != test.want {
			t.Errorf("%+v: got %v", test, err)
		}
	}
}

func testStreams(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	stream := client.Stream(ctx, "count", map[string]any{"n": 1_000}, zcproto.Window(16, 10_000))
	next := 0
	for number, err := range zcproto.Items[int](stream) {
		if err != nil || number != next {
			t.Fatalf("got %d, %v instead of %d", number, err, next)
		}
		next++
	}
	var result struct {
		Sent int `msgpack:"sent"`
	}
	if err := stream.Result(&result); err != nil || result.Sent != 1_000 || next != 1_000 {
		t.Errorf("got %v, %v", result, err)
	}
	upload := client.Stream(ctx, "total", nil)
	for number := range 1_000 {
		if err := upload.Send(number); err != nil {
			t.Fatal(err)
		}
	}
	_ = upload.CloseSend()
	var total int
	if err := upload.Result(&total); err != nil || total != 499_500 {
		t.Errorf("got %d, %v", total, err)
	}
	if err := client.Stream(ctx, "no.such.method", nil).Recv(nil); !errors.Is(err, zcproto.Unimplemented) {
		t.Errorf("got %v", err)
	}
}

func testCallsOfTheServer(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	err := client.Handle(ctx, "hello", func(_ context.Context, call *zcproto.ServerCall) (any, error) {
		var params struct {
			User string `msgpack:"user"`
		}
		err := call.Decode(&params)
		return fmt.Sprintf("hello %s, %s", params.User, call.User), err
	})
	if err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		var answer string
		if err := client.Call(ctx, "ask", map[string]any{"method": "hello"}, &answer); err != nil || answer != "hello ada, ada" {
			t.Errorf("got %q, %v", answer, err)
		}
		client.Cut()
		if err := client.Call(ctx, "echo", nil, nil, zcproto.IdempotencyKey(fmt.Sprint("after cut ", round))); err != nil {
			t.Fatal(err)
		}
	}
}

func testUsers(t *testing.T, s *server, _ string) {
	options := s.options()
	gateway := s.dial(options)
	var sessions []*zcproto.Session
	for number := range 3 {
		name := fmt.Sprintf("user%d", number)
		session, err := gateway.SessionFor(ctx, zcproto.LoginWith(func(context.Context) (zcproto.Login, error) {
			return zcproto.Login{Scheme: "ticket", Fields: map[string]any{"user": name, "ticket": 1}}, nil
		}))
		if err != nil {
			t.Fatal(err)
		}
		sessions = append(sessions, session)
	}
	for number, session := range sessions {
		var info struct {
			User string `msgpack:"user"`
		}
		if err := session.Call(ctx, "session.info", nil, &info); err != nil || info.User != fmt.Sprintf("user%d", number) {
			t.Errorf("got %v, %v", info, err)
		}
	}
	_ = sessions[0].Close()
	if err := sessions[0].Call(ctx, "echo", nil, nil); err == nil {
		t.Error("a closed session was used")
	}
	if err := sessions[1].Call(ctx, "echo", nil, nil); err != nil {
		t.Error(err)
	}
}

// Every answer belongs to its call, however often the connection is cut, and nothing is left behind.
func testManyCuts(t *testing.T, s *server, key string) {
	before := runtime.NumGoroutine()
	client := s.dialAs("ada", key)
	var calls sync.WaitGroup
	for worker := range 20 {
		calls.Add(1)
		go func() {
			defer calls.Done()
			for number := range 20 {
				value := fmt.Sprintf("%d of %d", number, worker)
				limited, cancel := context.WithTimeout(ctx, time.Minute)
				var result string
				err := client.Call(limited, "echo", map[string]any{"value": value}, &result, zcproto.IdempotencyKey("cuts "+value))
				cancel()
				if err != nil || result != value {
					t.Errorf("%s: got %q, %v", value, result, err)
				}
			}
		}()
	}
	done := make(chan struct{})
	go func() {
		calls.Wait()
		close(done)
	}()
	for cuts := 0; cuts < 10; {
		select {
		case <-done:
			cuts = 10
		case <-time.After(20 * time.Millisecond):
			client.Cut()
			cuts++
		}
	}
	<-done
	_ = client.Close()
	for limit := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines were left:\n%s", runtime.NumGoroutine()-before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

func TestClientReconnectsToARestartedServerWithTheSameSession(t *testing.T) {
	s := newServer(t, "")
	key := s.addUser("eve")
	s.start()
	options := s.options()
	options.Credentials = zcproto.APIKey("eve", key)
	options.Timeout = 2 * time.Minute // the server starts slowly on a busy machine
	client := s.dial(options)
	before, _ := client.Info()
	sleeping := make(chan error, 1)
	go func() { sleeping <- client.Call(ctx, "sleep", map[string]any{"ms": 500}, nil) }()
	if err := client.Call(ctx, "sleep", map[string]any{"ms": 50}, nil); err != nil {
		t.Fatal(err)
	}
	s.stop(syscall.SIGTERM)
	if err := <-sleeping; err != nil {
		t.Errorf("the call in flight was not answered during the drain: %v", err)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- client.Call(ctx, "echo", nil, nil) }()
	s.start()
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	if after, _ := client.Info(); after.ID != before.ID {
		t.Error("the session has changed")
	}
}

func TestClientCertificateOpensASession(t *testing.T) {
	s := newServer(t, "[tls]\nclient_auth = \"optional\"\n")
	s.addUser("eve")
	s.start()
	folder := filepath.Join(s.home, "handout")
	s.run("cert", "issue-client", "eve", "--out", folder)
	options := s.options()
	options.Certificate, options.KeyFile = filepath.Join(folder, "eve.crt"), filepath.Join(folder, "eve.key")
	client := s.dial(options)
	if info, _ := client.Info(); info.User != "eve" || !info.Bound {
		t.Errorf("got %+v", info)
	}
	client.Cut()
	if err := client.Call(ctx, "echo", nil, nil, zcproto.IdempotencyKey("after the cut")); err != nil {
		t.Error(err)
	}
	options.Credentials = zcproto.ClientCertificate("ada")
	if _, err := zcproto.Dial(ctx, s.address(), options); !errors.Is(err, zcproto.Unauthenticated) {
		t.Errorf("got %v", err)
	}
	if err := os.Chmod(options.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	var certificate *zcproto.CertificateError
	if _, err := zcproto.Dial(ctx, s.address(), options); !errors.As(err, &certificate) {
		t.Errorf("got %v", err)
	}
}

func TestProgramOfTheReadmeRunsAsPasted(t *testing.T) {
	s := newServer(t, "")
	key := s.addUser("ada")
	s.start()
	readme := must(os.ReadFile("../README.md"))
	found := regexp.MustCompile("(?s)`ask.go`:\n\n```go\n(.*?)```").FindSubmatch(readme)
	program := strings.ReplaceAll(string(found[1]), "localhost:7443", s.address())
	folder := t.TempDir()
	for name, text := range map[string]string{"ask.go": program, "ada.key": key + "\n"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(s.home, filepath.Join(folder, ".zeroclaw")); err != nil {
		t.Fatal(err)
	}
	module := must(filepath.Abs(".."))
	name := "github.com/zcproto/zcproto/clients/go"
	for _, arguments := range [][]string{
		{"mod", "init", "ask"}, {"mod", "edit", "-require", name + "@v0.1.0", "-replace", name + "=" + module}, {"run", "."},
	} {
		command := exec.Command("go", arguments...)
		command.Dir = folder
		command.Env = append(os.Environ(), "HOME="+folder, "GOCACHE="+goCache(t), "GOPROXY=off", "GOTOOLCHAIN=local")
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(arguments, " "), err, output)
		}
		if arguments[0] == "run" && !bytes.Contains(output, []byte("hello <nil>")) {
			t.Errorf("it prints %s", output)
		}
	}
}

func goCache(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(string(must(exec.Command("go", "env", "GOCACHE").Output())))
}
