/**
 * What follows traces through a client: `otel.ts` does so with OpenTelemetry.
 *
 * Must not know: spans, and where they go.
 */

import type { Endpoint } from "./address.js";
import type { ServerCall } from "./handlers.js";

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
