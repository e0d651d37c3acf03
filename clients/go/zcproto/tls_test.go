package zcproto

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// tlsServer is a server of one connection at a time, which sends WELCOME and then does what a test says.
type tlsServer struct {
	t           *testing.T
	address     string
	caFile      string
	certificate *x509.Certificate
	config      *tls.Config
	home        string
}

// newTLSServer starts a server whose self-signed certificate is for localhost.
func newTLSServer(t *testing.T, change func(*x509.Certificate, *tls.Config), then func(*tls.Conn, net.Conn)) *tlsServer {
	t.Helper()
	allowed := suites
	suites = append(slices.Clone(suites), tls.TLS_AES_128_GCM_SHA256) // which crypto/tls prefers as a server
	t.Cleanup(func() { suites = allowed })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: true,
	}
	config := &tls.Config{NextProtos: []string{alpn}, MinVersion: tls.VersionTLS12}
	if change != nil {
		change(template, config)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	config.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	s := &tlsServer{t: t, certificate: certificate, config: config, home: t.TempDir()}
	s.caFile = filepath.Join(s.home, "ca.crt")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(s.caFile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	s.address = "localhost:" + port
	go func() {
		for {
			tcp, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				conn := tls.Server(tcp, config)
				if conn.Handshake() == nil {
					then(conn, tcp)
				}
				_ = tcp.Close()
			}()
		}
	}()
	return s
}

func welcomeFrame() []byte {
	body, err := msgpack.Append(nil, welcomeBody())
	if err != nil {
		panic(err)
	}
	frame := wire.Frame{Kind: wire.Welcome, Timestamp: uint64(time.Now().UnixMilli()), Salt: 1, Body: body}
	return frame.Append(nil)
}

// welcomes sends WELCOME and reads until the client ends.
func welcomes(conn *tls.Conn, _ net.Conn) {
	_, _ = conn.Write(welcomeFrame())
	buffer := make([]byte, 1_000)
	for {
		if _, err := conn.Read(buffer); err != nil {
			_ = conn.Close()
			return
		}
	}
}

func (s *tlsServer) dial(options Options) error {
	options.Home, options.ConnectTimeout = filepath.Join(s.home, "client"), patience
	client, err := Dial(context.Background(), s.address, options)
	if err == nil {
		_ = client.Close()
	}
	return err
}

func (s *tlsServer) failsWith(options Options, failure TLSFailure) {
	s.t.Helper()
	err := s.dial(options)
	var found *TLSError
	if !errors.As(err, &found) || found.Failure != failure {
		s.t.Errorf("got %v instead of %s", err, failure)
	}
}

func TestServerIsTrustedByItsCAAndItsPins(t *testing.T) {
	s := newTLSServer(t, nil, welcomes)
	other := keyPin(newTLSServer(t, nil, welcomes).certificate)
	key, whole := keyPin(s.certificate), certificatePin(s.certificate)
	for _, options := range []Options{
		{CAFile: s.caFile}, {Pins: []string{key, other}}, {Pins: []string{whole + " ,\n" + other}}, {CAFile: s.caFile, Pins: []string{other, key}},
		{CAFile: s.caFile, ServerName: "LOCALHOST."},
	} {
		if err := s.dial(options); err != nil {
			t.Errorf("%+v: got %v", options, err)
		}
	}
	s.failsWith(Options{}, TLSCertificateUntrusted)
	s.failsWith(Options{CAFile: newTLSServer(t, nil, welcomes).caFile}, TLSCertificateUntrusted)
	s.failsWith(Options{Pins: []string{other}}, TLSPinMismatch)
	s.failsWith(Options{CAFile: s.caFile, Pins: []string{other}}, TLSPinMismatch)
	s.failsWith(Options{SystemStore: true, Pins: []string{key}}, TLSCertificateUntrusted)
	s.failsWith(Options{CAFile: s.caFile, ServerName: "other.example"}, TLSCertificateNameMismatch)
	s.failsWith(Options{Pins: []string{key}, ServerName: "other.example"}, TLSCertificateNameMismatch)
}

func TestEachAddressHasItsOwnName(t *testing.T) {
	s := newTLSServer(t, nil, welcomes)
	_, port, _ := net.SplitHostPort(s.address)
	alone := s.address
	s.address = "127.0.0.1:" + port
	s.failsWith(Options{CAFile: s.caFile}, TLSCertificateNameMismatch)
	s.address += "," + alone
	if err := s.dial(Options{CAFile: s.caFile, AddressOrder: ListedOrder}); err != nil {
		t.Error(err)
	}
	s.address = "127.0.0.1:" + port + ",[::1]:1"
	if err := s.dial(Options{CAFile: s.caFile}); err == nil || !strings.Contains(err.Error(), "none of 2 addresses can be reached") {
		t.Errorf("got %v", err)
	}
}

