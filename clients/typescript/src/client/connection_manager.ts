/**
 * The client's connections: one for new calls, and older ones that drain.
 *
 *     Endpoints -> Round -> dial, several at once -> the first one with WELCOME: current
 *
 * Decides: when to connect and reconnect. The first round is repeated only while nothing listens or the server goes away,
 * because a server may be starting. After a loss or GOAWAY it reconnects, to another endpoint at once if there is one that
 * does not rest; after a close for idleness with the next call; and not at all once the session was revoked or replaced. A
 * connection is kept until then, even if a name resolves to others now. While its server is silent it connects to another
 * endpoint beside it, and moves when the session was shown there (zcp1.md, section 11.2).
 * Rules: all callers that wait for a connection share one round.
 * Must not know: calls, retries and sessions.
 */

import { isIP } from "node:net";
import type { CallReceived, EventReceived, GoAwayReceived } from "../connection/events.js";
import { CannotConnect, ConnectionClosed, TlsError, ZcprotoError } from "../errors.js";
import { NO_TOKEN } from "../wire/frame.js";
import { type Address, type Endpoint, endpointText } from "./address.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep, unlessAborted } from "./clock.js";
import type { ConnectionDriver, ConnectionListener } from "./connection_driver.js";
import { Endpoints, GoingAway, type Round } from "./endpoints.js";
import { ExtraConnections } from "./extra_connections.js";

/** Why a silent connection ends. */
const SILENT = "the server does not respond, and another address does";

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
  /** Shows the sessions on a connection beside the current one. Resolves with whether that can be moved to. */
  readonly onBeside: (connection: ConnectionDriver) => Promise<boolean>;
  /** Shows the sessions on each extra connection. */
  readonly onExtra: (connection: ConnectionDriver) => Promise<void>;
  readonly onCall: (connection: ConnectionDriver, event: CallReceived) => void;
  readonly onWithdraw: (connection: ConnectionDriver, number: number) => void;
  readonly onEnded: (connection: ConnectionDriver, error: ConnectionClosed) => void;
  /** Whether to reconnect before the next call. */
  readonly isWanted: () => boolean;
}

/** The attempt to replace the current connection, which is silent. */
interface Beside {
  readonly stop: AbortController;
  connection: ConnectionDriver | undefined;
}

/** Maintains the connections of a client. */
export class ConnectionManager implements ConnectionListener {
  /** The connection for new calls. */
  current: ConnectionDriver | undefined;
  readonly extra: ExtraConnections;
  readonly #options: ConnectionManagerOptions;
  readonly #endpoints: Endpoints;
  readonly #draining = new Set<ConnectionDriver>();
  /** Ended connections whose transport is still closing. */
  readonly #ending = new Set<ConnectionDriver>();
  readonly #closing = new AbortController();
  #connecting: Promise<void> | undefined;
  #beside: Beside | undefined;
  #besideEnded: Promise<void> | undefined;

