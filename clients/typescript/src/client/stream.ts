/**
 * A stream: items as they come, then a result.
 *
 * Decides: when an item is taken, and so when the server may send more; when an item of the application is taken; and that
 * leaving early cancels the stream.
 * Must not know: when connections are made, and which errors are retried.
 */

import { Cancelled, ConfigError, DeadlineExceeded } from "../errors.js";
import type { Credit, Params } from "../wire/message.js";
import type { Clock } from "./clock.js";
import type { PendingStream } from "./connection_driver.js";
import { Deadline } from "./deadline.js";

/** Items and bytes that the server may send ahead. */
export const DEFAULT_WINDOW: Credit = [64, 262_144];

const FOREVER = Number.POSITIVE_INFINITY;

export interface StreamOptions<Item = unknown> {
  /** How many items and bytes the server may send ahead of the application: [64, 262144] by default. */
  readonly window?: Credit | undefined;
  /** Timeout of the whole stream in milliseconds. None by default. */
  readonly timeoutMs?: number | undefined;
  /** Timeout of the wait for one item in milliseconds. None by default. */
  readonly itemTimeoutMs?: number | undefined;
  /** Cancels the stream: it rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
  /** Items for the server. Each is taken only when the server wants it. */
  readonly items?: AsyncIterable<unknown> | Iterable<unknown> | undefined;
  /**
   * Opens the stream again if its connection has interrupted it. It gets the last item and returns the params to replace, such as
   * `{ after: last.id }`. Without it, a stream that may have begun is never opened again.
   */
  readonly reopen?: ((last: Item) => Params) | undefined;
  /** The `traceparent` of W3C Trace Context. */
  readonly traceparent?: string | undefined;
}

/** Waits until the application has taken all items. Resolves with whether it has taken any since the last attempt. */
export type Resume = () => Promise<boolean>;

/** What a stream asks for. */
export interface StreamRequest {
  readonly method: string;
  /** Return the params of the next attempt. */
  readonly params: () => Params | null;
  /** Wait until the stream can be opened again after an interruption; undefined if it never can, once it has begun. */
  readonly resume: Resume | undefined;
  readonly window: Credit;
  readonly deadline: Deadline;
  readonly signal: AbortSignal;
  readonly traceparent: string | undefined;
}

/** The client, as its streams use it. */
export interface StreamRunner {
  readonly clock: Clock;
  /**
   * Run a stream until its response, and call `opened` for each attempt: it is opened again only while the server has
   * certainly not begun it.
   */
  run(request: StreamRequest, opened: (pending: PendingStream) => void): Promise<unknown>;
  /** Record that the session is in use. */
  touchSession(): void;
}

/**
 * A stream of one method, made by `client.stream`. It is opened by its first use.
 *
 * Iterate it once; break out of the loop, or call `close`, to cancel it. Its errors are those of `client.call`; items that have
 * arrived are returned before an error.
 */
