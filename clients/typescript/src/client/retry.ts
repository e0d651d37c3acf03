/** What a client does after an error: the table of the contract's section 7, as data. This module decides only. */

import { type CallError, Code, type Details, type TlsFailure } from "../errors.js";
import { isInt } from "../wire/message.js";

export type Then =
  | "tell" // the application; never again by itself
  | "later" // again after `retry_after_ms` with jitter, as often as the call's timeout allows
  | "at_once" // again at once, once
  | "renew" // refresh or open the session, then again, once
  | "reopen" // open another session, then again, once
  | "attach"; // prove the session's key on this connection, then again, once

const BY_CODE = new Map<number, Then>([
  [Code.UNAVAILABLE, "later"],
  [Code.RESOURCE_EXHAUSTED, "later"],
  [Code.STALE_TIMESTAMP, "at_once"],
  [Code.TOKEN_EXPIRED, "renew"],
]);

export const MAX_RETRY_AFTER_MS = 3_600_000;

/**
 * After one of these a client neither opens a session nor connects again by itself: two clients of one user would throw
 * each other out for ever.
 */
export const SESSION_IS_OVER: ReadonlySet<number> = new Set([Code.TOKEN_REVOKED, Code.SESSION_REPLACED]);

/** What a client does after a call was answered with an error. */
export function whatNext({ code, details }: CallError): Then {
  if (code === Code.RESOURCE_EXHAUSTED && "limit" in details) {
    return "tell"; // the user has as many sessions as allowed: waiting does not change that
  }
  if (code === Code.UNAUTHENTICATED && details["attach"] === true) {
    return "attach";
  }
  if (code === Code.UNAUTHENTICATED && details["certificate"] === true) {
    return "reopen"; // the session belongs to the certificate that was shown before
  }
  return BY_CODE.get(code) ?? "tell";
}

/** The delay that a server asks for; 0 if it does not, or not sensibly. At most an hour. */
export function retryAfterMs(details: Details): number {
  const value = details["retry_after_ms"];
  return isInt(value) && value > 0 ? Math.min(Number(value), MAX_RETRY_AFTER_MS) : 0;
}

const PASSING: ReadonlySet<TlsFailure> = new Set<TlsFailure>([
  "disconnected",
  "connection_reset",
  "truncated",
  "bad_record",
  "peer_alert",
  "other",
]);

/** Whether a TLS failure can go away by itself. A wrong certificate, pin or peer does not: it is told. */
export function mayPass(failure: TlsFailure): boolean {
  return PASSING.has(failure);
}