  constructor(options: ConnectionManagerOptions) {
    const { addresses, isRandom, random, clock, maxConnections, dial, onExtra } = options;
    this.#options = options;
    this.#endpoints = new Endpoints({ addresses, isRandom, random });
    this.extra = new ExtraConnections({
      clock,
      backoff: new Backoff(random),
      max: maxConnections - 1,
      dial: (endpoint) => dial(this, endpoint, () => undefined, this.#closing.signal),
      onOpened: (connection) => {
        this.#watch(connection);
        return onExtra(connection);
      },
    });
  }

  /** Why the last attempt failed, or the last connection was lost. */
  get lastError(): ZcprotoError | undefined {
    return this.#endpoints.lastError;
  }

  /** All open connections, those that drain included. */
  get all(): ConnectionDriver[] {
    const { current } = this;
    return [...this.#draining, ...this.extra.all, ...(current === undefined ? [] : [current])];
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
      return await this.extra.waitReady(connection, signal);
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
    const { clock, onStarting, startTimeoutMs } = this.#options;
    const { signal } = this.#closing;
    const endpoints = this.#endpoints;
    const startsUntil = clock.now() + startTimeoutMs;
    let isStarting = false;
    for (;;) {
      const delay = endpoints.dueAt - clock.now();
      if (delay > 0) {
        await sleep(clock, delay, signal);
      }
      const connection = await this.#tryAll(endpoints.beginRound(), signal);
      if (connection !== undefined) {
        const fault = connection.draining ? new GoingAway("the server is going away") : connection.error;
        if (fault === undefined) {
          this.#use(connection);
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

  /** Send new calls on a connection. */
  #use(connection: ConnectionDriver): void {
    this.current = connection;
    this.#endpoints.connected(connection.endpoint, this.#options.clock.now());
    this.#watch(connection);
    for (const draining of this.#draining) {
      if (draining.isSilent) {
        this.connectionSilent(draining);
      }
    }
    this.#options.onConnection(connection);
  }

  /** Make the attempts of a round. Return the first connection, or undefined if all have failed. */
  async #tryAll(round: Round, stop: AbortSignal): Promise<ConnectionDriver | undefined> {
    const { clock, resolve, dial } = this.#options;
    const abandoning = new AbortController();
    const signal = AbortSignal.any([stop, abandoning.signal]);
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
    if (stop.aborted) {
      won?.close("it is not needed any more");
      throw stop.reason as Error;
    }
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

  // --- leaving a server that hangs ---------------------------------------------------------------

  #watch(connection: ConnectionDriver): void {
    if (this.#endpoints.hasOther(connection.endpoint)) {
      connection.watchSilence();
    }
  }

  connectionSilent(connection: ConnectionDriver): void {
    const { current } = this;
    if (connection !== current) {
      if (current !== undefined && answersInPlaceOf(current, connection)) {
        connection.lose(SILENT);
      } else {
        current?.probe();
      }
    } else if (this.#beside === undefined && this.#options.isWanted()) {
      const beside: Beside = { stop: new AbortController(), connection: undefined };
      this.#beside = beside;
      this.#besideEnded = this.#connectBeside(connection, beside)
        .catch(ignoreFailure)
        .finally(() => {
          this.#beside = undefined;
        });
    }
  }

  connectionHeard(connection: ConnectionDriver): void {
    if (connection === this.current) {
      this.#beside?.stop.abort(new ConnectionClosed("the server has responded", { clean: true }));
    }
  }

  /** Connect to another endpoint beside a silent connection, and move there if it is silent until the session is shown. */
  async #connectBeside(silent: ConnectionDriver, beside: Beside): Promise<void> {
    const { clock, onBeside } = this.#options;
    const endpoints = this.#endpoints;
    const stop = AbortSignal.any([this.#closing.signal, beside.stop.signal]);
    while (endpoints.hasOther(silent.endpoint)) {
      const delay = endpoints.otherDueAt(silent.endpoint) - clock.now();
      if (delay > 0) {
        await sleep(clock, delay, stop);
      }
      const connection = await this.#tryAll(endpoints.beginRound(silent.endpoint), stop);
      if (connection === undefined) {
        continue;
      }
      beside.connection = connection;
      try {
        const isUsable = await unlessAborted(onBeside(connection), stop);
        stop.throwIfAborted(); // in the meantime
        if (isUsable && connection.error === undefined && !connection.draining) {
          this.#move(silent, connection);
          return;
        }
      } finally {
        if (connection !== this.current) {
          connection.close("the server has responded, or this one has no session");
        }
      }
      const error = connection.error ?? new CannotConnect("the server does not accept the session");
      endpoints.failed(connection.endpoint, error, clock.now(), connection.retryAfterMs);
    }
  }

  /** Use another connection in place of a silent one, which counts as lost. */
  #move(silent: ConnectionDriver, connection: ConnectionDriver): void {
    this.#endpoints.lost(silent.endpoint, this.#options.clock.now(), 0);
    const lost = this.extra.all.filter((each) => !each.hasAnsweredSince(silent));
    this.#leave();
    this.#use(connection);
    for (const each of [silent, ...lost]) {
      each.lose(SILENT);
    }
  }

  // --- notifications of connections --------------------------------------------------------------

  eventReceived(connection: ConnectionDriver, event: EventReceived): void {
    const isOther = this.extra.has(connection) || connection === this.#beside?.connection;
    if (isOther && (event.token === NO_TOKEN || event.name.startsWith("session."))) {
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
    this.extra.wake(requests);
  }

  connectionDraining(connection: ConnectionDriver, event: GoAwayReceived): void {
    this.#draining.add(connection);
    this.extra.discard(connection);
    if (connection !== this.current) {
      return;
    }
    this.#beside?.stop.abort(new ConnectionClosed("the server is going away", { clean: true }));
    this.#leave();
    if (!IDLE_REASONS.has(event.reason)) {
      this.#reconnect(connection);
    }
  }

  connectionEnded(connection: ConnectionDriver, error: ConnectionClosed): void {
    this.#options.onEnded(connection, error);
    this.#draining.delete(connection);
    this.extra.discard(connection);
    this.#ending.add(connection);
    void connection.closed.then(() => this.#ending.delete(connection));
    if (connection !== this.current) {
      return;
    }
    this.#beside?.stop.abort(error);
    this.#leave();
    this.#endpoints.lastError = error;
    this.#reconnect(connection);
  }

  /** Stop using the current connection. */
  #leave(): void {
    this.current = undefined;
    this.extra.wake(Number.POSITIVE_INFINITY);
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
    this.#closing.abort(new ConnectionClosed("this client is closed; connect again", { clean: true }));
    this.extra.close();
    await this.#connecting?.catch(() => undefined); // reported to its waiters
    await this.#besideEnded;
    await this.extra.connecting;
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

/** Return whether a silent connection counts as lost, because the main one answers or leads to another server. */
function answersInPlaceOf(main: ConnectionDriver, silent: ConnectionDriver): boolean {
  const isElsewhere = endpointText(main.endpoint) !== endpointText(silent.endpoint);
  return (isElsewhere && !main.isSilent) || main.hasAnsweredSince(silent);
}

/** An attempt that was stopped, or that no retry helps: the silent connection stays. */
function ignoreFailure(error: unknown): void {
  if (!(error instanceof ZcprotoError)) {
    throw error;
  }
}
