/** Exponential backoff with full jitter. */

export const FIRST_DELAY_MS = 100;
export const MAX_DELAY_MS = 30_000;

/** A random number in [0, 1). */
export type Random = () => number;

/**
 * Random delays between 0 and a ceiling of 100 ms that doubles up to 30 s.
 *
 * Full jitter spreads the reconnects after an outage evenly, however many clients there are.
 */
export class Backoff {
  readonly #random: Random;
  #ceiling = FIRST_DELAY_MS;

  constructor(random: Random) {
    this.#random = random;
  }

  /** Return the next delay, which is added to the delay that the server requested. */
  next(retryAfterMs = 0): number {
    const delay = retryAfterMs + this.#random() * this.#ceiling;
    this.#ceiling = Math.min(this.#ceiling * 2, MAX_DELAY_MS);
    return delay;
  }

  /** Start again from 100 ms, after a success. */
  reset(): void {
    this.#ceiling = FIRST_DELAY_MS;
  }
}
