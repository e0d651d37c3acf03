/**
 * Checks salt, counter and timestamp of the frames of one direction (zcp1.md, section 7).
 *
 * Times are bigint, so no timestamp overflows their difference.
 */

export const MAX_CONSECUTIVE_STALE = 10;

export type Verdict = "fresh" | "stale" | "wrong_salt" | "counter_used";

export class Freshness {
  readonly salt: bigint;
  lastCounter: bigint;
  readonly #tolerance: bigint;

  constructor(salt: bigint, lastCounter: bigint, toleranceMs: number) {
    this.salt = salt;
    this.lastCounter = lastCounter;
    this.#tolerance = BigInt(toleranceMs);
  }

  /** Check the header of a frame. `now` is the server's time. The counter of a stale frame counts as used. */
  check(salt: bigint, counter: bigint, timestamp: bigint, now: bigint): Verdict {
    if (salt !== this.salt) {
      return "wrong_salt";
    }
    if (counter <= this.lastCounter) {
      return "counter_used";
    }
    this.lastCounter = counter;
    const age = now - timestamp;
    return age <= this.#tolerance && -age <= this.#tolerance ? "fresh" : "stale";
  }
}
