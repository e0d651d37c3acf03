package zcproto

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const alpn = "zcp/1"

// suites are those of the protocol. crypto/tls offers a third one and cannot be kept from it.
var suites = []uint16{tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// trust is which servers a client trusts, and the certificate that it shows. A server is trusted
//
//   - by CA: chain, dates and name of its certificate are verified, and pins as well if there are any;
//   - by pins alone: a pin takes the place of the chain; dates and name are verified;
//   - always, with InsecureSkipVerify.
type trust struct {
	caFile     string
	pins       []string
	byCA       bool
	skipVerify bool
	options    *Options
	now        func() time.Time // for dates of certificates
	mu         sync.Mutex
	shown      *tls.Certificate // the last one that was usable; guarded by mu
}

// newTrust returns a *ConfigError for options that contradict each other, a *TLSError for a malformed pin.
func newTrust(options *Options) (*trust, error) {
	pins, err := parsePins(options.Pins)
	if err != nil {
		return nil, err
	}
	t := &trust{
		caFile:     options.CAFile,
		pins:       pins,
		byCA:       options.CAFile != "" || options.SystemStore || len(pins) == 0,
		skipVerify: options.InsecureSkipVerify,
		options:    options,
		now:        time.Now,
	}
	switch {
	case t.skipVerify && (t.caFile != "" || len(pins) > 0 || options.SystemStore):
		return nil, configError("InsecureSkipVerify: it excludes CAFile, Pins and SystemStore; leave out one or the other")
	case t.caFile != "" && options.SystemStore:
		return nil, configError("CAFile and SystemStore: only one of them can be trusted; leave out the other")
	case options.Certificate == "" && options.KeyFile != "":
		return nil, configError("KeyFile: Certificate is missing; give its file")
	case options.Certificate != "" && options.GetCertificate != nil:
		return nil, configError("Certificate and GetCertificate: only one of them can be shown; leave out the other")
	}
	if len(pins) == 1 {
		what := "key"
		if pins[0][0] == 'c' {
			what = "certificate"
		}
		options.warn(fmt.Sprintf("%s is the only pin: after the server's %s has changed, this client cannot connect; add the pin of"+
			" the server's next key as a backup", pins[0], what))
	}
	return t, nil
}

func (t *trust) hasCertificate() bool {
	return t.options.Certificate != "" || t.options.GetCertificate != nil
}

// isCAMissing returns whether there is no file at CAFile.
func (t *trust) isCAMissing() bool {
	if t.caFile == "" {
		return false
	}
	_, err := os.Stat(t.caFile)
	return errors.Is(err, fs.ErrNotExist)
}

// config returns the configuration of one connection to a server that has the certificate of host. It reads the files each
// time, so that the next connection uses a renewed certificate. It returns a *CertificateError.
func (t *trust) config(host string) (*tls.Config, error) {
	config := &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		MaxVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{alpn},
		ServerName:                  host,
		KeyLogWriter:                t.options.KeyLog,
		DynamicRecordSizingDisabled: true, // small records would cost more than they save
		// VerifyConnection below verifies chain, dates, name and pins, with one error for each.
		InsecureSkipVerify: true,
	}
	var roots *x509.CertPool
	if t.caFile != "" {
		pool, err := readCA(t.caFile)
		if err != nil {
			return nil, err
		}
		roots = pool
	}
	config.VerifyConnection = func(state tls.ConnectionState) error { return t.verify(state, host, roots) }
	if t.hasCertificate() {
		certificate, err := t.certificate()
		if err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	}
	return config, nil
}

