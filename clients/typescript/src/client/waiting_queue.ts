/**
 * Callers that wait for their turn, first come, first served.
 *
 * Rules: a caller that was woken, and finds that another one was faster in this tick, keeps its place in the queue. A turn
 * is not lost: if a caller that was woken leaves because its signal is aborted, the next one is woken instead.
 * Must not know: what the callers wait for.
 */
export class WaitingQueue {
  #waiting: (() => void)[] = [];

  get isEmpty(): boolean {
    return this.#waiting.length === 0;
  }

  /** Wait to be woken. `wasWoken` is whether this caller was woken before. Rejects with the signal's reason. */
  wait(wasWoken: boolean, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) {
        if (wasWoken) {
          this.wake(1);
        }
        reject(signal.reason as Error);
        return;
      }
      const wake = () => {
        signal?.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        this.#waiting = this.#waiting.filter((waiter) => waiter !== wake);
        reject(signal?.reason as Error);
      };
      signal?.addEventListener("abort", leave, { once: true });
      if (wasWoken) {
        this.#waiting.unshift(wake);
      } else {
        this.#waiting.push(wake);
      }
    });
  }

  /** Wake the next callers, at most `count` of them. Return how many were woken. */
  wake(count: number): number {
    const woken = this.#waiting.splice(0, Math.max(0, count));
    for (const wake of woken) {
      wake();
    }
    return woken.length;
  }
}
