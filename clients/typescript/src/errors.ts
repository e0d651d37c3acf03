/**
 * The errors of this package as one tree, and the codes on the wire.
 *
 *     ZcprotoError
 *     ├── ConfigError         invalid options; lists all faults
 *     ├── CertificateError    a certificate or key is unusable
 *     ├── ProtocolError       the server violated the protocol; has the code
 *     ├── TlsError            the TLS handshake failed, or the server is not trusted
 *     ├── LoginError          the application's `login` rejected, or returned what cannot be sent
 *     ├── ConnectionClosed    the connection ended; `clean` distinguishes a close from a truncation
 *     │   └── CannotConnect   connecting failed: refused, unreachable, timeout
 *     └── CallError           a call failed with an error; one subclass per code
 *
 * No error ever contains a token or a key.
 */

/** Error codes of ZCP/1. 1 to 16 are the canonical codes of gRPC, 64 and above are specific to the protocol. */
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

/** Return the name of a code; UNKNOWN for an unknown code. */
export function codeName(code: number): CodeName {
  return names.get(code) ?? "UNKNOWN";
}

/** Return a code; UNKNOWN for an unknown code. */
export function knownCode(code: number): Code {
  return names.has(code) ? (code as Code) : Code.UNKNOWN;
}

/** The details of an ERROR, which may be empty. */
export type Details = Readonly<Record<string, unknown>>;

/** The base of all errors of this package. */
export class ZcprotoError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Invalid options. Nothing was started. */
export class ConfigError extends ZcprotoError {
  readonly faults: readonly string[];

  constructor(faults: readonly string[], options?: ErrorOptions) {
    super(faults.join("\n"), options);
    this.faults = faults;
  }
}

/** A certificate or a key is unusable. The message names the file and how to fix it, never the key. */
export class CertificateError extends ZcprotoError {}

/** The function given as `login` failed; `cause` is its error. The next call runs it again. */
export class LoginError extends ZcprotoError {}

/** The server violated the protocol. `reason` is a fixed phrase, safe to log. */
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

/** Why a TLS handshake failed or a server is not trusted. */
export type TlsFailure =
  | "not_tls"
  | "unsupported_version"
  | "no_shared_parameters"
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

/** The TLS handshake failed, or the server is not trusted. */
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
 * The connection ended before the operation completed.
 *
 * `clean` is true after a close_notify, false after a reset or a truncation (RFC 8446 section 6.1). `code` is the
 * fatal error that the server sent or that was detected in its frames.
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

/** Connecting failed: unknown host, refused, unreachable, or timeout. */
export class CannotConnect extends ConnectionClosed {
  /** Whether nothing listens at the address: the server may be starting. */
  readonly refused: boolean;

  constructor(reason: string, { refused = false, cause }: { refused?: boolean; cause?: unknown } = {}) {
    super(reason, { cause });
    this.refused = refused;
  }
}

/**
 * A call failed with an error.
 *
 * `details` may be empty.
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

  /** Return the error for JSON, which has no bigint: those in the details become texts. */
  toJSON(): object {
    const { name, code, codeName, message, details } = this;
    return { name, code, codeName, message, details: withoutBigints(details) };
  }

  /** Make the error for a received code. The message of an UnknownError has the number of an unknown code. */
  static fromWire(code: number, message: string, details: Details): CallError {
    const kind = byCode.get(code);
    return kind === undefined ? new UnknownError(`${message} (code ${code})`, details) : new kind(message, details);
  }

  /** Return a copy, so that each call gets an error with its own stack. */
  copy(): CallError {
    return CallError.fromWire(this.code, this.message, this.details);
  }
}

function withoutBigints(value: unknown): unknown {
  if (typeof value === "bigint") {
    return value.toString();
  }
  if (Array.isArray(value)) {
    return value.map(withoutBigints);
  }
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) {
    return value;
  }
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withoutBigints(item)]));
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
