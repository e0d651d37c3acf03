package zcproto

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/vectors"
)

func TestAddresses(t *testing.T) {
	for text, want := range map[string]string{
		"localhost": "localhost:7443", "Example.COM.:80": "example.com:80", "::1": "[::1]:7443", "[::1]:99": "[::1]:99",
		"127.0.0.1:1": "127.0.0.1:1", "a_b.example": "a_b.example:7443", "xn--bcher-kva.example": "xn--bcher-kva.example:7443",
	} {
		if got, err := parseAddress(text); err != nil || got.String() != want {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", ":1", "a:", "a:0", "a:65536", "a:x", "a:1:2", "[::1", "[::1]x", "[1.2.3.4]:1", "1.2.3", "a b", "bücher.example", "a..b",
		strings.Repeat("a", 64), strings.Repeat("a.", 127) + "aa", "a\nb", "a:-1", "a: 1",
	} {
		_, err := parseAddress(text)
		var config *ConfigError
		if !errors.As(err, &config) {
			t.Errorf("%q: got %v", text, err)
		}
	}
}

func TestDeviceKeyFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device.key")
	device, err := CreateDevice(path)
	if err != nil {
		t.Fatal(err)
	}
	if status, err := os.Stat(path); err != nil || status.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v", status.Mode(), err)
	}
	loaded, err := LoadDevice(path)
	if err != nil || string(loaded.PublicKey()) != string(device.PublicKey()) {
		t.Errorf("got %v, %v", loaded, err)
	}
	if _, err := CreateDevice(path); err == nil {
		t.Error("a key was overwritten")
	}
	for _, text := range []string{"", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadDevice(path)
		var certificate *CertificateError
		if !errors.As(err, &certificate) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	if _, err := DeviceFromSeed([]byte("short")); err == nil {
		t.Error("a short key was accepted")
	}
}

func TestKnownHosts(t *testing.T) {
	const day, now = 86_400, 1_700_000_000
	hosts := knownHosts{path: filepath.Join(t.TempDir(), "home", "known_hosts.json")}
	learn := func(host string, maxAge int64, subdomains bool, at int64) {
		t.Helper()
		if err := hosts.learn(host, stsPolicy{maxAge, subdomains}, at); err != nil {
			t.Fatal(err)
		}
	}
	forbidden := func(host string, at int64) bool {
		err := hosts.require(host, at)
		var failure *TLSError
		return errors.As(err, &failure) && failure.Failure == TLSStsPolicy
	}
	learn("example.com", 30*day, true, now)
	learn("alone.org", 30*day, false, now)
	learn("127.0.0.1", 30*day, false, now)
	for host, want := range map[string]bool{
		"example.com": true, "a.b.example.com": true, "alone.org": true, "a.alone.org": false, "127.0.0.1": false, "com": false,
	} {
		if forbidden(host, now+1) != want {
			t.Errorf("%s: got %v", host, !want)
		}
	}
	if forbidden("example.com", now+30*day) {
		t.Error("a policy has not ended")
	}
	before, _ := os.Stat(hosts.path)
	learn("example.com", 30*day, true, now+60) // close enough
	if after, _ := os.Stat(hosts.path); !os.SameFile(before, after) {
		t.Error("the file was written again")
	}
	learn("example.com", 0, true, now)
	if forbidden("example.com", now) {
		t.Error("max_age 0 has not ended the policy")
	}
	content, err := hosts.read()
	if err != nil {
		t.Fatal(err)
	}
	for n := range maxHosts + 4 {
		content[fmt.Sprintf("host%d", n)] = hostPolicy{Until: now + int64(n) + 1}
	}
	if err := hosts.write(content); err != nil {
		t.Fatal(err)
	}
	learn("last.example", 30*day, false, now)
	if content, err := hosts.read(); err != nil || len(content) != maxHosts || content["last.example"].Until == 0 {
		t.Errorf("got %d hosts, %v", len(content), err)
	}
	for _, text := range []string{"", "{}", "[]", `{"hosts": {"a": {"until": "x", "include_subdomains": true}}}`, `{"hosts": {"a": {"until": 1}}}`} {
		if err := os.WriteFile(hosts.path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if !forbidden("any.example", now) {
			t.Errorf("%q: taken for an empty file", text)
		}
		if err := hosts.learn("any.example", stsPolicy{day, false}, now); err == nil {
			t.Errorf("%q: overwritten", text)
		}
	}
}

// retryVector is a vector of spec/vectors/retry.json.
type retryVector struct {
	Name    string
	Type    string
	Outcome struct {
		Connection string
		Error      *struct {
			Code    Code
			Details map[string]any
		}
	}
	Request struct {
		Idempotent bool
		Token      string
		Done       []string
		Delays     int
		TimeLeftMs *float64 `json:"time_left_ms"`
		Draining   bool
	}
	Client struct {
		Credentials  *string
		RefreshToken bool `json:"refresh_token"`
		Reopenings   int
	}
	Random       float64
	TimeoutMs    *float64  `json:"timeout_ms"`
	AttemptsAtMs []float64 `json:"attempts_at_ms"`
	Expect       struct {
		Step       string
		AfterMs    *float64  `json:"after_ms"`
		DeadlineMs []*uint64 `json:"deadline_ms"`
	}
}

func milli(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// decide returns step and delay as the vectors name them.
func (v *retryVector) decide() (string, time.Duration) {
	backoff := newBackoff(func() float64 { return v.Random })
	skip := v.Request.Delays
	step := afterLoss(v.Outcome.Connection == "ended", v.Request.Idempotent)
	asked := time.Duration(0)
	if failed := v.Outcome.Error; failed != nil {
		for name, value := range failed.Details {
			if number, isNumber := value.(float64); isNumber { // JSON has one type of numbers
				failed.Details[name] = int64(number)
			}
		}
		err := &Error{Code: failed.Code, Details: failed.Details}
		refused := refusal{err: err, token: map[string]tokenAge{"present": presentToken, "earlier": earlierToken, "none": noToken}[v.Request.Token]}
		for _, name := range v.Request.Done {
			refused.done[map[string]then{"send": atOnce, "refresh": renew, "reopen": reopen, "attach": attach}[name]] = true
		}
		if v.Client.Credentials != nil {
			refused.canReopen = true
			refused.hasDevice = *v.Client.Credentials == "device"
			refused.isCertificate = *v.Client.Credentials == "certificate"
		}
		step = refused.next()
		if !v.Request.Draining {
			asked = retryAfter(failed.Details)
		}
		if step == reopen && !isUnknownToken(err) || step == renew && !v.Client.RefreshToken {
			return "reopen", 0
		}
	}
	if step == reopen {
		skip, asked = v.Client.Reopenings, 0
	}
	for range skip {
		backoff.next(0)
	}
	delay := backoff.next(asked)
	switch step {
	case later:
		if v.Request.TimeLeftMs != nil && delay >= milli(*v.Request.TimeLeftMs) {
			return "report", 0
		}
		return "wait", delay
	case reopen:
		return "reopen", delay
	}
	return map[then]string{report: "report", atOnce: "send", renew: "refresh", attach: "attach"}[step], 0
}

func TestVectorsOfRetries(t *testing.T) {
	for _, vector := range vectors.Load[retryVector](t, "retry") {
		if vector.Type == "deadline" {
			for index, want := range vector.Expect.DeadlineMs {
				if want == nil {
					continue // without a deadline, or not sent
				}
				if got := sentDeadline(milli(*vector.TimeoutMs - vector.AttemptsAtMs[index])); got != *want {
					t.Errorf("%s: attempt %d has %d ms", vector.Name, index, got)
				}
			}
			continue
		}
		step, delay := vector.decide()
		want := time.Duration(0)
		if vector.Expect.AfterMs != nil {
			want = milli(*vector.Expect.AfterMs)
		}
		if step != vector.Expect.Step || delay != want {
			t.Errorf("%s: got %s %v instead of %s %v", vector.Name, step, delay, vector.Expect.Step, want)
		}
	}
}

func TestDelayThatTheServerAsksFor(t *testing.T) {
	for value, want := range map[any]time.Duration{
		int64(250): 250 * time.Millisecond, int64(-1): 0, int64(1 << 62): time.Hour, uint64(1 << 63): time.Hour, "1": 0, 1.5: 0, nil: 0,
	} {
		if got := retryAfter(map[string]any{"retry_after_ms": value}); got != want {
			t.Errorf("%v: got %v", value, got)
		}
	}
}

func TestNothingIsDecodedFromAnEmptyBody(t *testing.T) {
	number := 7
	for _, err := range []error{Event{}.Decode(&number), (&ServerCall{}).Decode(&number), decode([]byte{1}, nil)} {
		if err != nil || number != 7 {
			t.Errorf("got %d, %v", number, err)
		}
	}
	var text string
	if err := (Event{data: Raw{1}}).Decode(&text); !errors.Is(err, Internal) {
		t.Errorf("got %v", err)
	}
}

func TestBackoffDoublesUpToAMaximum(t *testing.T) {
	backoff := newBackoff(func() float64 { return 0.5 })
	want := 50 * time.Millisecond
	for range 12 {
		if got := backoff.next(time.Second); got != time.Second+want {
			t.Errorf("got %v instead of %v", got-time.Second, want)
		}
		want = min(want*2, 15*time.Second)
	}
	backoff.reset()
	if got := backoff.next(0); got != 50*time.Millisecond {
		t.Errorf("got %v", got)
	}
}

func TestTimesDoNotOverflow(t *testing.T) {
	if addTime(time.Hour, forever) != forever || addTime(forever, time.Hour) != forever || addTime(time.Hour, time.Hour) != 2*time.Hour {
		t.Error("an addition has overflowed")
	}
}
