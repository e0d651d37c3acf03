/**
 * Keeps a session in use that only waits for calls of the server.
 *
 * Decides: when to show it again, before its idle timeout, and when to renew it, after it has expired; if that fails, with
 * growing delays.
 * Must not know: how that is done.
 */

import { ZcprotoError } from "../errors.js";
import type { Clock, Timer } from "./clock.js";
import type { ClientSession } from "./session.js";

/** Minimum interval between two steps. */
const MIN_INTERVAL_MS = 1_000;
/** Maximum interval between two attempts to renew the session. */
const MAX_INTERVAL_MS = 30_000;

export interface SessionKeeperOptions {
  readonly clock: Clock;
  /** The session to keep, if any. */
  readonly session: () => ClientSession | undefined;
  readonly show: () => Promise<void>;
  readonly renew: () => void;
}

export class SessionKeeper {
  readonly #options: SessionKeeperOptions;
  #timer: Timer | undefined;
  #interval = MIN_INTERVAL_MS;

  constructor(options: SessionKeeperOptions) {
    this.#options = options;
  }

  /** Begin, or continue with another session. */
  start(): void {
    const { clock, session } = this.#options;
    this.stop();
    const kept = session();
    if (kept !== undefined) {
      const left = kept.usableUntil - clock.now();
      if (left > 0) {
        this.#interval = MIN_INTERVAL_MS;
      }
      this.#timer = clock.after(Math.max(left / 2, this.#interval), () => this.#check(kept));
    }
  }

  stop(): void {
    this.#timer?.cancel();
  }

  #check({ usableUntil, idleTimeoutMs }: ClientSession): void {
    const { clock, show, renew } = this.#options;
    const left = usableUntil - clock.now();
    if (left <= 0) {
      this.#interval = Math.min(this.#interval * 2, MAX_INTERVAL_MS);
      renew();
    } else if (left < idleTimeoutMs / 2) {
      void show()
        .catch(ignoreFailure)
        .then(() => this.start());
    } else {
      this.start(); // it was used meanwhile
    }
  }
}

/** Without a connection there is nothing to show: the next one shows the session. */
function ignoreFailure(error: unknown): void {
  if (!(error instanceof ZcprotoError)) {
    throw error;
  }
}
