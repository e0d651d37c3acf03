/** How long a caller waits: until a deadline, or until its AbortSignal says that it is not interested any more. */

import { DeadlineExceeded, type ZcprotoError } from "../errors.js";
import type { Clock } from "./clock.js";

export class Patience {
  /** In the clock's `now`; infinite for none. */
  readonly deadline: number;
  readonly signal: AbortSignal | undefined;
  readonly #clock: Clock;

  constructor(clock: Clock, timeoutMs: number, signal: AbortSignal | undefined) {
    this.#clock = clock;
    this.deadline = clock.now() + timeoutMs;
    this.signal = signal;
  }

  /** Throws if there is no patience left. */
  check(): void {
    this.signal?.throwIfAborted();
    if (this.#clock.now() >= this.deadline) {
      throw new DeadlineExceeded("no answer within the call's timeout");
    }
  }

  /** Whether a wait of so many milliseconds would be too long. */
  isOverIn(ms: number): boolean {
    return this.#clock.now() + ms >= this.deadline;
  }

  /** Milliseconds for `deadline_ms`, or undefined without a deadline. */
  leftMs(): number | undefined {
    return this.deadline === Number.POSITIVE_INFINITY
      ? undefined
      : Math.min(Math.ceil(this.deadline - this.#clock.now()), Number.MAX_SAFE_INTEGER);
  }

  /**
   * Do something that heeds a signal, for as long as the patience lasts. Rejects with DeadlineExceeded beyond the
   * deadline; `lastError` tells then what has stood in the way.
   */
  async during<T>(
    step: (signal: AbortSignal | undefined) => Promise<T>,
    lastError?: () => ZcprotoError | undefined,
  ): Promise<T> {
    if (this.deadline === Number.POSITIVE_INFINITY) {
      return step(this.signal);
    }
    const controller = new AbortController();
    const timer = this.#clock.after(this.deadline - this.#clock.now(), () => {
      const cause = lastError?.();
      const reason = cause === undefined ? "no answer" : `no connection (${cause.message})`;
      controller.abort(new DeadlineExceeded(`${reason} within the call's timeout`, {}, { cause }));
    });
    const signals = [controller.signal, ...(this.signal === undefined ? [] : [this.signal])];
    try {
      return await step(AbortSignal.any(signals));
    } finally {
      timer.cancel();
    }
  }
}
