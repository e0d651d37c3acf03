/**
 * The client's connections: one for new calls, and older ones that finish what is in flight on them.
 *
 * What it decides: when to connect, and when again. After a loss it comes back by itself with growing, jittered delays;
 * after GOAWAY when the server said so; after a close for idleness when the next call needs it. It does not come back at
 * all once the session was taken from this client. All who wait for a connection wait for one attempt.
 */

import type { EventReceived, GoAwayReceived } from "../connection/events.js";
import { CannotConnect, ConnectionClosed, TlsError, type ZcprotoError } from "../errors.js";
import type { Backoff } from "./backoff.js";
import { type Clock, sleep, unlessAborted } from "./clock.js";
import type { Link, Owner } from "./link.js";
import { MAX_RETRY_AFTER_MS, mayPass } from "./retry.js";

/** The server's reasons to close what nobody used: coming back at once would only be closed again. */
const QUIET_REASONS: ReadonlySet<string> = new Set(["idle", "no_session"]);

export interface LinkKeeperOptions {
  readonly clock: Clock;
  readonly backoff: Backoff;
  readonly dial: (owner: Owner, signal: AbortSignal) => Promise<Link>;
  readonly onEvent: (event: EventReceived) => void;
  readonly onLink: (link: Link) => void;
  /** Whether to come back unasked. */
  readonly isWanted: () => boolean;
}

/** Keeps a connection to one server. */
export class LinkKeeper implements Owner {
  /** Takes new calls, if there is one. */
  link: Link | undefined;
  /** Why the last attempt failed. */
  lastError: ZcprotoError | undefined;
  readonly #options: LinkKeeperOptions;
  readonly #older = new Set<Link>();
  /** Nothing is asked on these any more, but TCP is still there. */
  readonly #leaving = new Set<Link>();
  readonly #closing = new AbortController();
  #connecting: Promise<void> | undefined;
  #notBefore = Number.NEGATIVE_INFINITY;
  #hadOne = false;

  constructor(options: LinkKeeperOptions) {
    this.#options = options;
  }

  /**
   * The connection for new calls; connects if there is none, and waits while that may still succeed.
   *
   * Rejects with what the very first attempt fails with, and later with what does not pass by waiting: TlsError,
   * CertificateError, ConnectionClosed.
   */
  async get(signal?: AbortSignal): Promise<Link> {
    while (this.link === undefined) {
      this.#closing.signal.throwIfAborted();
      await unlessAborted(this.#start(), signal);
    }
    return this.link;
  }

  #start(): Promise<void> {
    if (this.#connecting === undefined) {
      this.#connecting = this.#connect().finally(() => {
        this.#connecting = undefined;
      });
      this.#connecting.catch(() => undefined); // if nobody waited, the next call tries again and is told
    }
    return this.#connecting;
  }

  async #connect(): Promise<void> {
    const { clock, backoff, dial, onLink } = this.#options;
    const { signal } = this.#closing;
    for (;;) {
      const delay = this.#notBefore - clock.now();
      if (delay > 0) {
        await sleep(clock, delay, signal);
      }
      try {
        const link = await dial(this, signal);
        if (signal.aborted) {
          link.close("closed by this client");
          throw signal.reason;
        }
        if (link.draining) {
          throw new CannotConnect("the server is going away"); // said in the same breath as WELCOME
        }
        if (link.error !== undefined) {
          throw link.error;
        }
        this.#hadOne = true;
        this.link = link;
        onLink(link);
        return;
      } catch (error) {
        if (signal.aborted || !(error instanceof ConnectionClosed || error instanceof TlsError)) {
          throw error;
        }
        this.lastError = error;
        if (!this.#hadOne || (error instanceof TlsError && !mayPass(error.failure))) {
          throw error;
        }
        this.#wait(backoff.next());
      }
    }
  }

  #wait(delayMs: number): void {
    this.#notBefore = Math.max(this.#notBefore, this.#options.clock.now() + delayMs);
  }

  // --- what a connection tells ------------------------------------------------------------------

  eventReceived(_link: Link, event: EventReceived): void {
    // Later: whoever waits for an answer in the same read must be there first.
    setImmediate(() => this.#options.onEvent(event));
  }

  linkDraining(link: Link, event: GoAwayReceived): void {
    if (link === this.link) {
      this.link = undefined;
      this.#older.add(link);
    }
    if (QUIET_REASONS.has(event.reason)) {
      return;
    }
    const { backoff } = this.#options;
    if (link.answered) {
      backoff.reset();
    }
    this.#wait(backoff.next(Math.min(event.retryAfterMs, MAX_RETRY_AFTER_MS)));
    this.#comeBack();
  }

  linkLost(link: Link, error: ConnectionClosed): void {
    this.#older.delete(link);
    this.#leaving.add(link);
    void link.gone.then(() => this.#leaving.delete(link));
    if (link !== this.link) {
      return;
    }
    this.link = undefined;
    this.lastError = error;
    const { backoff } = this.#options;
    if (link.answered) {
      backoff.reset();
    }
    this.#wait(backoff.next());
    this.#comeBack();
  }

  #comeBack(): void {
    if (this.#hadOne && !this.#closing.signal.aborted && this.#options.isWanted()) {
      void this.#start();
    }
  }

  // --- the end ----------------------------------------------------------------------------------

  /**
   * Take leave of the server on all connections, and wait until none is left, those too that it had closed before. Each
   * ends within the time of a TLS close.
   */
  async close(): Promise<void> {
    this.#closing.abort(new ConnectionClosed("this client is closed", { clean: true }));
    await this.#connecting?.catch(() => undefined); // whoever waited was told
    const links = [...this.#older, ...(this.link === undefined ? [] : [this.link])];
    this.link = undefined;
    for (const link of links) {
      link.close("closed by this client");
    }
    await Promise.all([...this.#leaving].map((link) => link.gone));
  }

  /** Reset all connections, as a network would. */
  abort(): void {
    this.link?.abort();
    for (const link of this.#older) {
      link.abort();
    }
  }
}
