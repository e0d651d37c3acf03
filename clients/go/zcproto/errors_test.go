package zcproto

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/vectors"
)

func TestCodesHaveTheNamesAndNumbersOfTheProtocol(t *testing.T) {
	_, codes := vectors.Tables(t, "tables")
	for name, number := range codes {
		if code := Code(number); code.String() != name || code.Error() != name {
			t.Errorf("%d is %s instead of %s", number, code, name)
		}
	}
	for code, number := range map[Code]int{Cancelled: 1, Unauthenticated: 16, ProtocolError: 64, SessionReplaced: 70} {
		if int(code) != number {
			t.Errorf("%s is %d", code, code)
		}
	}
	if text := Code(999).Error(); text != "code 999" {
		t.Errorf("an unknown code is %q", text)
	}
}

func TestErrorsAreFoundByTheirCodes(t *testing.T) {
	call := error(&Error{Code: NotFound, Message: "no such order", Details: map[string]any{"id": "7"}})
	wrapped := fmt.Errorf("order: %w", call)
	if !errors.Is(wrapped, NotFound) || errors.Is(wrapped, Internal) {
		t.Error("errors.Is does not compare codes")
	}
	var found *Error
	if !errors.As(wrapped, &found) || found.Details["id"] != "7" || wrapped.Error() != "order: NOT_FOUND: no such order" {
		t.Errorf("%v", wrapped)
	}
	closed := error(&ClosedError{Reason: "replayed", Code: Replayed, Cause: &TLSError{Failure: TLSTruncated}})
	var transport *TLSError
	if !errors.Is(closed, Replayed) || !errors.As(closed, &transport) || transport.Failure != TLSTruncated {
		t.Errorf("%v", closed)
	}
	if errors.Is(&ClosedError{Reason: "reset"}, Code(0)) {
		t.Error("an end without a fatal error has a code")
	}
}

func TestTheContextIsTheCauseOfItsErrors(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := contextError(ctx); !errors.Is(err, Cancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 0)
	defer cancel()
	if err := contextError(ctx); !errors.Is(err, DeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if errors.Is(&Error{Code: Cancelled}, context.Canceled) {
		t.Error("an error of the server looks like a cancelled context")
	}
}

func TestMessagesOfTheServerAreSafeToShow(t *testing.T) {
	err := errorOf(&conversation.Error{Code: 999, Message: "\x1b[2Jnew\n" + strings.Repeat("x", 2_000)})
	if err.Code != Unknown || strings.ContainsAny(err.Message, "\x1b\n") || len(err.Message) > 1_100 {
		t.Errorf("%q", err.Message)
	}
	if !strings.HasSuffix(err.Message, "(code 999)") {
		t.Errorf("the number is missing: %q", err.Message)
	}
}

func TestMessagesOfErrorsNameTheirReason(t *testing.T) {
	for text, err := range map[string]error{
		"the connection ended: REPLAYED: why": &ClosedError{Reason: "why", Code: Replayed},
		"the connection ended: why":           &ClosedError{Reason: "why"},
		"cannot connect: why":                 &ConnectError{Reason: "why"},
		"truncated":                           &TLSError{Failure: TLSTruncated},
		"pin_mismatch: why":                   &TLSError{Failure: TLSPinMismatch, Detail: "why"},
		"a\nb":                                &ConfigError{Faults: []string{"a", "b"}},
	} {
		if err.Error() != text {
			t.Errorf("%q instead of %q", err, text)
		}
	}
	cause := errors.New("cause")
	for _, err := range []error{&ConnectError{Cause: cause}, &TLSError{Cause: cause}, &ClosedError{Cause: cause}, &Error{Cause: cause}} {
		if !errors.Is(err, cause) {
			t.Errorf("%T hides its cause", err)
		}
	}
}
