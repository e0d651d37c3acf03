/**
 * Salt, counter and timestamp of the frames of one direction (the contract's section 5).
 *
 * The difference of two times is taken in whole numbers of any size, so no timestamp overflows it.
 */

export const MAX_STALE_IN_A_ROW = 10;

export type Verdict = "fresh" | "stale" | "other_salt" | "counter_used";

export class Freshness {
  readonly salt: bigint;
  lastCounter: bigint;
  readonly #tolerance: bigint;

  constructor(salt: bigint, lastCounter: bigint, toleranceMs: number) {
    this.salt = salt;
    this.lastCounter = lastCounter;
    this.#tolerance = BigInt(toleranceMs);
  }

  /** Judge a frame by what its header says. `now` is the server's time. The counter of a stale frame counts as used. */
  judge(salt: bigint, counter: bigint, timestamp: bigint, now: bigint): Verdict {
    if (salt !== this.salt) {
      return "other_salt";
    }
    if (counter <= this.lastCounter) {
      return "counter_used";
    }
    this.lastCounter = counter;
    const off = now - timestamp;
    return off <= this.#tolerance && -off <= this.#tolerance ? "fresh" : "stale";
  }
}
