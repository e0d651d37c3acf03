/**
 * Keeps a session in use that only waits for calls of the server.
 *
 * Decides: when to show it again, before its idle timeout, and when to renew it, after it has expired.
 * Must not know: how that is done.
 */

import { ZcprotoError } from "../errors.js";
import type { Clock, Timer } from "./clock.js";
import type { ClientSession } from "./session.js";

/** Minimum interval between two steps. */
const MIN_INTERVAL_MS = 1_000;

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
      this.#timer = clock.after(Math.max(left / 2, MIN_INTERVAL_MS), () => this.#check(kept));
    }
  }

  stop(): void {
    this.#timer?.cancel();
  }

  #check({ usableUntil, idleTimeoutMs }: ClientSession): void {
    const { clock, show, renew } = this.#options;
    const left = usableUntil - clock.now();
    if (left <= 0) {
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
