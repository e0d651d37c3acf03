/** Types that several modules of the client share. */

import type { Address, Endpoint } from "./address.js";
import type { Random } from "./backoff.js";
import type { Clock } from "./clock.js";
import type { Dial, Resolve } from "./connection_manager.js";
import type { ServerEvent } from "./event_stream.js";
import type { Credentials, LoginSource, Signer } from "./session.js";
import type { Positions } from "./stream.js";

/** A call of the server. */
export interface ServerCall {
  readonly method: string;
  /** The user of the called session. */
  readonly user: string;
  /** How long the server waits for the answer, in milliseconds from its arrival. */
  readonly deadlineMs: number;
  /** The `traceparent` of W3C Trace Context. */
  readonly traceparent: string | undefined;
  /** Aborted when the server withdraws the call, and when the session or the connection ends. */
  readonly signal: AbortSignal;
}

/** Handles calls of one method. Its result is the answer; a CallError is answered with its code, other errors with INTERNAL. */
export type Handler = (params: Record<string, unknown>, call: ServerCall) => unknown;

/** A call or a stream that begins. */
export interface OutgoingCall {
  readonly method: string;
  /** The `traceparent` that the application has given. */
  readonly traceparent: string | undefined;
  /** Where the client is connected. */
  readonly endpoint: Endpoint | undefined;
  readonly isStream: boolean;
}

/** Follows traces. Each function settles as the call that it runs does. */
export interface Tracing {
  /** Run a call with all its attempts, or a stream to its end; `send` gets the `traceparent` that the server gets. */
  call<Result>(call: OutgoingCall, send: (traceparent: string | undefined) => Promise<Result>): Promise<Result>;
  /** Run the handler of a call of the server. */
  handle<Result>(call: ServerCall, run: () => Promise<Result>): Promise<Result>;
}

/** Credentials of another user on the connection of a client: user and key, device and deviceName, or a login. */
export interface SessionOptions {
  readonly user?: string | undefined;
  readonly key?: string | undefined;
  /** A Device or its key file. */
  readonly device?: Signer | string | undefined;
  /** The name under which the device was enrolled. */
  readonly deviceName?: string | undefined;
  /** A login by a scheme of the server's application, or a function that returns one for each session. */
  readonly login?: LoginSource | undefined;
  /** Called with each event of the session; without it events are queued in its `events`. Its errors become warnings. */
  readonly onEvent?: ((event: ServerEvent) => unknown) | undefined;
}

/** Settings that `connect` derives from its options. */
export interface ClientSettings {
  readonly addresses: readonly [Address, ...Address[]];
  readonly resolve: Resolve;
  readonly dial: Dial;
  /** Whether to try the addresses in random order. */
  readonly isRandom: boolean;
  readonly maxConnections: number;
  readonly credentials: Credentials | undefined;
  readonly credentialsOf: (options: SessionOptions) => Promise<Credentials>;
  readonly opensSession: boolean;
  readonly timeoutMs: number;
  readonly startTimeoutMs: number;
  readonly client: string;
  readonly maxCalls: number;
  readonly tracing: Tracing | undefined;
  readonly onEvent: ((event: ServerEvent) => unknown) | undefined;
  readonly onWarning: (message: string) => void;
  readonly clock: Clock;
  readonly random: Random;
  /** Return the id of another run: 16 random bytes in base64url. */
  readonly newRunId: () => string;
  readonly positions: Positions | undefined;
}
