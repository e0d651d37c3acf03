/** Server events, queued for the application. */

export const MAX_EVENTS = 1_000;

/** One event. */
export interface ServerEvent {
  readonly name: string;
  readonly data: unknown;
}

/**
 * Events in order, as an async iterator that ends when the client is closed.
 *
 * At most 1,000 are queued; beyond that the oldest are dropped and counted in `dropped`.
 */
export class EventStream implements AsyncIterableIterator<ServerEvent> {
  dropped = 0;
  #events: ServerEvent[] = [];
  #waiters: ((result: IteratorResult<ServerEvent, undefined>) => void)[] = [];
  #isClosed = false;

  /** @internal */
  put(event: ServerEvent): void {
    const waiter = this.#waiters.shift();
    if (waiter !== undefined) {
      waiter({ value: event, done: false });
      return;
    }
    if (this.#events.length >= MAX_EVENTS) {
      this.#events.shift();
      this.dropped += 1;
    }
    this.#events.push(event);
  }

  /** End the stream. Queued events can still be read. @internal */
  close(): void {
    this.#isClosed = true;
    const waiters = this.#waiters;
    this.#waiters = [];
    for (const waiter of waiters) {
      waiter({ value: undefined, done: true });
    }
  }

  next(): Promise<IteratorResult<ServerEvent, undefined>> {
    const event = this.#events.shift();
    if (event !== undefined) {
      return Promise.resolve({ value: event, done: false });
    }
    if (this.#isClosed) {
      return Promise.resolve({ value: undefined, done: true });
    }
    return new Promise((resolve) => this.#waiters.push(resolve));
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}
