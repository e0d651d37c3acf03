/**
 * The client's connections: one for new calls, and older ones that drain.
 *
 * Decides: when to connect and reconnect. The first attempt is repeated only while nothing listens or the server goes away,
 * because a server may be starting. After a loss it reconnects with growing, jittered delays; after GOAWAY when the
 * server requested it; after a close for idleness with the next call; and not at all once the session was revoked or
 * replaced.
 * Rules: all callers that wait for a connection share one attempt. The delays start again once a connection has lasted
 * STABLE_AFTER_MS: a server that answers and ends each connection must not make its clients reconnect many times a second.
 * Must not know: calls, retries and sessions.
 */

import type { CallReceived, EventReceived, GoAwayReceived } from "../connection/events.js";
import { CannotConnect, ConnectionClosed, TlsError, type ZcprotoError } from "../errors.js";
import type { Backoff } from "./backoff.js";
import { type Clock, sleep, unlessAborted } from "./clock.js";
import type { ConnectionDriver } from "./connection_driver.js";
import type { ConnectionListener } from "./pending.js";
import { isTransient, MAX_RETRY_AFTER_MS } from "./retry.js";

/** Reasons of GOAWAY for an unused connection: a new one would be closed for the same reason. */
const IDLE_REASONS: ReadonlySet<string> = new Set(["idle", "no_session"]);

/** How long a connection must last to count as a success. */
const STABLE_AFTER_MS = 5_000;

/** The longest delay between two attempts to connect to a server that is starting. */
const MAX_START_DELAY_MS = 1_000;

/** GOAWAY arrived in the same read as WELCOME. */
class GoingAway extends CannotConnect {}

export interface ConnectionManagerOptions {
  readonly clock: Clock;
  readonly backoff: Backoff;
  /** How long to wait for a server that is starting; `onStarting` is called once when that begins. */
  readonly startTimeoutMs: number;
  readonly onStarting: () => void;
  readonly dial: (listener: ConnectionListener, signal: AbortSignal) => Promise<ConnectionDriver>;
  readonly onEvent: (event: EventReceived) => void;
  readonly onConnection: (connection: ConnectionDriver) => void;
  readonly onCall: (connection: ConnectionDriver, event: CallReceived) => void;
  readonly onWithdraw: (connection: ConnectionDriver, number: number) => void;
  readonly onEnded: (connection: ConnectionDriver, error: ConnectionClosed) => void;
  /** Whether to reconnect before the next call. */
  readonly isWanted: () => boolean;
}

/** Maintains the connection to one server. */
export class ConnectionManager implements ConnectionListener {
  /** The connection for new calls. */
  current: ConnectionDriver | undefined;
  /** Why the last attempt failed. */
  lastError: ZcprotoError | undefined;
  readonly #options: ConnectionManagerOptions;
  readonly #draining = new Set<ConnectionDriver>();
  /** Ended connections whose transport is still closing. */
  readonly #ending = new Set<ConnectionDriver>();
  readonly #closing = new AbortController();
  #connecting: Promise<void> | undefined;
  #notBefore = Number.NEGATIVE_INFINITY;
  /** When the current connection counts as a success. */
  #stableAt = Number.POSITIVE_INFINITY;
  #hasConnected = false;

  constructor(options: ConnectionManagerOptions) {
    this.#options = options;
  }

