package wire

import "strconv"

// A Code is an error code of the protocol (zcp1.md, section 10).
type Code int

// 1 to 16 are the canonical codes of gRPC, 64 and above are specific to the protocol.
const (
	Cancelled Code = iota + 1
	Unknown
	InvalidArgument
	DeadlineExceeded
	NotFound
	AlreadyExists
	PermissionDenied
	ResourceExhausted
	FailedPrecondition
	Aborted
	OutOfRange
	Unimplemented
	Internal
	Unavailable
	DataLoss
	Unauthenticated
)

// The codes of the protocol.
const (
	ProtocolError Code = iota + 64
	FrameTooLarge
	Replayed
	StaleTimestamp
	TokenExpired
	TokenRevoked
	SessionReplaced
)

// Codes are all codes by their names.
var Codes = map[string]Code{
	"CANCELLED":           Cancelled,
	"UNKNOWN":             Unknown,
	"INVALID_ARGUMENT":    InvalidArgument,
	"DEADLINE_EXCEEDED":   DeadlineExceeded,
	"NOT_FOUND":           NotFound,
	"ALREADY_EXISTS":      AlreadyExists,
	"PERMISSION_DENIED":   PermissionDenied,
	"RESOURCE_EXHAUSTED":  ResourceExhausted,
	"FAILED_PRECONDITION": FailedPrecondition,
	"ABORTED":             Aborted,
	"OUT_OF_RANGE":        OutOfRange,
	"UNIMPLEMENTED":       Unimplemented,
	"INTERNAL":            Internal,
	"UNAVAILABLE":         Unavailable,
	"DATA_LOSS":           DataLoss,
	"UNAUTHENTICATED":     Unauthenticated,
	"PROTOCOL_ERROR":      ProtocolError,
	"FRAME_TOO_LARGE":     FrameTooLarge,
	"REPLAYED":            Replayed,
	"STALE_TIMESTAMP":     StaleTimestamp,
	"TOKEN_EXPIRED":       TokenExpired,
	"TOKEN_REVOKED":       TokenRevoked,
	"SESSION_REPLACED":    SessionReplaced,
}

var codeNames = func() map[Code]string {
	names := make(map[Code]string, len(Codes))
	for name, code := range Codes {
		names[code] = name
	}
	return names
}()

// IsKnown reports whether the protocol defines the code.
func (c Code) IsKnown() bool { return codeNames[c] != "" }

// String returns the name of a code, such as NOT_FOUND.
func (c Code) String() string {
	if name := codeNames[c]; name != "" {
		return name
	}
	return "code " + strconv.Itoa(int(c))
}

// A Fault is a violation of the protocol by the peer, which ends the connection. Reason contains nothing of the peer's bytes.
type Fault struct {
	Code   Code
	Reason string
}
