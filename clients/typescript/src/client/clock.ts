/** Time as the client reads it, and the only place where it does. Milliseconds everywhere. */

export interface Timer {
  cancel(): void;
}

export interface Clock {
  /** Since the Unix epoch, by this machine's clock. */
  wall(): number;
  /** Monotonic. */
  now(): number;
  /** Call `then` once, `ms` from now at the earliest. */
  after(ms: number, then: () => void): Timer;
}

const MAX_TIMER_MS = 2 ** 31 - 1; // beyond it setTimeout fires at once

export const systemClock: Clock = {
  wall: () => Date.now(),
  now: () => performance.now(),
  after(ms, then) {
    const timeout = setTimeout(then, Math.min(Math.max(Math.ceil(ms), 0), MAX_TIMER_MS));
    return { cancel: () => clearTimeout(timeout) };
  },
};

/**
 * The wall time at the client's start, carried on by monotonic time.
 *
 * When somebody sets this machine's clock, the timestamps of a client that runs on do not jump with it. What it is off
 * the server's clock is taken from each WELCOME.
 */
export class SteadyClock implements Clock {
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

/** Wait; rejects with the signal's reason when that is aborted. */
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

/** Wait for what others wait for too; whoever's signal is aborted leaves alone, with its reason. */
export function unlessAborted<T>(promise: Promise<T>, signal?: AbortSignal): Promise<T> {
  if (signal === undefined) {
    return promise;
  }
  return new Promise((resolve, reject) => {
    if (signal.aborted) {
      promise.catch(() => undefined); // it is told to the others
      reject(signal.reason as Error);
      return;
    }
    const aborted = () => reject(signal.reason as Error);
    signal.addEventListener("abort", aborted, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", aborted));
  });
}