// verify judges a server. crypto/tls calls it before it sends anything but the ClientHello.
func (t *trust) verify(state tls.ConnectionState, host string, roots *x509.CertPool) error {
	if state.Version != tls.VersionTLS13 || !slices.Contains(suites, state.CipherSuite) {
		return newTLSError(TLSWrongParameters, nil)
	}
	if state.NegotiatedProtocol != alpn {
		return newTLSError(TLSNoApplicationProtocol, nil)
	}
	if len(state.PeerCertificates) == 0 {
		return &TLSError{Failure: TLSCertificateUntrusted, Detail: "the server sent no certificate"}
	}
	if t.skipVerify {
		return nil
	}
	leaf := state.PeerCertificates[0]
	now := t.now()
	if t.byCA {
		intermediates := x509.NewCertPool()
		for _, certificate := range state.PeerCertificates[1:] {
			intermediates.AddCert(certificate)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now}); err != nil {
			return certificateFailure(err, leaf, now)
		}
	} else if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return certificateFailure(x509.CertificateInvalidError{Cert: leaf, Reason: x509.Expired}, leaf, now)
	}
	if err := checkPins(t.pins, leaf); err != nil {
		return err
	}
	if err := leaf.VerifyHostname(host); err != nil { // the subject alternative names only (RFC 9525 section 6)
		return &TLSError{Failure: TLSCertificateNameMismatch, Detail: fmt.Sprintf(
			"the certificate is not for %q", wire.Escape(host, maxMessage)), Cause: err}
	}
	return nil
}

func certificateFailure(err error, leaf *x509.Certificate, now time.Time) error {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		what := "the CA has expired, or its certificate is not valid yet"
		switch {
		case now.Before(leaf.NotBefore):
			what = "not valid before " + leaf.NotBefore.UTC().Format(time.RFC3339)
		case now.After(leaf.NotAfter):
			what = "expired at " + leaf.NotAfter.UTC().Format(time.RFC3339)
		}
		return &TLSError{Failure: TLSCertificateExpired, Detail: what, Cause: err}
	}
	return &TLSError{Failure: TLSCertificateUntrusted, Detail: wire.Escape(err.Error(), maxMessage), Cause: err}
}

// readCA reads the certificates of a PEM file.
func readCA(path string) (*x509.CertPool, error) {
	content, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, unusable(path, "does not exist; copy the CA of the server to this path (zcproto cert export-ca writes it),"+
			" or check the path", err)
	case err != nil:
		return nil, unusable(path, "cannot be read: "+reasonOf(err)+"; check the path", err)
	}
	pool := x509.NewCertPool()
	found := 0
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, unusable(path, "has an invalid certificate; replace the file", err)
		}
		pool.AddCert(certificate)
		found++
	}
	if found == 0 {
		return nil, unusable(path, "has no certificate in PEM; check the path of the CA file", nil)
	}
	return pool, nil
}

// certificate returns the client certificate of one connection. While the files do not match, as during their replacement, it is
// the previous one.
func (t *trust) certificate() (*tls.Certificate, error) {
	certificate, err := t.readCertificate()
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err == nil:
		t.shown = certificate
	case t.shown != nil:
		t.options.warn(err.Error() + "; still showing the previous client certificate")
	default:
		return nil, err
	}
	return t.shown, nil
}

func (t *trust) readCertificate() (*tls.Certificate, error) {
	if t.options.GetCertificate != nil {
		certificate, err := t.options.GetCertificate()
		if err != nil {
			return nil, &CertificateError{Message: "GetCertificate failed: " + wire.Escape(err.Error(), maxMessage), Cause: err}
		}
		return certificate, nil
	}
	path, keyPath := t.options.Certificate, t.options.KeyFile
	if keyPath == "" {
		keyPath = path
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, unusable(path, "cannot be read: "+reasonOf(err)+"; check the path", err)
	}
	key, err := readPrivate(keyPath)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	if bytes.Contains(key, []byte("ENCRYPTED")) {
		return nil, unusable(keyPath, "is encrypted, which is not supported; decrypt it with openssl pkey, or give"+
			" GetCertificate", nil)
	}
	certificate, err := tls.X509KeyPair(content, key)
	if err != nil {
		return nil, unusable(path, "cannot use certificate and key: "+err.Error(), err)
	}
	return &certificate, nil
}
