/**
 * Every error of this package, as one tree, and the codes that travel on the wire.
 *
 *     ZcprotoError
 *     ├── ConfigError         options that cannot be meant; all faults are listed
 *     ├── CertificateError    a certificate or key cannot be used, and why
 *     ├── ProtocolError       the server broke the wire contract; carries the code for it
 *     ├── TlsError            the TLS connection could not be made, or is not to be trusted
 *     ├── ConnectionClosed    the connection ended; `clean` tells a close from a truncation
 *     │   └── CannotConnect   there was none to begin with: refused, unreachable, no answer in time
 *     └── CallError           a call was answered with an error; one subclass a code
 *
 * The classes hold data. Nothing here ever holds a token or a key.
 */

/** Error codes of ZCP/1. 1 to 16 are gRPC's canonical codes, 64 and above are the protocol's own. */
export const Code = {
  CANCELLED: 1,
  UNKNOWN: 2,
  INVALID_ARGUMENT: 3,
  DEADLINE_EXCEEDED: 4,
  NOT_FOUND: 5,
  ALREADY_EXISTS: 6,
  PERMISSION_DENIED: 7,
  RESOURCE_EXHAUSTED: 8,
  FAILED_PRECONDITION: 9,
  ABORTED: 10,
  OUT_OF_RANGE: 11,
  UNIMPLEMENTED: 12,
  INTERNAL: 13,
  UNAVAILABLE: 14,
  DATA_LOSS: 15,
  UNAUTHENTICATED: 16,
  PROTOCOL_ERROR: 64,
  FRAME_TOO_LARGE: 65,
  REPLAYED: 66,
  STALE_TIMESTAMP: 67,
  TOKEN_EXPIRED: 68,
  TOKEN_REVOKED: 69,
  SESSION_REPLACED: 70,
} as const;

export type Code = (typeof Code)[keyof typeof Code];
export type CodeName = keyof typeof Code;

const names = new Map<number, CodeName>(Object.entries(Code).map(([name, code]) => [code, name as CodeName]));

/** The code's name; a code that is not known here is UNKNOWN. */
export function codeName(code: number): CodeName {
  return names.get(code) ?? "UNKNOWN";
}

/** A code as it is known here; one that is not is UNKNOWN. */
export function knownCode(code: number): Code {
  return names.has(code) ? (code as Code) : Code.UNKNOWN;
}

/** What an ERROR may say beside its message: a map, empty if there is nothing to add. */
export type Details = Readonly<Record<string, unknown>>;

/** The root of all errors of this package. */
export class ZcprotoError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Options that cannot be meant. Nothing was started. */
export class ConfigError extends ZcprotoError {
  readonly faults: readonly string[];

  constructor(faults: readonly string[], options?: ErrorOptions) {
    super(faults.join("\n"), options);
    this.faults = faults;
  }
}

/** A certificate or a key cannot be used. The message names the file and the cure, never the key. */
export class CertificateError extends ZcprotoError {}

/** The server broke the wire contract. `reason` is a fixed phrase, safe to log. */
export class ProtocolError extends ZcprotoError {
  constructor(
    readonly code: Code,
    readonly reason: string,
  ) {
    super(`${codeName(code)}: ${reason}`);
  }

  get codeName(): CodeName {
    return codeName(this.code);
  }
}

/** Why a TLS connection could not be made, or is not to be trusted. */
export type TlsFailure =
  | "not_tls"
  | "unsupported_version"
  | "no_shared_suite"
  | "no_application_protocol"
  | "wrong_parameters"
  | "disconnected"
  | "bad_record"
  | "peer_rejected_certificate"
  | "peer_alert"
  | "certificate_required"
  | "certificate_untrusted"
  | "certificate_expired"
  | "certificate_revoked"
  | "certificate_name_mismatch"
  | "pin_mismatch"
  | "pin_malformed"
  | "sts_policy"
  | "truncated"
  | "connection_reset"
  | "other";

/** The TLS connection could not be made, or its server is not the one expected. */
export class TlsError extends ZcprotoError {
  constructor(
    readonly failure: TlsFailure,
    readonly detail = "",
    options?: ErrorOptions,
  ) {
    super(detail ? `${failure}: ${detail}` : failure, options);
  }
}

/**
 * The connection ended before what was asked of it was done.
 *
 * `clean` is true after a close_notify, false after a reset or a truncation (RFC 8446 section 6.1). `code` is the
 * fatal error that the server sent, or that was found in what it sent.
 */
export class ConnectionClosed extends ZcprotoError {
  readonly clean: boolean;
  readonly code: Code | undefined;