  /**
   * Return the connection for new calls. Without one, connect, and retry while that may succeed.
   *
   * Rejects with the error of the first attempt after the server has started; later only with errors that a retry does not fix: TlsError,
   * CertificateError, ConnectionClosed.
   */
  async get(signal?: AbortSignal): Promise<ConnectionDriver> {
    while (this.current === undefined) {
      this.#closing.signal.throwIfAborted();
      await unlessAborted(this.#start(), signal);
    }
    return this.current;
  }

  #start(): Promise<void> {
    if (this.#connecting === undefined) {
      this.#connecting = this.#connect().finally(() => {
        this.#connecting = undefined;
      });
      this.#connecting.catch(() => undefined); // without a waiter, the next call retries and reports it
    }
    return this.#connecting;
  }

  async #connect(): Promise<void> {
    const { clock, backoff, dial, onConnection, onStarting, startTimeoutMs } = this.#options;
    const { signal } = this.#closing;
    const startsUntil = clock.now() + startTimeoutMs;
    let isStarting = false;
    for (;;) {
      const delay = this.#notBefore - clock.now();
      if (delay > 0) {
        await sleep(clock, delay, signal);
      }
      try {
        const connection = await dial(this, signal);
        if (signal.aborted) {
          connection.close("closed by this client");
          throw signal.reason;
        }
        if (connection.draining) {
          throw new GoingAway("the server is going away");
        }
        if (connection.error !== undefined) {
          throw connection.error;
        }
        if (!this.#hasConnected) {
          this.#hasConnected = true;
          backoff.reset();
        }
        this.current = connection;
        this.#stableAt = clock.now() + STABLE_AFTER_MS;
        onConnection(connection);
        return;
      } catch (error) {
        if (signal.aborted || !(error instanceof ConnectionClosed || error instanceof TlsError)) {
          throw error;
        }
        this.lastError = error;
        let delay = backoff.next();
        if (this.#hasConnected) {
          if (error instanceof TlsError && !isTransient(error.failure)) {
            throw error;
          }
        } else {
          delay = Math.min(delay, MAX_START_DELAY_MS);
          const isRefused = error instanceof CannotConnect && error.refused;
          const beginsAt = Math.max(clock.now() + delay, this.#notBefore);
          if (!(isRefused || error instanceof GoingAway) || beginsAt >= startsUntil) {
            throw error;
          }
          if (isRefused && !isStarting) {
            isStarting = true;
            onStarting();
          }
        }
        this.#delayNextAttempt(delay);
      }
    }
  }

  #delayNextAttempt(delayMs: number): void {
    this.#notBefore = Math.max(this.#notBefore, this.#options.clock.now() + delayMs);
  }

  // --- notifications of connections --------------------------------------------------------------

  eventReceived(_connection: ConnectionDriver, event: EventReceived): void {
    // Deferred, so that callers awaiting a response of the same read run first.
    setImmediate(() => this.#options.onEvent(event));
  }

  callReceived(connection: ConnectionDriver, event: CallReceived): void {
    setImmediate(() => {
      if (connection.error === undefined) {
        this.#options.onCall(connection, event);
      }
    });
  }

  callWithdrawn(connection: ConnectionDriver, number: number): void {
    setImmediate(() => this.#options.onWithdraw(connection, number));
  }

  connectionDraining(connection: ConnectionDriver, event: GoAwayReceived): void {
    if (connection === this.current) {
      this.current = undefined;
      this.#draining.add(connection);
    }
    if (IDLE_REASONS.has(event.reason)) {
      return;
    }
    this.#reconnect(Math.min(event.retryAfterMs, MAX_RETRY_AFTER_MS));
  }

  connectionEnded(connection: ConnectionDriver, error: ConnectionClosed): void {
    this.#options.onEnded(connection, error);
    this.#draining.delete(connection);
    this.#ending.add(connection);
    void connection.closed.then(() => this.#ending.delete(connection));
    if (connection !== this.current) {
      return;
    }
    this.current = undefined;
    this.lastError = error;
    this.#reconnect();
  }

  /** Delay the next attempt to connect, and start it now if it is wanted. */
  #reconnect(retryAfterMs = 0): void {
    const { clock, backoff } = this.#options;
    if (clock.now() >= this.#stableAt) {
      backoff.reset();
    }
    this.#stableAt = Number.POSITIVE_INFINITY;
    this.#delayNextAttempt(backoff.next(retryAfterMs));
    if (this.#hasConnected && !this.#closing.signal.aborted && this.#options.isWanted()) {
      void this.#start();
    }
  }

  // --- the end -----------------------------------------------------------------------------------

  /**
   * Close all connections with close_notify and wait until their transports are closed, also those that the server closed.
   * Each takes no longer than a TLS close.
   */
  async close(): Promise<void> {
    this.#closing.abort(new ConnectionClosed("this client is closed", { clean: true }));
    await this.#connecting?.catch(() => undefined); // reported to its waiters
    const connections = [...this.#draining, ...(this.current === undefined ? [] : [this.current])];
    this.current = undefined;
    for (const connection of connections) {
      connection.close("closed by this client");
    }
    await Promise.all([...this.#ending].map((connection) => connection.closed));
  }

  /** Reset all connections, like a network failure. */
  abort(): void {
    this.current?.abort();
    for (const connection of this.#draining) {
      connection.abort();
    }
  }
}
