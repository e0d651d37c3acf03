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
  | GoAwayReceived
  | EventReceived
  | ConnectionEnded;
