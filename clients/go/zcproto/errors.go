package zcproto

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// A Code is an error code of the protocol. It is an error itself, so that errors.Is finds the code of any error of this package:
//
//	if errors.Is(err, zcproto.NotFound) { ... }
type Code int

// The canonical codes of gRPC.
const (
	// Cancelled: the call was cancelled, by the caller or by the server; the details of a stream have a reason.
	Cancelled = Code(wire.Cancelled)
	// Unknown: an error without further information, or with a code that this client does not know.
	Unknown = Code(wire.Unknown)
	// InvalidArgument: the method does not accept these params; the details may have faults.
	InvalidArgument = Code(wire.InvalidArgument)
	// DeadlineExceeded: the deadline has passed. The method has perhaps run.
	DeadlineExceeded = Code(wire.DeadlineExceeded)
	// NotFound: no such thing.
	NotFound = Code(wire.NotFound)
	// AlreadyExists: there is one already.
	AlreadyExists = Code(wire.AlreadyExists)
	// PermissionDenied: this user may not do that.
	PermissionDenied = Code(wire.PermissionDenied)
	// ResourceExhausted: too many attempts, requests, streams or sessions.
	ResourceExhausted = Code(wire.ResourceExhausted)
	// FailedPrecondition: not in this state, such as another request under the same idempotency key.
	FailedPrecondition = Code(wire.FailedPrecondition)
	// Aborted: a conflict, such as a concurrent change.
	Aborted = Code(wire.Aborted)
	// OutOfRange: beyond the end.
	OutOfRange = Code(wire.OutOfRange)
	// Unimplemented: no such method, or the server lacks the feature.
	Unimplemented = Code(wire.Unimplemented)
	// Internal: a fault of the server, whose message has an incident id, or an answer that cannot be read.
	Internal = Code(wire.Internal)
	// Unavailable: not now. The request was not run.
	Unavailable = Code(wire.Unavailable)
	// DataLoss: the answer or an item was too old. The method has perhaps run.
	DataLoss = Code(wire.DataLoss)
	// Unauthenticated: no session, or wrong credentials.
	Unauthenticated = Code(wire.Unauthenticated)
)

// The codes of the protocol.
const (
	// ProtocolError: the other side has violated the protocol. The connection has ended.
	ProtocolError = Code(wire.ProtocolError)
	// FrameTooLarge: a frame was larger than allowed. The connection has ended.
	FrameTooLarge = Code(wire.FrameTooLarge)
	// Replayed: a frame was sent twice. The connection has ended.
	Replayed = Code(wire.Replayed)
	// StaleTimestamp: the timestamp is too far off, although the client has corrected its clock.
	StaleTimestamp = Code(wire.StaleTimestamp)
	// TokenExpired: the session has ended because of its age, or was not used for too long.
	TokenExpired = Code(wire.TokenExpired)
	// TokenRevoked: the session was revoked.
	TokenRevoked = Code(wire.TokenRevoked)
	// SessionReplaced: the session made room for a newer one of this user.
	SessionReplaced = Code(wire.SessionReplaced)
)

// String returns the name of the code, such as NOT_FOUND.
func (c Code) String() string { return wire.Code(c).String() }

// Error returns the name of the code.
func (c Code) Error() string { return c.String() }

// An Error says why a call failed. errors.Is compares its code:
//
//	errors.Is(err, zcproto.PermissionDenied)
//
// and errors.As finds message and details.
type Error struct {
	Code Code
	// Message is a sentence for people; do not base decisions on it. It never contains a secret.
	Message string
	// Details are values of the types of Call's result into an any; nil without any.
	Details map[string]any
	// Cause is the error of the caller's context, if that ended the call; nil for an error of the server.
	Cause error
}

func (e *Error) Error() string { return e.Code.String() + ": " + e.Message }

// Is reports whether target is the code of the error. DeadlineExceeded is context.DeadlineExceeded, too: whether the server or the
// client notices the deadline first is chance.
func (e *Error) Is(target error) bool {
	return target == e.Code || target == context.DeadlineExceeded && e.Code == DeadlineExceeded
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// maxMessage is how many characters of a message of the server are kept.
const maxMessage = 1_000

// errorOf converts the error of a conversation. Text of the server is made safe to show.
func errorOf(err *conversation.Error) *Error {
	code, message := Code(err.Code), wire.Escape(err.Message, maxMessage)
	if !err.Code.IsKnown() {
		code, message = Unknown, fmt.Sprintf("%s (code %d)", message, int(err.Code))
	}
	return &Error{Code: code, Message: message, Details: err.Details}
}

// A ClosedError says that the connection ended before the answer. A call with it has perhaps run.
type ClosedError struct {
	// Reason says why.
	Reason string
	// Clean is whether the server sent close_notify, or this end has closed the connection. A reset or a truncation, which an
	// attacker can cause, is not clean.
	Clean bool
	// Code is the fatal error that the server sent or that was found in its frames; 0 without one. errors.Is finds it.
	Code Code
	// Cause is the error of the transport, such as a *TLSError; it may be nil.
	Cause error
}

func (e *ClosedError) Error() string {
	if e.Code != 0 {
		return "the connection ended: " + e.Code.String() + ": " + e.Reason
	}
	return "the connection ended: " + e.Reason
}

// Is reports whether target is the code of the error.
func (e *ClosedError) Is(target error) bool { return e.Code != 0 && target == e.Code }

// Unwrap returns the cause.
func (e *ClosedError) Unwrap() error { return e.Cause }

// A ConnectError says that connecting failed: unknown host, refused, unreachable, or timeout.
type ConnectError struct {
	// Reason says why.
	Reason string
	// Refused is whether nothing listens at the address: the server may be starting.
	Refused     bool
	isGoingAway bool // GOAWAY came with WELCOME
	// Cause is the error of the network; it may be nil.
	Cause error
}

func (e *ConnectError) Error() string { return "cannot connect: " + e.Reason }

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Cause }

