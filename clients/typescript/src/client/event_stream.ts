/** What the server says without being asked, for the application to read. */

export const MAX_EVENTS = 1_000;

/** One event: its name, and whatever data comes with it. */
export interface ServerEvent {
  readonly name: string;
  readonly data: unknown;
}

/**
 * Events in their order, as an async iterator that ends when the client is closed.
 *
 * At most 1,000 wait to be read; then the oldest make room, and `dropped` counts them.
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

  /** Nothing more comes; what waits can still be read. @internal */
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
