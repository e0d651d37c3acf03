package zcproto

import (
	"context"
	"errors"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

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
