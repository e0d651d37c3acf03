/** The rate at which a client reads frames that answer no request. */

/** The rate in the long run. Each 2 KiB of body count as one more frame. */
export const UNREQUESTED_PER_S = 4_000;

/** The number of frames that are read without a pause. */
export const UNREQUESTED_BURST = 8_000;

const FRAME_BYTES = 2_048;

/** A leaky bucket: it is filled by frames, and drains with time. Times are monotonic, in milliseconds. */
export class FloodLimit {
  #level = 0;
  #at = 0;

  count(bodySize: number, now: number): void {
    const left = this.#level - ((now - this.#at) * UNREQUESTED_PER_S) / 1000;
    this.#level = Math.max(left, 0) + 1 + bodySize / FRAME_BYTES;
    this.#at = now;
  }

  /** Return the time for which to stop reading; 0 below the limit. */
  delay(now: number): number {
    const excess = this.#level - UNREQUESTED_BURST;
    return excess <= 0 ? 0 : (excess * 1000) / UNREQUESTED_PER_S - (now - this.#at);
  }
}
