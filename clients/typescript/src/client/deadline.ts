/** The limits of a call: its deadline and its AbortSignal. */

import { ConnectionClosed, DeadlineExceeded, TlsError, type ZcprotoError } from "../errors.js";
import type { Clock } from "./clock.js";

export const TIMED_OUT = "no response within the call's timeout; give it a longer timeoutMs";

/** What a server answers that notices it first. */
export const TOO_LATE = "the deadline has passed";

export class Deadline {
  /** In the clock's `now`; infinite without a timeout. */
  readonly at: number;
  readonly signal: AbortSignal | undefined;
  readonly #clock: Clock;

  constructor(clock: Clock, timeoutMs: number, signal: AbortSignal | undefined) {
    this.#clock = clock;
    this.at = clock.now() + timeoutMs;
    this.signal = signal;
  }

  /** Throws if the deadline has passed or the signal is aborted. */
  check(): void {
    this.signal?.throwIfAborted();
    if (this.#clock.now() >= this.at) {
      throw new DeadlineExceeded(TIMED_OUT);
    }
  }

  /** Return whether the deadline passes within `ms`. */
  expiresWithin(ms: number): boolean {
    return this.#clock.now() + ms >= this.at;
  }

  /** Return the value of `deadline_ms`, or undefined without a timeout. */
  remainingMs(): number | undefined {
    return this.at === Number.POSITIVE_INFINITY
      ? undefined
      : Math.min(Math.ceil(this.at - this.#clock.now()), Number.MAX_SAFE_INTEGER);
  }

  /**
   * Run a step that honours a signal, until the deadline. Then it rejects with DeadlineExceeded, whose message includes
   * `lastError`.
   */
  async run<T>(
    step: (signal: AbortSignal | undefined) => Promise<T>,
    lastError?: () => ZcprotoError | undefined,
  ): Promise<T> {
    if (this.at === Number.POSITIVE_INFINITY) {
      return step(this.signal);
    }
    const controller = new AbortController();
    const timer = this.#clock.after(this.at - this.#clock.now(), () => {
      const cause = lastError?.();
      const missing = cause instanceof ConnectionClosed || cause instanceof TlsError ? "no connection" : "no session";
      const reason = cause === undefined ? "no response" : `${missing} (${cause.message})`;
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
