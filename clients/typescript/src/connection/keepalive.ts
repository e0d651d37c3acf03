/**
 * When a client sends a PING, and when it considers the server as unreachable. Times are monotonic, in milliseconds.
 *
 * It checks the connection at intervals of a third of the server's idle timeout. A PING is due if nothing was sent or nothing
 * was received since the last check, so that no silence lasts two thirds of it.
 */

/** Milliseconds without a frame after a PING, after which the server counts as unreachable. */
export const PONG_TIMEOUT_MS = 10_000;

/** Lower bound, so that a server with a tiny idle timeout is not flooded with PINGs. */
export const MIN_KEEPALIVE_INTERVAL_MS = 250;

export class Keepalive {
  /** Whether anything was sent since the last check, apart from its PING. */
  sentSinceCheck = false;
  #lastReceived = 0;
  #interval = Number.POSITIVE_INFINITY;
  #checkAt = Number.POSITIVE_INFINITY;
  #pongDeadline = Number.POSITIVE_INFINITY;

  /** Begin with WELCOME; an idle timeout of 0 needs no checks. */
  start(idleTimeoutMs: number, now: number): void {
    this.#lastReceived = now;
    if (idleTimeoutMs > 0) {
      this.#interval = Math.max(idleTimeoutMs / 3, MIN_KEEPALIVE_INTERVAL_MS);
      this.#checkAt = now + this.#interval;
    }
  }

  received(now: number): void {
    this.#lastReceived = now;
  }

  pongReceived(): void {
    this.#pongDeadline = Number.POSITIVE_INFINITY;
  }

  /** When to call `check`, or Infinity. */
  get deadline(): number {
    return Math.min(this.#checkAt, this.#pongDeadline);
  }

  /** Return what is due: a PING, or the end of the connection. */
  check(now: number): "ping" | "unreachable" | undefined {
    if (this.#pongDeadline <= now) {
      if (this.#lastReceived <= this.#pongDeadline - PONG_TIMEOUT_MS) {
        return "unreachable";
      }
      this.#pongDeadline = Number.POSITIVE_INFINITY; // other bytes were received since
    }
    if (this.#checkAt > now) {
      return undefined;
    }
    const isActive = this.sentSinceCheck && this.#lastReceived > this.#checkAt - this.#interval;
    this.sentSinceCheck = false;
    this.#checkAt = now + this.#interval;
    if (isActive) {
      return undefined;
    }
    this.#pongDeadline = Math.min(this.#pongDeadline, now + PONG_TIMEOUT_MS);
    return "ping";
  }
}