  constructor(
    readonly reason: string,
    { clean = false, code, cause }: { clean?: boolean; code?: Code | undefined; cause?: unknown } = {},
  ) {
    super(reason, cause === undefined ? undefined : { cause });
    this.clean = clean;
    this.code = code;
  }
}

/** No connection to the server could be made: no such host, refused, unreachable, or no answer in time. */
export class CannotConnect extends ConnectionClosed {}

/**
 * A call was answered with an error.
 *
 * `message` says what to do next; `details` is a map, empty if there is nothing to add.
 */
export class CallError extends ZcprotoError {
  readonly code: Code = Code.UNKNOWN;

  constructor(
    message = "",
    readonly details: Details = {},
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  get codeName(): CodeName {
    return codeName(this.code);
  }

  /** The error for a code received; a code not known here is UNKNOWN and keeps its number in the message. */
  static fromWire(code: number, message: string, details: Details): CallError {
    const kind = byCode.get(code);
    return kind === undefined ? new UnknownError(`${message} (code ${code})`, details) : new kind(message, details);
  }

  /** The same error again, for another call: each has its own stack. */
  again(): CallError {
    return CallError.fromWire(this.code, this.message, this.details);
  }
}

export class Cancelled extends CallError {
  override readonly code = Code.CANCELLED;
}
export class UnknownError extends CallError {
  override readonly code = Code.UNKNOWN;
}
export class InvalidArgument extends CallError {
  override readonly code = Code.INVALID_ARGUMENT;
}
export class DeadlineExceeded extends CallError {
  override readonly code = Code.DEADLINE_EXCEEDED;
}
export class NotFound extends CallError {
  override readonly code = Code.NOT_FOUND;
}
export class AlreadyExists extends CallError {
  override readonly code = Code.ALREADY_EXISTS;
}
export class PermissionDenied extends CallError {
  override readonly code = Code.PERMISSION_DENIED;
}
export class ResourceExhausted extends CallError {
  override readonly code = Code.RESOURCE_EXHAUSTED;
}
export class FailedPrecondition extends CallError {
  override readonly code = Code.FAILED_PRECONDITION;
}
export class Aborted extends CallError {
  override readonly code = Code.ABORTED;
}
export class OutOfRange extends CallError {
  override readonly code = Code.OUT_OF_RANGE;
}
export class Unimplemented extends CallError {
  override readonly code = Code.UNIMPLEMENTED;
}
export class InternalError extends CallError {
  override readonly code = Code.INTERNAL;
}
export class Unavailable extends CallError {
  override readonly code = Code.UNAVAILABLE;
}
export class DataLoss extends CallError {
  override readonly code = Code.DATA_LOSS;
}
export class Unauthenticated extends CallError {
  override readonly code = Code.UNAUTHENTICATED;
}
export class StaleTimestamp extends CallError {
  override readonly code = Code.STALE_TIMESTAMP;
}
export class TokenExpired extends CallError {
  override readonly code = Code.TOKEN_EXPIRED;
}
export class TokenRevoked extends CallError {
  override readonly code = Code.TOKEN_REVOKED;
}
export class SessionReplaced extends CallError {
  override readonly code = Code.SESSION_REPLACED;
}

type CallErrorClass = new (message?: string, details?: Details) => CallError;

const byCode = new Map<number, CallErrorClass>([
  [Code.CANCELLED, Cancelled],
  [Code.UNKNOWN, UnknownError],
  [Code.INVALID_ARGUMENT, InvalidArgument],
  [Code.DEADLINE_EXCEEDED, DeadlineExceeded],
  [Code.NOT_FOUND, NotFound],
  [Code.ALREADY_EXISTS, AlreadyExists],
  [Code.PERMISSION_DENIED, PermissionDenied],
  [Code.RESOURCE_EXHAUSTED, ResourceExhausted],
  [Code.FAILED_PRECONDITION, FailedPrecondition],
  [Code.ABORTED, Aborted],
  [Code.OUT_OF_RANGE, OutOfRange],
  [Code.UNIMPLEMENTED, Unimplemented],
  [Code.INTERNAL, InternalError],
  [Code.UNAVAILABLE, Unavailable],
  [Code.DATA_LOSS, DataLoss],
  [Code.UNAUTHENTICATED, Unauthenticated],
  [Code.STALE_TIMESTAMP, StaleTimestamp],
  [Code.TOKEN_EXPIRED, TokenExpired],
  [Code.TOKEN_REVOKED, TokenRevoked],
  [Code.SESSION_REPLACED, SessionReplaced],
]);
