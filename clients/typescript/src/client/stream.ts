/**
 * A stream: items as they come, then a result.
 *
 * Decides: when an item is taken, and so when the server may send more; when an item of the application is taken; that leaving
 * early cancels the stream, or leaves the run of a durable one; and when the position of that is reported.
 * Must not know: when connections are made, and which errors are retried.
 */

import { Cancelled, ConfigError, DeadlineExceeded } from "../errors.js";
import type { Credit, Params, Resume } from "../wire/message.js";
import type { Clock, Timer } from "./clock.js";
import type { PendingStream } from "./connection_driver.js";
import { Deadline } from "./deadline.js";

/** Items and bytes that the server may send ahead. */
export const DEFAULT_WINDOW: Credit = [64, 262_144];

const FOREVER = Number.POSITIVE_INFINITY;

/** At the latest so long after an item was taken the server learns it (zcp1.md, section 20.3). */
const REPORT_MS = 1_000;

/** The same with a file of positions, to which the position is written first. */
const KEEP_MS = 50;

/** How long the first OPEN of a run is repeated: half of the time for which a server keeps the id of an old one. */
const REPEATED_MS = 300_000;

/** An attachment that has lasted so long counts as progress. */
const STABLE_MS = 5_000;

/** How long to wait for the answer to a CANCEL. */
const CANCEL_MS = 10_000;

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
  /**
   * Whether the stream outlives its connection: it is resumed where it stopped, on any connection, and each item comes once. Leaving
   * it early does not cancel the method; `cancel` does.
   */
  readonly durable?: boolean | undefined;
  /** The `traceparent` of W3C Trace Context. */
  readonly traceparent?: string | undefined;
}

/** Which run to go on with. */
export interface ResumeOptions extends Omit<StreamOptions, "items" | "reopen" | "durable"> {
  /** The method of the run. Without it the server is asked. */
  readonly method?: string | undefined;
  /** How many items not to send again; that of the file of positions by default, or 0. */
  readonly after?: number | undefined;
}

/** Positions of durable streams that outlive the client. */
export interface Positions {
  /** Return the position that was kept for a stream; 0 for another one. */
  position(id: string): number;
  /** Write a position. Resolves with false if the disk fails. */
  keep(id: string, position: number): Promise<boolean>;
}

/** Where a durable stream is. */
export class RunPosition {
  #openedAt: number | undefined;
  #acceptedAt: number | undefined; // of the present attachment

  /** `position` counts the items that the application has received. `isKnown`: the run has begun, and is only attached to. */
  constructor(
    readonly id: string,
    public position = 0,
    public isKnown = false,
  ) {}

  /** Return what the next OPEN asks for. */
  resume(now: number): Resume {
    this.#openedAt ??= now;
    this.#acceptedAt = undefined;
    return { id: this.id, from: this.position };
  }

  /** Return whether OPEN may be sent again. */
  mayOpen(now: number): boolean {
    return this.isKnown || this.#openedAt === undefined || now < this.#openedAt + REPEATED_MS;
  }

  /** Record that the attachment was accepted. */
  accepted(now: number): void {
    this.#acceptedAt ??= now;
    this.isKnown = true;
  }

  /** Return what the attachment has achieved, apart from its items. */
  progress(now: number): Progress {
    if (this.#acceptedAt === undefined) {
      return "none";
    }
    return now >= this.#acceptedAt + STABLE_MS ? "items" : "accepted";
  }
}

/** What an attempt has achieved: nothing, a valid session, or items, after which delays start again. */
export type Progress = "none" | "accepted" | "items";

/** Waits until the application has taken all items. Rejects with the error of the attempt if there must be no other one. */
export type WaitToReopen = (error: Error) => Promise<Progress>;

/** What a stream asks for. */
export interface StreamRequest {
  readonly method: string;
  /** Return the params of the next attempt. */
  readonly params: () => Params | null;
  /** Wait until the stream can be opened again after an interruption; undefined if it never can, once it has begun. */
  readonly reopening: WaitToReopen | undefined;
  /** The run of a durable stream. */
  readonly run: RunPosition | undefined;
  readonly window: Credit;
  /** Whether the application has items to send. */
  readonly hasItems: boolean;
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
  /** Cancel a run. Resolves with whether it was running. */
  cancelRun(id: string): Promise<boolean>;
  readonly positions: Positions | undefined;
}

