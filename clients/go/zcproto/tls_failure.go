package zcproto

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

var tlsDetails = map[TLSFailure]string{
	TLSDisconnected:            "the server closed the connection during the TLS handshake; it may be full or shutting down",
	TLSNotTLS:                  "the server at this address does not use TLS; check host and port",
	TLSUnsupportedVersion:      "the server does not support TLS 1.3",
	TLSNoSharedParameters:      "the server supports no cipher suite, key-exchange group or signature algorithm of this client; its log has the cause",
	TLSNoApplicationProtocol:   "the server uses TLS but does not support zcp/1; check host and port",
	TLSWrongParameters:         "the server selected a TLS version or cipher suite that is not allowed",
	TLSPeerRejectedCertificate: "the server refused the certificate of this client; see the log of the server",
	TLSCertificateRequired:     "the server requires a client certificate; get one from its operator and pass it as Certificate with its KeyFile",
	TLSTruncated:               "the connection ended without close_notify",
	TLSConnectionReset:         "the connection was reset",
}

// Alerts of RFC 8446 section 6, by the failure that they mean to a client.
var tlsAlerts = map[tls.AlertError]TLSFailure{
	40:  TLSNoSharedParameters,
	42:  TLSPeerRejectedCertificate,
	43:  TLSPeerRejectedCertificate,
	44:  TLSPeerRejectedCertificate,
	45:  TLSPeerRejectedCertificate,
	46:  TLSPeerRejectedCertificate,
	48:  TLSPeerRejectedCertificate,
	49:  TLSPeerRejectedCertificate,
	70:  TLSUnsupportedVersion,
	116: TLSCertificateRequired,
	120: TLSNoApplicationProtocol,
}

func newTLSError(failure TLSFailure, cause error) *TLSError {
	return &TLSError{Failure: failure, Detail: tlsDetails[failure], Cause: cause}
}

// tlsFailureOf converts an error of crypto/tls or of TCP, during the handshake or after it.
func tlsFailureOf(err error, isConnected bool) *TLSError {
	var known *TLSError
	if errors.As(err, &known) {
		return known
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) && !isConnected {
		return newTLSError(TLSNotTLS, err)
	}
	var operation *net.OpError
	if errors.As(err, &operation) {
		switch operation.Op {
		case "remote error": // an alert, whose type is not exported; its text is
			for alert, failure := range tlsAlerts {
				if operation.Err.Error() == alert.Error() {
					return newTLSError(failure, err)
				}
			}
			return &TLSError{Failure: TLSPeerAlert, Detail: operation.Err.Error(), Cause: err}
		case "local error":
			return &TLSError{Failure: TLSBadRecord, Detail: operation.Err.Error(), Cause: err}
		}
	}
	ended := errors.Is(err, errTruncated) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	reset := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED) ||
		errors.Is(err, syscall.ETIMEDOUT) || errors.Is(err, net.ErrClosed)
	switch {
	case (ended || reset) && !isConnected:
		return newTLSError(TLSDisconnected, err)
	case ended:
		return newTLSError(TLSTruncated, err)
	case reset:
		return newTLSError(TLSConnectionReset, err)
	}
	text := err.Error()
	switch { // crypto/tls has no types for these
	case strings.HasPrefix(text, "tls: server selected unsupported protocol version"):
		return newTLSError(TLSUnsupportedVersion, err)
	case strings.HasPrefix(text, "tls: server selected unadvertised ALPN protocol"):
		return newTLSError(TLSNoApplicationProtocol, err)
	case strings.HasPrefix(text, "tls: server chose an unconfigured cipher suite"):
		return newTLSError(TLSWrongParameters, err)
	}
	return &TLSError{Failure: TLSOther, Detail: wire.Escape(text, maxMessage), Cause: err}
}
