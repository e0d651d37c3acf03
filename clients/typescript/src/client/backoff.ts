/** How long to wait before trying again: exponential backoff with full jitter. */

export const FIRST_DELAY_MS = 100;
export const MAX_DELAY_MS = 30_000;

/** A number from 0 up to, but not including, 1. */
export type Random = () => number;

/**
 * Delays, each random between 0 and a ceiling: 100 ms, doubling to at most 30 s.
 *
 * Full jitter spreads the clients of a server that went down evenly, however many come back at once.
 */
export class Backoff {
  readonly #random: Random;
  #ceiling = FIRST_DELAY_MS;

  constructor(random: Random) {
    this.#random = random;
  }

  /** The next delay. What the server asked for is waited in full before it. */
  next(retryAfterMs = 0): number {
    const delay = retryAfterMs + this.#random() * this.#ceiling;
    this.#ceiling = Math.min(this.#ceiling * 2, MAX_DELAY_MS);
    return delay;
  }

  /** After a success: begin with 100 ms again. */
  reset(): void {
    this.#ceiling = FIRST_DELAY_MS;
  }
}
