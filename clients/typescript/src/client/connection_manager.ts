/**
 * The client's connections: one for new calls, and older ones that drain.
 *
 *     Endpoints -> Round -> dial, several at once -> the first one with WELCOME: current
 *
 * Decides: when to connect and reconnect. The first round is repeated only while nothing listens or the server goes away,
 * because a server may be starting. After a loss or GOAWAY it reconnects, to another endpoint at once if there is one that
 * does not rest; after a close for idleness with the next call; and not at all once the session was revoked or replaced. A
 * connection is kept until then, even if a name resolves to others now.
 * Rules: all callers that wait for a connection share one round.
 * Must not know: calls, retries and sessions.
 */

import { isIP } from "node:net";
import type { CallReceived, EventReceived, GoAwayReceived } from "../connection/events.js";
import { ConnectionClosed, TlsError, type ZcprotoError } from "../errors.js";
import { NO_TOKEN } from "../wire/frame.js";
import type { Address, Endpoint } from "./address.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep, unlessAborted } from "./clock.js";
import type { ConnectionDriver } from "./connection_driver.js";
import { Endpoints, GoingAway, type Round } from "./endpoints.js";
import { FurtherConnections } from "./further_connections.js";
import type { ConnectionListener } from "./pending.js";

/** Reasons of GOAWAY for an unused connection: a new one would be closed for the same reason. */
const IDLE_REASONS: ReadonlySet<string> = new Set(["idle", "no_session"]);

/** Return the IP addresses of a name, the resolver's choice first. Rejects with CannotConnect. */
export type Resolve = (address: Address, signal: AbortSignal) => Promise<readonly string[]>;

/** Make a connection, and call `onReached` once there is a TCP connection. */
export type Dial = (
  listener: ConnectionListener,
  endpoint: Endpoint,
  onReached: () => void,
  signal: AbortSignal,
) => Promise<ConnectionDriver>;

export interface ConnectionManagerOptions {
  readonly clock: Clock;
  readonly random: Random;
  readonly addresses: readonly Address[];
  /** Whether to try the addresses in random order. */
  readonly isRandom: boolean;
  /** The most connections at once to a server. */
  readonly maxConnections: number;
  /** How long to wait for a server that is starting; `onStarting` is called once when that begins. */
  readonly startTimeoutMs: number;
  readonly onStarting: () => void;
  readonly resolve: Resolve;
  readonly dial: Dial;
  readonly onEvent: (event: EventReceived) => void;
  readonly onConnection: (connection: ConnectionDriver) => void;
  /** Called with each connection beside the main one. */
  readonly onFurther: (connection: ConnectionDriver) => void;
  readonly onCall: (connection: ConnectionDriver, event: CallReceived) => void;
  readonly onWithdraw: (connection: ConnectionDriver, number: number) => void;
  readonly onEnded: (connection: ConnectionDriver, error: ConnectionClosed) => void;
  /** Whether to reconnect before the next call. */
  readonly isWanted: () => boolean;
}

/** Maintains the connections of a client. */
export class ConnectionManager implements ConnectionListener {
  /** The connection for new calls. */
  current: ConnectionDriver | undefined;
  readonly further: FurtherConnections;
  readonly #options: ConnectionManagerOptions;
  readonly #endpoints: Endpoints;
  readonly #draining = new Set<ConnectionDriver>();
  /** Ended connections whose transport is still closing. */
  readonly #ending = new Set<ConnectionDriver>();
  readonly #closing = new AbortController();
  #connecting: Promise<void> | undefined;

