package zcproto_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/zcproto"
)

// server runs `zcproto serve` of this repository, with the application of testdata, as a process.
type server struct {
	t       *testing.T
	home    string
	port    string
	process *exec.Cmd
	exited  chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

// patience limits what a test waits for, also on a busy machine; nothing waits for it to pass.
const patience = 5 * time.Minute

var listening = regexp.MustCompile(`^zcproto: listening on .*:(\d+)$`)

func repository() string { return must(filepath.Abs("../../..")) }

// python returns the Python that has zcproto: ZCPROTO_PYTHON, that of the repository's environment, or the system's.
func python() string {
	if path := os.Getenv("ZCPROTO_PYTHON"); path != "" {
		return path
	}
	local := filepath.Join(repository(), ".venv/bin/python")
	if _, err := os.Stat(local); err == nil {
		return local
	}
	return "python3"
}

func newServer(t *testing.T, config string) *server {
	t.Helper()
	if testing.Short() {
		t.Skip("starts zcproto serve")
	}
	s := &server{t: t, home: t.TempDir(), port: "0"}
	// RSA keys take seconds to generate.
	text := "[certificates]\nkey_types = [\"ecdsa-p256\"]\n" + config
	if err := os.WriteFile(filepath.Join(s.home, "config.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.stop(syscall.SIGKILL) })
	return s
}

// start starts the server, on the same port as before. It returns the first line of output for each user that is added.
func (s *server) start(users ...string) (keys []string) {
	s.t.Helper()
	command := exec.Command(python(), append([]string{"serve.py", s.home, s.port}, users...)...)
	command.Dir = "testdata"
	command.Env = append(os.Environ(), "PYTHONPATH="+repository())
	stdout, err := command.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	command.Stderr = s
	if err := command.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.process, s.exited = command, make(chan struct{})
	lines := make(chan string, len(users)+1)
	go func() {
		scanner := bufio.NewScanner(stdout)
		for range cap(lines) {
			if scanner.Scan() {
				lines <- scanner.Text()
			}
		}
		for scanner.Scan() { // until it exits
		}
		_ = command.Wait()
		close(s.exited)
	}()
	limit := time.After(patience)
	for {
		select {
		case line := <-lines:
			if len(keys) < len(users) {
				keys = append(keys, line)
				continue
			}
			found := listening.FindStringSubmatch(line)
			if found == nil {
				s.t.Fatalf("the server did not start: %s\n%s", line, s.text())
			}
			s.port = found[1]
			return keys
		case <-s.exited:
			s.t.Fatalf("the server exited\n%s", s.text())
		case <-limit:
			s.t.Fatalf("the server did not start\n%s", s.text())
		}
	}
}

// Write collects the log.
func (s *server) Write(text []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(text)
}

func (s *server) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// stop stops the server by a signal and waits for its exit.
func (s *server) stop(signal syscall.Signal) {
	if s.process != nil {
		_ = s.process.Process.Signal(signal)
		<-s.exited
		s.process = nil
	}
}

func (s *server) address() string { return "localhost:" + s.port }

func (s *server) caFile() string { return filepath.Join(s.home, "certs/ca.crt") }

// options returns options that trust the server, with a home of their own, and limits for a busy machine.
func (s *server) options() zcproto.Options {
	return zcproto.Options{
		CAFile: s.caFile(), Home: filepath.Join(s.home, "client"), Timeout: patience, ConnectTimeout: patience,
	}
}

// dial connects until the end of the test.
func (s *server) dial(options zcproto.Options) *zcproto.Client {
	s.t.Helper()
	client, err := zcproto.Dial(context.Background(), s.address(), options)
	if err != nil {
		s.t.Fatalf("%v\n%s", err, s.text())
	}
	s.t.Cleanup(func() { _ = client.Close() })
	return client
}

// dialAs connects as a user until the end of the test.
func (s *server) dialAs(user, key string) *zcproto.Client {
	s.t.Helper()
	options := s.options()
	options.Credentials = zcproto.APIKey(user, key)
	return s.dial(options)
}

// run runs a command of zcproto in the server, as the user ada, and returns its output.
func (s *server) run(key string, arguments ...string) (output string) {
	s.t.Helper()
	params := map[string]any{"arguments": append([]string{"--home", s.home}, arguments...)}
	if err := s.dialAs("ada", key).Call(context.Background(), "command", params, &output); err != nil {
		s.t.Fatal(err)
	}
	return output
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(fmt.Sprintf("%T: %v", err, err))
	}
	return value
}
