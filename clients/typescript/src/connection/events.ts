/** What a conversation tells those above it. */

import type { Code } from "../errors.js";
import type { Token } from "../wire/frame.js";
import type { Welcome } from "./welcome.js";

/** The server's WELCOME: calls may be made from here on. */
export interface Welcomed {
  readonly type: "welcomed";
  readonly welcome: Welcome;
}

export interface ResponseReceived {
  readonly type: "response";
  readonly stream: number;
  readonly value: unknown;
}

/** One call was answered with an error. The connection goes on. */
export interface ErrorReceived {
  readonly type: "error";
  readonly stream: number;
  readonly code: number;
  readonly message: string;
  readonly details: Record<string, unknown>;
}

/** The server takes no new requests on this connection; what is in flight may still be answered. */
export interface GoAwayReceived {
  readonly type: "goaway";
  readonly reason: string;
  readonly retryAfterMs: number;
}

export interface EventReceived {
  readonly type: "event";
  readonly name: string;
  readonly data: unknown;
  readonly token: Token;
}

/** The conversation is over. Send what is queued, then close. `code` is the fatal error, if one was. */
export interface ConnectionEnded {
  readonly type: "ended";
  readonly code: Code | undefined;
  readonly reason: string;
}

export type ClientEvent =
  | Welcomed
  | ResponseReceived
  | ErrorReceived
  | GoAwayReceived
  | EventReceived
  | ConnectionEnded;
