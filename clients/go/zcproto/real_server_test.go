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

func TestWithARealServer(t *testing.T) {
	s := newServer(t, "[sessions]\nper_user = 1000\n[tls]\nclient_auth = \"optional\"\n")
	key := s.start("ada")[0]
	for name, test := range map[string]func(*testing.T, *server, string){
		"readme":      testProgramOfTheReadme,
		"values":      testValues,
		"concurrent":  testConcurrentCalls,
		"large":       testLargeFirstCall,
		"errors":      testErrors,
		"wrong key":   testWrongKey,
		"revoked":     testRevokedSession,
		"certificate": testClientCertificate,
		"device":      testDeviceIsAttachedAfterACut,
		"login":       testLogin,
		"cut":         testCutRetriesIdempotentCalls,
		"truncated":   testTruncatingProxy,
		"pins":        testPins,
		"streams":     testStreams,
		"calls":       testCallsOfTheServer,
		"users":       testUsers,
		"cuts":        testManyCuts,
		"restart":     testRestartedServer,
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
	if err := client.Call(ctx, "same", map[string]any{"value": value}, &result); err != nil || !reflect.DeepEqual(result, value) {
		t.Errorf("got %v, %v", result, err)
	}
	if welcome, found := client.Welcome(); !found || welcome.MaxFrame != 1<<20 || !welcome.HasStreams || !welcome.HasCalls {
		t.Errorf("got %+v", welcome)
	}
}

func testConcurrentCalls(t *testing.T, s *server, key string) {
	options := s.options()
	options.Credentials, options.MaxConnections = zcproto.APIKey("ada", key), 3
	client := s.dial(options)
	var calls sync.WaitGroup
	for number := range 1_000 { // more than the server has streams
		calls.Add(1)
		go func() {
			defer calls.Done()
			var result int
			if err := client.Call(ctx, "same", map[string]any{"value": number}, &result); err != nil || result != number {
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
	err := client.Call(ctx, "same", map[string]any{"value": text}, &result, zcproto.IdempotencyKey("large"))
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
		zcproto.InvalidArgument:  client.Call(ctx, "hold", map[string]any{"minutes": 1}, nil),
		zcproto.DeadlineExceeded: client.Call(short, "hold", map[string]any{"name": "for ever"}, nil),
		context.Canceled:         client.Call(cancelled, "hold", map[string]any{"name": "for ever"}, nil),
	} {
		if !errors.Is(err, want) {
			t.Errorf("got %v instead of %v", err, want)
		}
	}
	if err := client.Call(ctx, "same", nil, nil); err != nil {
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
	if err := client.Call(ctx, "same", nil, nil); !errors.Is(err, zcproto.Unauthenticated) {
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
	if err := first.Call(ctx, "same", nil, nil); !errors.Is(err, zcproto.TokenRevoked) {
		t.Errorf("got %v", err)
	}
	if again, err := first.Open(ctx); err != nil || again.ID == info.ID {
		t.Errorf("got %v, %v", again, err)
	}
	if err := first.Call(ctx, "same", nil, nil); err != nil {
		t.Error(err)
	}
}

func testDeviceIsAttachedAfterACut(t *testing.T, s *server, key string) {
	path := filepath.Join(t.TempDir(), "laptop.key")
	device := must(zcproto.CreateDevice(path))
	code := s.run(key, "pair", "--user", "ada")
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
	if err := client.Call(ctx, "same", nil, nil, zcproto.IdempotencyKey("after the cut")); err != nil {
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

// hold makes a call that runs until it is released, and returns once it has begun.
func hold(t *testing.T, client *zcproto.Client, name string, options ...zcproto.CallOption) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	params := map[string]any{"name": name}
	go func() { done <- client.Call(ctx, "hold", params, nil, options...) }()
	if err := client.Call(ctx, "begun", params, nil); err != nil {
		t.Fatal(err)
	}
	return done
}

func testCutRetriesIdempotentCalls(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	before, _ := client.Info()
	lost := hold(t, client, "lost")
	retried := hold(t, client, "retried", zcproto.IdempotencyKey("retried"))
	client.Cut()
	var closed *zcproto.ClosedError
	if err := <-lost; !errors.As(err, &closed) || closed.Clean {
		t.Errorf("got %v", err)
	}
	if err := client.Call(ctx, "release", map[string]any{"name": "retried"}, nil); err != nil {
		t.Error(err)
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
			go func() {
				_, _ = io.Copy(far, conn)
				_ = far.Close()
			}()
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
	done := hold(t, client, "truncated")
	_ = (<-near).CloseWrite()
	var failure *zcproto.TLSError
	if err := <-done; !errors.As(err, &failure) || failure.Failure != zcproto.TLSTruncated {
		t.Errorf("got %v", err)
	}
}

func testPins(t *testing.T, s *server, _ string) {
	var info struct {
		Pins []string `msgpack:"pins"`
	}
	if err := s.dial(s.options()).Call(ctx, "server.info", nil, &info); err != nil || len(info.Pins) == 0 {
		t.Fatalf("got %v, %v", info, err)
	}
	pins := info.Pins
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
		if err := client.Call(ctx, "same", nil, nil, zcproto.IdempotencyKey(fmt.Sprint("after cut ", round))); err != nil {
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
	if err := sessions[0].Call(ctx, "same", nil, nil); err == nil {
		t.Error("a closed session was used")
	}
	if err := sessions[1].Call(ctx, "same", nil, nil); err != nil {
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
				var result string
				err := client.Call(ctx, "same", map[string]any{"value": value}, &result, zcproto.IdempotencyKey("cuts "+value))
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
	for limit := time.Now().Add(patience); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines were left:\n%s", runtime.NumGoroutine()-before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

func testRestartedServer(t *testing.T, s *server, key string) {
	client := s.dialAs("ada", key)
	before, _ := client.Info()
	stream := client.Stream(ctx, "until.stopping", nil)
	if err := stream.Recv(nil); err != nil {
		t.Fatal(err)
	}
	s.stop(syscall.SIGTERM)
	var result string
	if err := stream.Result(&result); err != nil || result != "stopped" || !stream.Draining() {
		t.Errorf("a stream in flight was not answered during the drain: %q, %v", result, err)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- client.Call(ctx, "same", nil, nil) }()
	s.start()
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	if after, _ := client.Info(); after.ID != before.ID {
		t.Error("the session has changed")
	}
}

func testClientCertificate(t *testing.T, s *server, key string) {
	folder := filepath.Join(t.TempDir(), "handout")
	s.run(key, "cert", "issue-client", "ada", "--out", folder)
	options := s.options()
	options.Certificate, options.KeyFile = filepath.Join(folder, "ada.crt"), filepath.Join(folder, "ada.key")
	client := s.dial(options)
	if info, _ := client.Info(); info.User != "ada" || !info.Bound {
		t.Errorf("got %+v", info)
	}
	client.Cut()
	if err := client.Call(ctx, "same", nil, nil, zcproto.IdempotencyKey("after the cut of ada")); err != nil {
		t.Error(err)
	}
	options.Credentials = zcproto.ClientCertificate("eve")
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

func testProgramOfTheReadme(t *testing.T, s *server, key string) {
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