func TestExpiredCertificateIsRefusedInEachMode(t *testing.T) {
	s := newTLSServer(t, func(template *x509.Certificate, _ *tls.Config) { template.NotAfter = time.Now().Add(-time.Minute) }, welcomes)
	s.failsWith(Options{CAFile: s.caFile}, TLSCertificateExpired)
	s.failsWith(Options{Pins: []string{keyPin(s.certificate)}}, TLSCertificateExpired)
	s = newTLSServer(t, func(template *x509.Certificate, _ *tls.Config) { template.NotBefore = time.Now().Add(time.Minute) }, welcomes)
	s.failsWith(Options{Pins: []string{keyPin(s.certificate)}}, TLSCertificateExpired)
}

func TestOtherVersionsAndProtocolsAreRefused(t *testing.T) {
	s := newTLSServer(t, func(_ *x509.Certificate, config *tls.Config) { config.NextProtos = nil }, welcomes)
	s.failsWith(Options{CAFile: s.caFile}, TLSNoApplicationProtocol)
	s = newTLSServer(t, func(_ *x509.Certificate, config *tls.Config) { config.NextProtos = []string{"h2"} }, welcomes)
	s.failsWith(Options{CAFile: s.caFile}, TLSNoApplicationProtocol)
	s = newTLSServer(t, func(_ *x509.Certificate, config *tls.Config) { config.MaxVersion = tls.VersionTLS12 }, welcomes)
	s.failsWith(Options{CAFile: s.caFile}, TLSUnsupportedVersion)
}

func TestThirdSuiteIsRefused(t *testing.T) {
	allowed := suites
	s := newTLSServer(t, nil, welcomes)
	suites = allowed
	s.failsWith(Options{CAFile: s.caFile}, TLSWrongParameters)
	s.failsWith(Options{InsecureSkipVerify: true}, TLSWrongParameters)
}

func TestServerWithoutTLSIsReported(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			tcp, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = tcp.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			_, _ = tcp.Read(make([]byte, 1_000))
			_ = tcp.Close()
		}
	}()
	_, err = Dial(context.Background(), listener.Addr().String(), Options{Home: t.TempDir(), ConnectTimeout: patience})
	var failure *TLSError
	if !errors.As(err, &failure) || failure.Failure != TLSNotTLS {
		t.Errorf("got %v", err)
	}
}

// A server that ends TCP without close_notify truncates the connection; crypto/tls alone would report a clean end.
func TestTruncationIsNotACleanEnd(t *testing.T) {
	for name, end := range map[string]func(*tls.Conn, net.Conn){
		"truncated":                func(_ *tls.Conn, tcp net.Conn) { _ = tcp.(*net.TCPConn).CloseWrite() },
		"":                         func(conn *tls.Conn, _ net.Conn) { _ = conn.CloseWrite() },
		string(TLSConnectionReset): func(_ *tls.Conn, tcp net.Conn) { _ = tcp.(*net.TCPConn).SetLinger(0); _ = tcp.Close() },
	} {
		s := newTLSServer(t, nil, func(conn *tls.Conn, tcp net.Conn) {
			_, _ = conn.Write(welcomeFrame())
			_, _ = conn.Read(make([]byte, 1_000)) // the request
			end(conn, tcp)
			_, _ = conn.Read(make([]byte, 1_000))
		})
		options := Options{CAFile: s.caFile, Home: s.home, ConnectTimeout: patience, Timeout: patience}
		client, err := Dial(context.Background(), s.address, options)
		if err != nil {
			t.Fatal(err)
		}
		err = client.Call(context.Background(), "work", nil, nil)
		var closed *ClosedError
		if !errors.As(err, &closed) || closed.Clean != (name == "") {
			t.Errorf("%s: got %v", name, err)
		}
		var failure *TLSError
		if errors.As(err, &failure) != (name != "") || failure != nil && string(failure.Failure) != name {
			t.Errorf("%s: got %v", name, err)
		}
		_ = client.Close()
	}
}

func TestClientSendsCloseNotify(t *testing.T) {
	ends := make(chan error, 1)
	s := newTLSServer(t, nil, func(conn *tls.Conn, tcp net.Conn) {
		_, _ = conn.Write(welcomeFrame())
		_, err := conn.Read(make([]byte, 1))
		ends <- err
	})
	s.config.Certificates[0].Leaf = s.certificate
	if err := s.dial(Options{CAFile: s.caFile}); err != nil {
		t.Fatal(err)
	}
	if err := <-ends; err == nil || err.Error() != "EOF" {
		t.Errorf("got %v", err)
	}
}

func TestKeyLogIsWrittenByOptionAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys")
	t.Setenv("SSLKEYLOGFILE", path)
	s := newTLSServer(t, nil, welcomes)
	if err := s.dial(Options{CAFile: s.caFile}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("SSLKEYLOGFILE was used")
	}
	var log bytes.Buffer
	if err := s.dial(Options{CAFile: s.caFile, KeyLog: &log}); err != nil || !strings.Contains(log.String(), "CLIENT_TRAFFIC_SECRET_0") {
		t.Errorf("got %v and %d bytes", err, log.Len())
	}
}

