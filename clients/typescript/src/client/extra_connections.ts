/**
 * Extra connections to the server of the main one, for requests that it has no room for (zcp1.md, section 11.3).
 *
 * Decides: when one is made and closed, and which request gets the next room.
 * Must not know: sessions, except that `onOpened` shows them.
 */

import type { Endpoint } from "./address.js";
import type { Backoff } from "./backoff.js";
import type { Clock, Timer } from "./clock.js";
import type { ConnectionDriver } from "./connection_driver.js";
import { WaitingQueue } from "./waiting_queue.js";

export const IDLE_AFTER_MS = 30_000;

export interface ExtraConnectionsOptions {
  readonly clock: Clock;
  readonly backoff: Backoff;
  /** The most connections beside the main one. */
  readonly max: number;
  readonly dial: (endpoint: Endpoint) => Promise<ConnectionDriver>;
  /** Shows the sessions on a new connection. */
  readonly onOpened: (connection: ConnectionDriver) => Promise<void>;
}

export class ExtraConnections {
  /** The attempt under way. */
  connecting: Promise<void> | undefined;
  readonly #options: ExtraConnectionsOptions;
  /** The one on which the sessions are being shown. */
  #opened: ConnectionDriver | undefined;
  /** When each connection was used last. */
  readonly #usedAt = new Map<ConnectionDriver, number>();
  /** Callers that were given a connection, and have not sent their request. */
  readonly #assigned = new WeakMap<ConnectionDriver, number>();
  readonly #waiting = new WaitingQueue();
  #notBefore = Number.NEGATIVE_INFINITY;
  #idleTimer: Timer | undefined;
  #isClosed = false;

  constructor(options: ExtraConnectionsOptions) {
    this.#options = options;
  }

  has(connection: ConnectionDriver): boolean {
    return this.all.includes(connection);
  }

  /** All connections, with the one on which the sessions are being shown. */
  get all(): ConnectionDriver[] {
    return [...this.#usedAt.keys(), ...(this.#opened === undefined ? [] : [this.#opened])];
  }

  /** Return a connection that has room for a request, or the main one if it takes no more. Rejects with the signal's reason. */
  async waitReady(main: ConnectionDriver, signal?: AbortSignal): Promise<ConnectionDriver> {
    let wasWoken = false;
    for (;;) {
      if (main.draining || main.error !== undefined) {
        return main;
      }
      const connections = [main, ...this.#usedAt.keys()];
      const free = connections.find((connection) => this.#roomOf(connection) > 0);
      if (free !== undefined) {
        if (free !== main) {
          this.#usedAt.set(free, this.#options.clock.now());
        }
        this.#assign(free);
        return free;
      }
      if (connections.every(({ freeStreams }) => freeStreams <= 0)) {
        this.#grow(main.endpoint);
      }
      await this.#waiting.wait(wasWoken, signal);
      wasWoken = true;
    }
  }

  /** Return how many more callers a connection has room for. */
  #roomOf(connection: ConnectionDriver): number {
    return connection.ready ? connection.freeStreams - (this.#assigned.get(connection) ?? 0) : 0;
  }

  /** Keep room for a caller, which sends its request in this tick. */
  #assign(connection: ConnectionDriver): void {
    this.#assigned.set(connection, (this.#assigned.get(connection) ?? 0) + 1);
    setImmediate(() => {
      this.#assigned.set(connection, (this.#assigned.get(connection) ?? 1) - 1);
      this.wake(this.#roomOf(connection)); // there can be more than when this caller was woken
    });
  }

  /** Wake the next callers, for so many of which there is room. */
  wake(requests: number): void {
    this.#waiting.wake(requests);
  }

  // --- opening and closing -----------------------------------------------------------------------

  /** Make another connection, unless that is under way, has failed lately, or there are too many. */
  #grow(endpoint: Endpoint): void {
    const { clock, max } = this.#options;
    const isAllowed = !this.#isClosed && this.#usedAt.size < max && clock.now() >= this.#notBefore;
    if (this.connecting === undefined && isAllowed) {
      this.connecting = this.#connect(endpoint).finally(() => {
        this.connecting = undefined;
        if (!this.#waiting.isEmpty) {
          this.#grow(endpoint);
        }
      });
    }
  }

  async #connect(endpoint: Endpoint): Promise<void> {
    const { clock, backoff, dial, onOpened } = this.#options;
    let connection: ConnectionDriver;
    try {
      connection = await dial(endpoint);
    } catch {
      this.#notBefore = clock.now() + backoff.next(); // whatever it is, the main connection goes on
      return;
    }
    if (this.#isClosed) {
      connection.close("closed by this client");
      return;
    }
    this.#opened = connection;
    await onOpened(connection);
    this.#opened = undefined;
    if (connection.draining || connection.error !== undefined) {
      this.#notBefore = clock.now() + backoff.next(connection.retryAfterMs);
      return;
    }
    this.#usedAt.set(connection, clock.now());
    this.#closeLater();
    this.wake(connection.freeStreams);
  }

  #closeLater(): void {
    this.#idleTimer ??= this.#options.clock.after(IDLE_AFTER_MS, () => this.#closeIdle());
  }

  /** Close the connections that were not used lately. */
  #closeIdle(): void {
    this.#idleTimer = undefined;
    const { clock, backoff } = this.#options;
    const idleSince = clock.now() - IDLE_AFTER_MS;
    for (const [connection, usedAt] of [...this.#usedAt]) {
      if (usedAt <= idleSince && connection.isIdle) {
        this.#usedAt.delete(connection);
        backoff.reset();
        connection.close("no calls for an extra connection");
      }
    }
    if (this.#usedAt.size > 0) {
      this.#closeLater();
    }
  }

  /** Stop using a connection: it was lost, or the server goes away. */
  discard(connection: ConnectionDriver): void {
    if (this.#usedAt.delete(connection)) {
      const { clock, backoff } = this.#options;
      this.#notBefore = clock.now() + backoff.next(connection.retryAfterMs);
    }
  }

  /** Make no more connections. The caller closes those that are open. */
  close(): void {
    this.#isClosed = true;
    this.#idleTimer?.cancel();
  }
}
