/**
 * Checks salt, counter and timestamp of the frames of one direction (zcp1.md, section 7).
 *
 * Times are bigint, so no timestamp overflows their difference.
 */

import { Code } from "../errors.js";
import { phraseOf } from "../wire/body.js";
import { type Frame, Kind } from "../wire/frame.js";
import { decodeError } from "../wire/message.js";

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

/** Return whether a stale frame is an ERROR STALE_TIMESTAMP, which is processed all the same. */
export function correctsClock({ kind, body }: Frame, maxDepth: number): boolean {
  try {
    return kind === Kind.ERROR && decodeError(body, maxDepth).code === Code.STALE_TIMESTAMP;
  } catch (error) {
    phraseOf(error);
    return false; // dropped like any other stale frame
  }
}
