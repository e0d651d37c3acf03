/** What a client does after an error: the table of zcp1.md, section 11.1. This module only decides. */

import { CallError, Code, ConnectionClosed, type Details, type TlsFailure } from "../errors.js";
import { isInt } from "../wire/message.js";
import { Backoff, type Random } from "./backoff.js";

export type RetryAction =
  | "report" // to the application; no retry
  | "later" // retry after `retry_after_ms` with jitter, until the deadline
  | "at_once" // retry at once, one time
  | "catch_up" // retry at once with the present token, one time
  | "renew" // refresh or open the session, then retry one time
  | "reopen" // open a new session, then retry one time
  | "replace" // the server has lost the session: open another after a delay, then retry one time
  | "attach"; // attach the session to this connection, then retry one time

/** Which token a request had: `earlier` is that of a session, or of a refresh, that another one has followed. */
export type Shown = "present" | "earlier" | "none";

const BY_CODE = new Map<number, RetryAction>([
  [Code.UNAVAILABLE, "later"],
  [Code.RESOURCE_EXHAUSTED, "later"],
  [Code.STALE_TIMESTAMP, "at_once"],
  [Code.TOKEN_EXPIRED, "renew"],
]);

export const MAX_RETRY_AFTER_MS = 3_600_000;

/**
 * After one of these a client neither opens a session nor reconnects on its own: two clients of one user would evict each
 * other forever.
 */
export const SESSION_ENDED_CODES: ReadonlySet<number> = new Set([Code.TOKEN_REVOKED, Code.SESSION_REPLACED]);

/** Codes of a refused renewal, which ends the session. */
export const REFUSING_CODES: ReadonlySet<number> = new Set([
  ...SESSION_ENDED_CODES,
  Code.UNAUTHENTICATED,
  Code.TOKEN_EXPIRED,
]);

/** Codes after which a request may have run. */
export const MAY_HAVE_RUN_CODES: ReadonlySet<number> = new Set([
  Code.DEADLINE_EXCEEDED,
  Code.CANCELLED,
  Code.INTERNAL,
  Code.UNKNOWN,
]);

/** Return what a client does after an error of a call. */
export function retryAction({ code, details }: CallError): RetryAction {
  if (code === Code.RESOURCE_EXHAUSTED && "limit" in details) {
    return "report"; // the user has reached the session limit: waiting does not help
  }
  if (code === Code.UNAUTHENTICATED && details["attach"] === true) {
    return "attach";
  }
  if (code === Code.UNAUTHENTICATED && details["certificate"] === true) {
    return "reopen"; // the session belongs to a previous client certificate
  }
  if (code === Code.UNAUTHENTICATED && details["reason"] === "unknown_token") {
    return "replace";
  }
  return BY_CODE.get(code) ?? "report";
}

/** Return the delay that a server requests, at most an hour; 0 if it is absent or invalid. */
export function retryAfterMs(details: Details): number {
  const value = details["retry_after_ms"];
  return isInt(value) && value > 0 ? Math.min(Number(value), MAX_RETRY_AFTER_MS) : 0;
}

/** What a client does after an error that another call may have dealt with already. */
const CONCERNS_TOKEN: ReadonlySet<RetryAction> = new Set(["renew", "replace"]);

/** The retries of one call. Created at its first error, which most calls never have. */
export class Attempt {
  readonly #backoff: Backoff;
  readonly #done = new Set<RetryAction>();

  constructor(random: Random) {
    this.#backoff = new Backoff(random);
  }

  /** Return what to do after an error of the server. `canOpen`: whether there are credentials for another session. */
  afterError(error: CallError, shown: Shown, canOpen: boolean): RetryAction {
    const action = retryAction(error);
    if (action === "later") {
      return action;
    }
    if (shown === "none" && action !== "at_once") {
      return "report";
    }
    const concernsToken = CONCERNS_TOKEN.has(action) || SESSION_ENDED_CODES.has(error.code);
    const next = shown === "earlier" && concernsToken ? "catch_up" : action;
    if (next === "report" || (next === "replace" && !canOpen)) {
      return "report";
    }
    return this.once(next) ? next : "report";
  }

  /** Return whether something is done for the first time, and record it. */
  once(action: RetryAction): boolean {
    const isFirst = !this.#done.has(action);
    this.#done.add(action);
    return isFirst;
  }

  /** Record that something was not done. */
  undo(action: RetryAction): void {
    this.#done.delete(action);
  }

  /** Return the delay before the next retry, which is added to the delay that the server requested. */
  delayMs(askedMs = 0): number {
    return this.#backoff.next(askedMs);
  }

  /** Allow again what is done once, after the server has accepted a request. */
  accepted(): void {
    this.#done.clear();
  }

  /** Start again, after progress. */
  reset(): void {
    this.#backoff.reset();
    this.#done.clear();
  }
}

const INTERRUPTING_REASONS: ReadonlySet<unknown> = new Set(["draining", "stale"]);

/**
 * Return whether a stream ended because of its connection, and not because of its method or session. `wasLost`: the client itself
 * found a frame of the stream stale. A method may answer with DATA_LOSS, too.
 */
export function isInterruption(error: unknown, wasLost: boolean): error is CallError | ConnectionClosed {
  if (error instanceof CallError) {
    const { code, details } = error;
    if (details["detached"] === true) {
      return !isResumedElsewhere(error); // of a durable stream
    }
    return (
      (code === Code.DATA_LOSS && wasLost) || (code === Code.CANCELLED && INTERRUPTING_REASONS.has(details["reason"]))
    );
  }
  return error instanceof ConnectionClosed;
}

/** Return whether another OPEN has replaced the attachment to a durable stream. */
export function isResumedElsewhere(error: unknown): boolean {
  return (
    error instanceof CallError && error.details["detached"] === true && error.details["reason"] === "resumed_elsewhere"
  );
}

const TRANSIENT: ReadonlySet<TlsFailure> = new Set<TlsFailure>([
  "disconnected",
  "connection_reset",
  "truncated",
  "bad_record",
  "peer_alert",
  "other",
]);

/** Return whether a retry may succeed after a TLS failure. It does not for a wrong certificate, pin or peer. */
export function isTransient(failure: TlsFailure): boolean {
  return TRANSIENT.has(failure);
}