export class Stream<Item = unknown, Result = unknown>
  implements AsyncIterableIterator<Item, undefined>, AsyncDisposable
{
  readonly #runner: StreamRunner;
  readonly #request: StreamRequest;
  readonly #options: StreamOptions<Item>;
  readonly #leaving = new AbortController();
  #pending: PendingStream | undefined;
  #outcome: Promise<unknown> | undefined;
  #stopTaking: () => void = () => undefined; // stops waiting for an item of the source
  #last: { readonly item: Item } | undefined; // with `reopen`
  #hasProgressed = false; // since the last attempt
  #isOver = false;
  #isTaking = false;
  #hasEndedItems = false;
  #sending: Promise<void> = Promise.resolve();
  #waiters: (() => void)[] = [];

  /** @internal */
  constructor(runner: StreamRunner, method: string, params: Params | null, options: StreamOptions<Item>) {
    const { window = DEFAULT_WINDOW, timeoutMs = FOREVER, traceparent } = options;
    const signals = [this.#leaving.signal, ...(options.signal === undefined ? [] : [options.signal])];
    const signal = AbortSignal.any(signals);
    const deadline = new Deadline(runner.clock, timeoutMs, signal);
    this.#runner = runner;
    const { items, reopen } = options;
    if (items !== undefined && reopen !== undefined) {
      throw new ConfigError(["reopen: a stream that sends items cannot be opened again; leave out items or reopen"]);
    }
    this.#options = options;
    this.#request = {
      method,
      params: () => (this.#last === undefined ? params : { ...params, ...reopen?.(this.#last.item) }),
      resume: reopen === undefined ? undefined : () => this.#drained(),
      window,
      deadline,
      signal,
      traceparent,
    };
  }

  /**
   * The result of the method, once the stream has ended; it rejects with the error of the stream. Items are not taken for it: a
   * stream with items must be iterated as well.
   */
  get result(): Promise<Result> {
    return this.#start() as Promise<Result>;
  }

  /** Whether the server is going away: the stream continues for a while, but open the next one on another connection. */
  get draining(): boolean {
    return this.#pending?.connection.draining ?? false;
  }

  /** Cancel the stream unless it has ended. Idempotent. */
  close(): void {
    this.#leave(new Cancelled("the stream was closed"));
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.close();
    return Promise.resolve();
  }

  #leave(reason: unknown): void {
    this.#leaving.abort(reason);
    this.#wake();
  }

  #start(): Promise<unknown> {
    if (this.#outcome === undefined) {
      const opened = (pending: PendingStream) => {
        this.#pending = pending;
        pending.onChange = () => this.#wake();
        if (this.#hasEndedItems) {
          pending.endItems();
        }
      };
      this.#outcome = this.#runner.run(this.#request, opened);
      const over = () => {
        this.#isOver = true;
        this.#wake();
        this.#stopTaking();
      };
      this.#outcome.then(over, over); // errors are reported by `next` and `result`
      if (this.#options.items !== undefined) {
        void this.#sendAll(this.#options.items);
      }
    }
    return this.#outcome;
  }

  #wake(): void {
    const waiters = this.#waiters;
    this.#waiters = [];
    for (const wake of waiters) {
      wake();
    }
  }

  /** Wait until something changes. Rejects with DeadlineExceeded at a time of the clock. */
  #changed(until = FOREVER): Promise<void> {
    const { clock } = this.#runner;
    return new Promise((resolve, reject) => {
      const timer =
        until === FOREVER
          ? undefined
          : clock.after(until - clock.now(), () => {
              this.#waiters = this.#waiters.filter((waiter) => waiter !== wake);
              reject(new DeadlineExceeded("no item within itemTimeoutMs"));
            });
      const wake = () => {
        timer?.cancel();
        resolve();
      };
      this.#waiters.push(wake);
    });
  }

  // --- items of the server -----------------------------------------------------------------------

  [Symbol.asyncIterator](): this {
    return this;
  }

  async next(): Promise<IteratorResult<Item, undefined>> {
    if (this.#isTaking) {
      throw new Error("another caller is waiting for an item of this stream");
    }
    this.#isTaking = true;
    try {
      return await this.#next();
    } catch (error) {
      this.#leave(error);
      throw error;
    } finally {
      this.#isTaking = false;
    }
  }

  async #next(): Promise<IteratorResult<Item, undefined>> {
    if (this.#leaving.signal.aborted) {
      return { value: undefined, done: true };
    }
    const outcome = this.#start();
    const until = this.#runner.clock.now() + (this.#options.itemTimeoutMs ?? FOREVER);
    for (;;) {
      if (this.#pending?.hasItem === true) {
        this.#runner.touchSession();
        const item = this.#pending.takeItem() as Item;
        if (this.#options.reopen !== undefined) {
          this.#last = { item };
          this.#hasProgressed = true;
          this.#wake();
        }
        return { value: item, done: false };
      }
      if (this.#isOver) {
        await outcome;
        return { value: undefined, done: true };
      }
      await this.#changed(until);
    }
  }

  async #drained(): Promise<boolean> {
    while (this.#pending?.hasItem === true && !this.#leaving.signal.aborted) {
      await this.#changed();
    }
    const hasProgressed = this.#hasProgressed;
    this.#hasProgressed = false;
    return hasProgressed;
  }

  return(): Promise<IteratorResult<Item, undefined>> {
    this.close();
    return Promise.resolve({ value: undefined, done: true });
  }

  // --- items of the application ------------------------------------------------------------------

  /**
   * Send an item, once the server wants it. Rejects with InvalidArgument for a value that cannot be sent, and with the error of
   * the stream, or Cancelled, if it ends before.
   */
  send(item: unknown): Promise<void> {
    return this.#inTurn(async () => {
      const pending = await this.#credited();
      if (pending === undefined) {
        await this.#outcome;
        throw new Cancelled("the server has ended the stream");
      }
      pending.sendItem(item);
    });
  }

  /** Send no more items. The server's items and its result can still be received. */
  end(): Promise<void> {
    return this.#inTurn(() => {
      this.#endItems();
      return Promise.resolve();
    });
  }

  #endItems(): void {
    this.#hasEndedItems = true;
    this.#pending?.endItems();
  }

  /** Run steps one after the other. */
  #inTurn(step: () => Promise<void>): Promise<void> {
    const { items, reopen } = this.#options;
    if (items !== undefined || reopen !== undefined || this.#hasEndedItems) {
      return Promise.reject(new Error("no more items can be sent on this stream"));
    }
    void this.#start();
    const done = this.#sending.then(step);
    this.#sending = done.catch(() => undefined); // reported to its caller
    return done;
  }

  /** Wait until an item can be sent. Return undefined after the end. */
  async #credited(): Promise<PendingStream | undefined> {
    while (!this.#isOver && !this.#leaving.signal.aborted) {
      if (this.#pending?.maySend === true) {
        return this.#pending;
      }
      await this.#changed();
    }
    return undefined;
  }

  /** Send the items of a source. If it fails, cancel the stream with its error; if the stream ends before, close it. */
  async #sendAll(source: AsyncIterable<unknown> | Iterable<unknown>): Promise<void> {
    const iterator = Symbol.asyncIterator in source ? source[Symbol.asyncIterator]() : source[Symbol.iterator]();
    try {
      for (let pending = await this.#credited(); pending !== undefined; pending = await this.#credited()) {
        const next = await this.#nextOf(iterator);
        if (next === undefined) {
          break;
        }
        if (next.done === true) {
          this.#endItems();
          return;
        }
        pending.sendItem(next.value);
      }
      await iterator.return?.();
    } catch (error) {
      this.#leave(error);
    }
  }

  /**
   * Take the next item of a source; undefined if the stream ends before.
   *
   * `Promise.race` with the end of the stream would keep every item: a promise holds what waits for it until it settles.
   */
  #nextOf(iterator: AsyncIterator<unknown> | Iterator<unknown>): Promise<IteratorResult<unknown> | undefined> {
    return new Promise((resolve, reject) => {
      this.#stopTaking = () => resolve(undefined);
      if (this.#isOver) {
        this.#stopTaking();
        return;
      }
      Promise.resolve(iterator.next()).then(resolve, reject);
    });
  }
}
