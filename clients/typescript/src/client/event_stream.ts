/** Server events, queued for the application. */

import { decodeEvent } from "../wire/message.js";

export const MAX_EVENTS = 1_000;
export const MAX_EVENT_BYTES = 4_194_304;

/** One event. */
export interface ServerEvent {
  readonly name: string;
  readonly data: unknown;
}

/**
 * Events in order, as an async iterator that ends when the client is closed.
 *
 * At most 1,000 of together 4 MiB are queued, or one larger event; beyond that the oldest are dropped and counted in
 * `dropped`. Events are decoded when they are read: decoded data can take many times the memory.
 */
export class EventStream implements AsyncIterableIterator<ServerEvent> {
  dropped = 0;
  #bodies: Buffer[] = [];
  #size = 0;
  #waiters: ((result: IteratorResult<ServerEvent, undefined>) => void)[] = [];
  #isClosed = false;

  /** Add the body of an EVENT. @internal */
  put(body: Buffer): void {
    const waiter = this.#waiters.shift();
    if (waiter !== undefined) {
      waiter({ value: decodeEvent(body), done: false });
      return;
    }
    this.#size += body.length;
    while (this.#bodies.length >= MAX_EVENTS || (this.#size > MAX_EVENT_BYTES && this.#bodies.length > 0)) {
      this.#take();
      this.dropped += 1;
    }
    this.#bodies.push(Buffer.from(body)); // a copy: the original is part of a larger read
  }

  #take(): Buffer | undefined {
    const body = this.#bodies.shift();
    this.#size -= body?.length ?? 0;
    return body;
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
    const body = this.#take();
    if (body !== undefined) {
      return Promise.resolve({ value: decodeEvent(body), done: false });
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