// A TLSFailure is why a TLS handshake failed or a server is not trusted.
type TLSFailure string

// The failures, with the names that they have in every client.
const (
	TLSNotTLS                  TLSFailure = "not_tls"
	TLSUnsupportedVersion      TLSFailure = "unsupported_version"
	TLSNoSharedParameters      TLSFailure = "no_shared_parameters"
	TLSNoApplicationProtocol   TLSFailure = "no_application_protocol"
	TLSWrongParameters         TLSFailure = "wrong_parameters"
	TLSDisconnected            TLSFailure = "disconnected"
	TLSBadRecord               TLSFailure = "bad_record"
	TLSPeerRejectedCertificate TLSFailure = "peer_rejected_certificate"
	TLSPeerAlert               TLSFailure = "peer_alert"
	TLSCertificateRequired     TLSFailure = "certificate_required"
	TLSCertificateUntrusted    TLSFailure = "certificate_untrusted"
	TLSCertificateExpired      TLSFailure = "certificate_expired"
	TLSCertificateRevoked      TLSFailure = "certificate_revoked"
	TLSCertificateNameMismatch TLSFailure = "certificate_name_mismatch"
	TLSPinMismatch             TLSFailure = "pin_mismatch"
	TLSPinMalformed            TLSFailure = "pin_malformed"
	TLSStsPolicy               TLSFailure = "sts_policy"
	TLSTruncated               TLSFailure = "truncated"
	TLSConnectionReset         TLSFailure = "connection_reset"
	TLSOther                   TLSFailure = "other"
)

// A TLSError says that the TLS handshake failed, that the server is not trusted, or how the transport ended.
type TLSError struct {
	Failure TLSFailure
	// Detail says what failed and how to fix it; it may be empty.
	Detail string
	// Cause is the error of crypto/tls or of the network; it may be nil.
	Cause error
}

func (e *TLSError) Error() string {
	if e.Detail == "" {
		return string(e.Failure)
	}
	return string(e.Failure) + ": " + e.Detail
}

// Unwrap returns the cause.
func (e *TLSError) Unwrap() error { return e.Cause }

// A ConfigError lists the invalid options. Nothing was started.
type ConfigError struct {
	// Faults have a sentence for each, which begins with the option.
	Faults []string
}

func (e *ConfigError) Error() string { return strings.Join(e.Faults, "\n") }

// A CertificateError says that a certificate or a key is unusable. The message names the file and how to fix it, never the
// key.
type CertificateError struct {
	Message string
	// Cause is the error of the system or of the parser; it may be nil.
	Cause error
}

func (e *CertificateError) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *CertificateError) Unwrap() error { return e.Cause }

// A LoginError says that the application's part of opening a session has failed: the function of LoginWith, or the signer of a
// device. The next call runs it again.
type LoginError struct {
	// Cause is the error of the application.
	Cause error
}

func (e *LoginError) Error() string { return "login: " + e.Cause.Error() }

// Unwrap returns the cause.
func (e *LoginError) Unwrap() error { return e.Cause }

func configError(fault string) *ConfigError { return &ConfigError{Faults: []string{fault}} }

// contextError returns why a call ends whose context is done: an error of this package that is the context's cause, or else
// CANCELLED or DEADLINE_EXCEEDED with that cause.
func contextError(ctx context.Context) error {
	cause := context.Cause(ctx)
	switch cause.(type) {
	case *Error, *ClosedError, *ConnectError, *LoginError:
		return cause
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &Error{Code: DeadlineExceeded, Message: "no response before the deadline of the context", Cause: cause}
	}
	return &Error{Code: Cancelled, Message: "cancelled by the caller", Cause: cause}
}

// toCore is the inverse of errorOf.
func toCore(err *Error) *conversation.Error {
	return &conversation.Error{Code: wire.Code(err.Code), Message: err.Message, Details: err.Details}
}