func TestStsPolicyForbidsToSkipVerification(t *testing.T) {
	policy := welcomeBody()
	policy["sts"] = map[string]any{"max_age": 3_600, "include_subdomains": true}
	body, _ := msgpack.Append(nil, policy)
	s := newTLSServer(t, nil, func(conn *tls.Conn, tcp net.Conn) {
		frame := wire.Frame{Kind: wire.Welcome, Timestamp: uint64(time.Now().UnixMilli()), Salt: 1, Body: body}
		_, _ = conn.Write(frame.Append(nil))
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.Close()
	})
	if err := s.dial(Options{InsecureSkipVerify: true}); err != nil {
		t.Fatal(err)
	}
	if err := s.dial(Options{CAFile: s.caFile}); err != nil {
		t.Fatal(err)
	}
	s.failsWith(Options{InsecureSkipVerify: true}, TLSStsPolicy)
}

func TestConnectTimeoutLimitsAnAttempt(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") // nothing is accepted
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, err = Dial(context.Background(), listener.Addr().String(), Options{ConnectTimeout: 50 * time.Millisecond, Home: t.TempDir()})
	var connect *ConnectError
	if !errors.As(err, &connect) {
		t.Errorf("got %v", err)
	}
}

func TestContradictingOptionsAreRefused(t *testing.T) {
	for _, options := range []Options{
		{CAFile: "ca", SystemStore: true}, {CAFile: "ca", InsecureSkipVerify: true}, {KeyFile: "key"}, {Timeout: -1}, {MaxCalls: -1},
		{Certificate: "c", GetCertificate: func() (*tls.Certificate, error) { return nil, nil }}, {ServerName: "a b"},
	} {
		_, err := Dial(context.Background(), "localhost", options)
		var config *ConfigError
		if !errors.As(err, &config) {
			t.Errorf("%+v: got %v", options, err)
		}
	}
	for _, pin := range []string{"", "sha256/AAAA", "md5/x", "sha256/" + strings.Repeat("A", 43) + "B"} {
		_, err := Dial(context.Background(), "localhost", Options{Pins: []string{pin}})
		var failure *TLSError
		if !errors.As(err, &failure) || failure.Failure != TLSPinMalformed {
			t.Errorf("%q: got %v", pin, err)
		}
	}
}

func TestEncryptedClientKeyIsRefusedWithTheCure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crt")
	key := pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{0}})
	if err := os.WriteFile(path, key, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Dial(context.Background(), "localhost:1", Options{Certificate: path})
	var unusable *CertificateError
	if !errors.As(err, &unusable) || !strings.Contains(err.Error(), "openssl pkey, or give GetCertificate") {
		t.Errorf("got %v", err)
	}
}

func TestPreviousCertificateIsShownWhileItsFilesAreReplaced(t *testing.T) {
	folder := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var certificates, keys [][]byte
	for range 2 {
		shown := newTLSServer(t, nil, welcomes).config.Certificates[0]
		key, err := x509.MarshalPKCS8PrivateKey(shown.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		certificates, keys = append(certificates, shown.Certificate[0]), append(keys, key)
	}
	options, err := Options{
		Certificate: write("crt", "CERTIFICATE", certificates[0]), KeyFile: write("key", "PRIVATE KEY", keys[0]),
	}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	trust, err := newTrust(&options)
	if err != nil {
		t.Fatal(err)
	}
	shows := func(want []byte) {
		t.Helper()
		if shown, err := trust.certificate(); err != nil || !bytes.Equal(shown.Certificate[0], want) {
			t.Errorf("another certificate is shown, %v", err)
		}
	}
	shows(certificates[0])
	write("crt", "CERTIFICATE", certificates[1])
	shows(certificates[0]) // the key is still the previous one
	write("key", "PRIVATE KEY", keys[1])
	shows(certificates[1])
}

func TestUnusableFilesAreReported(t *testing.T) {
	s := newTLSServer(t, nil, welcomes)
	open := filepath.Join(s.home, "open.key")
	empty := filepath.Join(s.home, "empty")
	for path, mode := range map[string]os.FileMode{open: 0o644, empty: 0o600} {
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, options := range []Options{
		{CAFile: empty}, {CAFile: filepath.Join(s.home, "missing")}, {CAFile: s.caFile, Certificate: empty}, {CAFile: s.caFile, Certificate: s.caFile, KeyFile: open},
		{CAFile: s.caFile, Certificate: s.caFile, KeyFile: s.home},
		{CAFile: s.caFile, GetCertificate: func() (*tls.Certificate, error) { return nil, errors.New("locked") }},
	} {
		err := s.dial(options)
		var certificate *CertificateError
		if !errors.As(err, &certificate) {
			t.Errorf("%+v: got %v", options, err)
		}
	}
	if _, err := LoadDevice(open); err == nil {
		t.Error("a key that others can read was accepted")
	}
}
