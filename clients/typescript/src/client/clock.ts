/** The only module that reads the time. All values are in milliseconds. */

export interface Timer {
  cancel(): void;
}

export interface Clock {
  /** Time since the Unix epoch. */
  wall(): number;
  /** Monotonic time. */
  now(): number;
  /** Call `then` once, after at least `ms`. */
  after(ms: number, then: () => void): Timer;
}

const MAX_TIMER_MS = 2 ** 31 - 1; // setTimeout fires at once for larger values

export const systemClock: Clock = {
  wall: () => Date.now(),
  now: () => performance.now(),
  after(ms, then) {
    const timeout = setTimeout(then, Math.min(Math.max(Math.ceil(ms), 0), MAX_TIMER_MS));
    return { cancel: () => clearTimeout(timeout) };
  },
};

/**
 * Wall time that advances with monotonic time from the client's start.
 *
 * Setting the clock of this machine does not change the timestamps of a running client. Each WELCOME corrects the offset
 * from the server's clock.
 */
export class MonotonicClock implements Clock {
  readonly #clock: Clock;
  readonly #startWall: number;
  readonly #startNow: number;

  constructor(clock: Clock) {
    this.#clock = clock;
    this.#startWall = clock.wall();
    this.#startNow = clock.now();
  }

  wall(): number {
    return this.#startWall + Math.floor(this.#clock.now() - this.#startNow);
  }

  now(): number {
    return this.#clock.now();
  }

  after(ms: number, then: () => void): Timer {
    return this.#clock.after(ms, then);
  }
}

/** Wait. Rejects with the signal's reason when it is aborted. */
export function sleep(clock: Clock, ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(signal.reason as Error);
      return;
    }
    const timer = clock.after(ms, () => {
      signal?.removeEventListener("abort", aborted);
      resolve();
    });
    const aborted = () => {
      timer.cancel();
      reject(signal?.reason as Error);
    };
    signal?.addEventListener("abort", aborted, { once: true });
  });
}

/** Await a shared promise. Rejects with the signal's reason when it is aborted, which does not affect other waiters. */
export function unlessAborted<T>(promise: Promise<T>, signal?: AbortSignal): Promise<T> {
  if (signal === undefined) {
    return promise;
  }
  return new Promise((resolve, reject) => {
    if (signal.aborted) {
      promise.catch(() => undefined); // handled by the other waiters
      reject(signal.reason as Error);
      return;
    }
    const aborted = () => reject(signal.reason as Error);
    signal.addEventListener("abort", aborted, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", aborted));
  });
}
