/** Settings that `connect` derives from its options. */

import type { Address, Endpoint } from "./address.js";
import type { Random } from "./backoff.js";
import type { Client } from "./client.js";
import type { Clock } from "./clock.js";
import type { ConnectionDriver } from "./connection_driver.js";
import type { Dial, Resolve } from "./connection_manager.js";
import type { ServerEvent } from "./event_stream.js";
import type { Handlers } from "./handlers.js";
import type { Credentials, LoginSource, Signer } from "./session.js";
import type { Tracing } from "./tracing.js";

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
  readonly onConnected: ((client: Client, endpoint: Endpoint) => unknown) | undefined;
  readonly onWarning: (message: string) => void;
  readonly clock: Clock;
  readonly random: Random;
}

/** What the manager of a session uses. */
export interface SessionManagerOptions {
  readonly clock: Clock;
  readonly getConnection: (signal: AbortSignal) => Promise<ConnectionDriver>;
  /** Return a connection that has room for a request, or takes no more. */
  readonly waitReady: (signal: AbortSignal) => Promise<ConnectionDriver>;
  /** All open connections, those that drain included. */
  readonly connections: () => readonly ConnectionDriver[];
  readonly credentials: Credentials | undefined;
  /** The client as `product/version`, listed by the server. */
  readonly client: string;
  readonly handlers: Handlers;
  readonly random: Random;
}