/**
 * A stream of one method, made by `client.stream`. It is opened by its first use.
 *
 * Iterate it once; break out of the loop, or call `close`, to cancel it, or to leave a durable one. Its errors are those of `client.call`; items that have
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
  readonly #run: RunPosition | undefined;
  #taken = 0; // items of a durable stream that the application has processed
  #report: Timer | undefined;
  #isReporting = false;

  /** @internal */
  constructor(
    runner: StreamRunner,
    method: string,
    params: Params | null,
    options: StreamOptions<Item>,
    run?: RunPosition,
  ) {
    const { window = DEFAULT_WINDOW, timeoutMs = FOREVER, traceparent } = options;
    const signals = [this.#leaving.signal, ...(options.signal === undefined ? [] : [options.signal])];
    const signal = AbortSignal.any(signals);
    const deadline = new Deadline(runner.clock, timeoutMs, signal);
    this.#runner = runner;
    const { items, reopen } = options;
    if (items !== undefined && reopen !== undefined) {
      throw new ConfigError(["reopen: a stream that sends items cannot be opened again; leave out items or reopen"]);
    }
    if (!isWindow(window)) {
      throw new ConfigError([`window: give [items, bytes], both above 0, such as [${DEFAULT_WINDOW.join(", ")}]`]);
    }
    if (run !== undefined && (items !== undefined || reopen !== undefined)) {
      throw new ConfigError([
        "durable: a durable stream sends no items and resumes by itself; leave out items and reopen",
      ]);
    }
    this.#run = run;
    this.#taken = run?.position ?? 0;
    this.#options = options;
    const nextParams = () => (this.#last === undefined ? params : { ...params, ...reopen?.(this.#last.item) });
    this.#request = {
      method,
      params: run === undefined ? nextParams : () => (run.isKnown ? null : (params ?? {})),
      reopening: reopen === undefined && run === undefined ? undefined : (error) => this.#drained(error),
      run,
      window,
      hasItems: items !== undefined,
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

  /** The id of a durable stream, for `client.resume`. */
  get id(): string | undefined {
    return this.#run?.id;
  }

  /** How many items of a durable stream were received, for `client.resume`. */
  get position(): number | undefined {
    return this.#run?.position;
  }

  /** Cancel the stream, or leave a durable one, unless it has ended. Idempotent. */
  close(): void {
    void this.#close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#close();
  }

  async #close(): Promise<void> {
    this.#leave(new Cancelled("the stream was closed"));
    await this.#keep();
  }

  /** Cancel the method of a durable stream. Resolves with whether it was running, and rejects like `client.call`. */
  async cancel(): Promise<boolean> {
    const { id } = this.#run ?? {};
    if (id === undefined) {
      throw new Error("close a stream that is not durable to cancel it");
    }
    const pending = this.#pending;
    if (pending !== undefined && !pending.isDone) {
      pending.connection.cancelStream(pending);
      const error = await this.#errorOf(pending);
      if (error instanceof Cancelled && error.details["reason"] === "caller") {
        return true;
      }
    }
    return this.#runner.cancelRun(id); // nothing is attached, or the run has ended
  }

  /** Return the error of an attachment; undefined after another answer, and without one in time. */
  async #errorOf({ response }: PendingStream): Promise<unknown> {
    let timer: Timer | undefined;
    const late = new Promise((resolve) => {
      timer = this.#runner.clock.after(CANCEL_MS, () => resolve(undefined));
    });
    const failed = response.then(
      () => undefined,
      (error: unknown) => error,
    );
    const error = await Promise.race([failed, late]);
    timer?.cancel();
    return error;
  }

  #leave(reason: unknown): void {
    this.#report?.cancel();
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
    this.#taken = this.#run?.position ?? 0;
    const until = this.#runner.clock.now() + (this.#options.itemTimeoutMs ?? FOREVER);
    for (;;) {
      this.#noteAccepted();
      if (this.#pending?.hasItem === true) {
        this.#runner.touchSession();
        const item = this.#pending.takeItem() as Item;
        if (this.#run !== undefined) {
          this.#run.position += 1;
        } else if (this.#options.reopen !== undefined) {
          this.#last = { item };
        }
        if (this.#request.reopening !== undefined) {
          this.#hasProgressed = true;
          this.#wake();
        }
        return { value: item, done: false };
      }
      if (this.#isOver) {
        await outcome;
        this.#report?.cancel();
        await this.#keep();
        return { value: undefined, done: true };
      }
      await this.#changed(until);
    }
  }

  async #drained(error: Error): Promise<Progress> {
    while (this.#pending?.hasItem === true && !this.#leaving.signal.aborted) {
      await this.#changed();
    }
    const run = this.#run;
    const now = this.#runner.clock.now();
    if (run !== undefined && this.#pending?.items.isAccepted === true) {
      run.accepted(now);
    }
    if (run?.mayOpen(now) === false) {
      throw error;
    }
    const progress = this.#hasProgressed ? "items" : (run?.progress(now) ?? "none");
    this.#hasProgressed = false;
    return progress;
  }

  async return(): Promise<IteratorResult<Item, undefined>> {
    await this.#close();
    return { value: undefined, done: true };
  }

  // --- the position of a durable stream ------------------------------------------------------------

  /** Record ACCEPTED, and report in time which items were processed. */
  #noteAccepted(): void {
    const items = this.#pending?.items;
    if (this.#run === undefined || items?.isAccepted !== true) {
      return;
    }
    this.#run.accepted(this.#runner.clock.now());
    if (this.#taken > Math.max(items.taken, 0)) {
      if (this.#runner.positions === undefined) {
        items.taken = this.#taken; // the next CREDIT reports it
      }
      this.#reportIn(this.#runner.positions === undefined ? REPORT_MS : KEEP_MS);
    }
  }

  #reportIn(ms: number): void {
    if (!this.#isReporting && !this.#leaving.signal.aborted) {
      this.#isReporting = true;
      this.#report = this.#runner.clock.after(ms, () => void this.#sendReport());
    }
  }

  async #sendReport(): Promise<void> {
    const taken = this.#taken;
    const isKept = await this.#keep();
    this.#isReporting = false;
    if (!isKept) {
      this.#reportIn(REPORT_MS);
      return;
    }
    const pending = this.#pending;
    if (pending?.items.isAccepted === true && !pending.isDone) {
      pending.items.taken = Math.max(pending.items.taken, taken);
      pending.sendTaken();
    }
    if (this.#taken > taken) {
      this.#reportIn(this.#runner.positions === undefined ? REPORT_MS : KEEP_MS);
    }
  }

  /** Write the position to the file, if there is one. Resolves with false if that fails. */
  #keep(): Promise<boolean> {
    const { positions } = this.#runner;
    const { id } = this.#run ?? {};
    return positions === undefined || id === undefined ? Promise.resolve(true) : positions.keep(id, this.#taken);
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
    if (this.#options.items !== undefined || this.#request.reopening !== undefined || this.#hasEndedItems) {
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

function isWindow(window: unknown): boolean {
  return Array.isArray(window) && window.length === 2 && window.every((part) => Number.isSafeInteger(part) && part > 0);
}
