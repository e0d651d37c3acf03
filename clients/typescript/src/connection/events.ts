/** Events of a connection. */

import type { Code } from "../errors.js";
import type { Token } from "../wire/frame.js";
import type { Welcome } from "./welcome.js";

/** WELCOME was received: calls can be made from now on. */
export interface Welcomed {
  readonly type: "welcomed";
  readonly welcome: Welcome;
}

export interface ResponseReceived {
  readonly type: "response";
  readonly stream: number;
  readonly value: unknown;
}

/** A call failed. The connection continues. */
export interface ErrorReceived {
  readonly type: "error";
  readonly stream: number;
  readonly code: number;
  readonly message: string;
  readonly details: Record<string, unknown>;
}

/** An item waits in a stream. */
export interface ItemReceived {
  readonly type: "item";
  readonly stream: number;
}

/** The server allows more items on a stream. */
export interface CreditRaised {
  readonly type: "credit";
  readonly stream: number;
}

/** The server has accepted a durable stream: its items follow. */
export interface StreamAccepted {
  readonly type: "accepted";
  readonly stream: number;
}

/** The server calls a method of this client. `stream` is the number of the call; answer it once. */
export interface CallReceived {
  readonly type: "call";
  readonly stream: number;
  readonly token: Token;
  readonly method: string;
  readonly params: Record<string, unknown>;
  readonly deadlineMs: number;
  readonly traceparent: string | undefined;
}

/** The server has withdrawn a call, which was answered: stop its handler. */
export interface CallWithdrawn {
  readonly type: "withdrawn";
  readonly stream: number;
}

/** The server accepts no new requests on this connection; requests in flight may still be answered. */
export interface GoAwayReceived {
  readonly type: "goaway";
  readonly reason: string;
  readonly retryAfterMs: number;
}

/** An EVENT. `body` is its undecoded content, which takes less memory than `data`; copy it to keep it. */
export interface EventReceived {
  readonly type: "event";
  readonly name: string;
  readonly data: unknown;
  readonly token: Token;
  readonly body: Buffer;
}

/** The connection ended. Send queued bytes, then close. `code` is the fatal error, if any. */
export interface ConnectionEnded {
  readonly type: "ended";
  readonly code: Code | undefined;
  readonly reason: string;
}

export type ClientEvent =
  | Welcomed
  | ResponseReceived
  | ErrorReceived
  | ItemReceived
  | CreditRaised
  | StreamAccepted
  | CallReceived
  | CallWithdrawn
  | GoAwayReceived
  | EventReceived
  | ConnectionEnded;