  constructor(options: ConnectionManagerOptions) {
    const { addresses, isRandom, random, clock, maxConnections, dial, onFurther } = options;
    this.#options = options;
    this.#endpoints = new Endpoints({ addresses, isRandom, random });
    this.further = new FurtherConnections({
      clock,
      backoff: new Backoff(random),
      max: maxConnections - 1,
      dial: (endpoint) => dial(this, endpoint, () => undefined, this.#closing.signal),
      onOpened: onFurther,
    });
  }

  /** Why the last attempt failed, or the last connection was lost. */
  get lastError(): ZcprotoError | undefined {
    return this.#endpoints.lastError;
  }

  /** All open connections, those that drain included. */
  get all(): ConnectionDriver[] {
    const { current } = this;
    return [...this.#draining, ...this.further.all, ...(current === undefined ? [] : [current])];
  }

  /**
   * Return the connection for new calls. Without one, connect, and retry while that may succeed.
   *
   * Rejects with the error of the first round after a server has started; later only with errors that a retry does not fix:
   * TlsError, CertificateError, ConnectionClosed.
   */
  async get(signal?: AbortSignal): Promise<ConnectionDriver> {
    while (this.current === undefined) {
      this.#closing.signal.throwIfAborted();
      await unlessAborted(this.#start(), signal);
    }
    return this.current;
  }

  /** Return a connection that has room for a request, or takes no more. Rejects like `get`. */
  async waitReady(signal?: AbortSignal): Promise<ConnectionDriver> {
    const connection = await this.get(signal);
    if (this.#options.maxConnections > 1) {
      return await this.further.waitReady(connection, signal);
    }
    await connection.waitReady(signal);
    return connection;
  }

  // --- connecting --------------------------------------------------------------------------------

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
    const { clock, onConnection, onStarting, startTimeoutMs } = this.#options;
    const { signal } = this.#closing;
    const endpoints = this.#endpoints;
    const startsUntil = clock.now() + startTimeoutMs;
    let isStarting = false;
    for (;;) {
      const delay = endpoints.dueAt - clock.now();
      if (delay > 0) {
        await sleep(clock, delay, signal);
      }
      const connection = await this.#tryAll(endpoints.beginRound());
      if (connection !== undefined) {
        const fault = connection.draining ? new GoingAway("the server is going away") : connection.error;
        if (fault === undefined) {
          this.current = connection;
          endpoints.connected(connection.endpoint, clock.now());
          onConnection(connection);
          return;
        }
        endpoints.failed(connection.endpoint, fault, clock.now(), connection.retryAfterMs);
      }
      const error = endpoints.failure(startsUntil);
      if (error !== undefined) {
        throw error;
      }
      if (!endpoints.hasConnected && !isStarting && endpoints.isRefused) {
        isStarting = true;
        onStarting();
      }
    }
  }

  /** Make the attempts of a round. Return the first connection, or undefined if all have failed. */
  async #tryAll(round: Round): Promise<ConnectionDriver | undefined> {
    const { clock, resolve, dial } = this.#options;
    const abandoning = new AbortController();
    const signal = AbortSignal.any([this.#closing.signal, abandoning.signal]);
    const running = new Set<Promise<void>>();
    let won: ConnectionDriver | undefined;
    let fatal: { readonly error: unknown } | undefined;
    const begin = <T>(work: Promise<T>, done: (result: T) => void, failed: (error: ZcprotoError) => void) => {
      const settled = work
        .then(done, (error: unknown) => {
          if (!(error instanceof ConnectionClosed || error instanceof TlsError) || signal.aborted) {
            fatal ??= { error };
          } else {
            failed(error);
          }
        })
        .finally(() => running.delete(settled));
      running.add(settled);
    };
    const connected = (connection: ConnectionDriver) => {
      if (signal.aborted || won !== undefined) {
        connection.close("another address has answered first");
      } else {
        won = connection;
      }
    };
    for (const address of round.order) {
      if (isIP(address.host)) {
        round.resolved(address, [address.host], clock.now());
      } else {
        begin(
          resolve(address, signal),
          (ips) => round.resolved(address, ips, clock.now()),
          (error) => round.unresolved(address, error, clock.now()),
        );
      }
    }
    try {
      while (won === undefined && fatal === undefined) {
        const step = round.next(clock.now());
        if (typeof step !== "number") {
          const reached = () => round.reached(step, clock.now());
          begin(dial(this, step, reached, signal), connected, (error) => round.failed(step, error, clock.now()));
        } else if (running.size === 0) {
          break;
        } else {
          await this.#oneOf(running, step);
        }
      }
    } finally {
      abandoning.abort(new ConnectionClosed("another address has answered first", { clean: true }));
    }
    this.#closing.signal.throwIfAborted();
    if (fatal !== undefined) {
      throw fatal.error;
    }
    return won;
  }

  /** Wait until one of these is settled, or until a time. */
  async #oneOf(running: ReadonlySet<Promise<void>>, until: number): Promise<void> {
    const { clock } = this.#options;
    let wake: () => void = () => undefined;
    const timeout = new Promise<void>((resolve) => {
      wake = resolve;
    });
    const timer = until === Number.POSITIVE_INFINITY ? undefined : clock.after(until - clock.now(), wake);
    await Promise.race([...running, timeout]);
    timer?.cancel();
  }

  // --- notifications of connections --------------------------------------------------------------

  eventReceived(connection: ConnectionDriver, event: EventReceived): void {
    if (this.further.has(connection) && (event.token === NO_TOKEN || event.name.startsWith("session."))) {
      return; // it arrives on the main connection, too
    }
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

  connectionFree(requests: number): void {
    this.further.wake(requests);
  }

  connectionDraining(connection: ConnectionDriver, event: GoAwayReceived): void {
    this.#draining.add(connection);
    this.further.discard(connection);
    if (connection !== this.current) {
      return;
    }
    this.#leave();
    if (!IDLE_REASONS.has(event.reason)) {
      this.#reconnect(connection);
    }
  }

  connectionEnded(connection: ConnectionDriver, error: ConnectionClosed): void {
    this.#options.onEnded(connection, error);
    this.#draining.delete(connection);
    this.further.discard(connection);
    this.#ending.add(connection);
    void connection.closed.then(() => this.#ending.delete(connection));
    if (connection !== this.current) {
      return;
    }
    this.#leave();
    this.#endpoints.lastError = error;
    this.#reconnect(connection);
  }

  /** Stop using the current connection. */
  #leave(): void {
    this.current = undefined;
    this.further.wake(Number.POSITIVE_INFINITY);
  }

  /** Let the endpoint of a connection rest, and connect again now if that is wanted. */
  #reconnect({ endpoint, retryAfterMs }: ConnectionDriver): void {
    this.#endpoints.lost(endpoint, this.#options.clock.now(), retryAfterMs);
    if (!this.#closing.signal.aborted && this.#options.isWanted()) {
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
    this.further.close();
    await this.#connecting?.catch(() => undefined); // reported to its waiters
    await this.further.connecting;
    const connections = this.all;
    this.#leave();
    for (const connection of connections) {
      connection.close("closed by this client");
    }
    await Promise.all([...this.#ending].map((connection) => connection.closed));
  }

  /** Reset all connections, like a network failure. */
  abort(): void {
    for (const connection of this.all) {
      connection.abort();
    }
  }
}
