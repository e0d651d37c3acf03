/**
 * The client: calls over one connection at a time, as often as it takes to get an answer or a clear error.
 *
 * What it decides: after each error of a call, whether it is sent again, by the table of the contract's section 7
 * (`retry.ts`). Connections are the business of `links.ts`, the session is that of `sessions.ts`.
 */

import type { EventReceived } from "../connection/events.js";
import type { Welcome } from "../connection/welcome.js";
import { CallError, Code, ConnectionClosed, InvalidArgument, type ZcprotoError } from "../errors.js";
import { NO_TOKEN, type Token } from "../wire/frame.js";
import type { Meta, Params } from "../wire/message.js";
import { type Address, addressText } from "./address.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep } from "./clock.js";
import { EventStream, type ServerEvent } from "./event_stream.js";
import type { Link, Owner } from "./link.js";
import { LinkKeeper } from "./links.js";
import { Patience } from "./patience.js";
import { retryAfterMs, SESSION_IS_OVER, type Then, whatNext } from "./retry.js";
import type { ClientSession, Credentials } from "./session.js";
import { SessionKeeper } from "./sessions.js";

/** For a call, from the first attempt to the last. */
export const DEFAULT_TIMEOUT_MS = 30_000;

export interface CallOptions {
  /** Milliseconds for everything, waiting for a connection and sending again too; Infinity waits for ever. */
  readonly timeoutMs?: number | undefined;
  /** The caller is not interested any more: the call rejects with the signal's reason, and the server is told. */
  readonly signal?: AbortSignal | undefined;
  /** At most 64 characters: the call is sent again also when its answer was lost, as the server runs it once. */
  readonly idempotencyKey?: string | undefined;
  /** W3C Trace Context. */
  readonly traceparent?: string | undefined;
}

/** What `connect` makes of its options. */
export interface ClientSettings {
  readonly address: Address;
  readonly dial: (owner: Owner, signal: AbortSignal) => Promise<Link>;
  readonly credentials: Credentials | undefined;
  readonly opensSession: boolean;
  readonly timeoutMs: number;
  readonly client: string;
  readonly onEvent: ((event: ServerEvent) => void) | undefined;
  readonly clock: Clock;
  readonly random: Random;
}

/**
 * A client of one server; make it with `connect`. Calls may run at once, as many as you like; they share one connection.
 */
export class Client implements AsyncDisposable {
  readonly address: string;
  /** What the server says without being asked, unless `onEvent` takes it. */
  readonly events = new EventStream();
  readonly #settings: ClientSettings;
  readonly #clock: Clock;
  readonly #links: LinkKeeper;
  readonly #sessions: SessionKeeper;
  #closing: Promise<void> | undefined;

  /** @internal */
  constructor(settings: ClientSettings) {
    const { address, clock, random, dial, credentials, client } = settings;
    this.address = addressText(address);
    this.#settings = settings;
    this.#clock = clock;
    this.#links = new LinkKeeper({
      clock,
      backoff: new Backoff(random),
      dial,
      onEvent: (event) => this.#eventReceived(event),
      onLink: (link) => this.#sessions.show(link),
      isWanted: () => !this.#sessions.isOver,
    });
    this.#sessions = new SessionKeeper({
      clock,
      random,
      getLink: (signal) => this.#links.get(signal),
      credentials,
      client,
    });
  }

  /** Connect, and open a session if there is something to open one with. Rejects at the first attempt. @internal */
  async open(): Promise<void> {
    try {
      if (this.#settings.opensSession) {
        this.#sessions.want();
      }
      await this.#links.get(); // which takes the time for connecting at most
      await this.#readyDuring(this.#patience());
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  /** End the session and the connection. Calls that still wait get ConnectionClosed. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    try {
      await this.#sessions.close(this.#links.link);
    } finally {
      await this.#links.close();
      this.events.close();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  // --- what there is to know --------------------------------------------------------------------

  /** The session, if one is open. */
  get session(): ClientSession | undefined {
    return this.#sessions.session;
  }

  /** What the server last said in its WELCOME; undefined while there is no connection. */
  get welcome(): Welcome | undefined {
    return this.#links.link?.welcome;
  }

  /**
   * Open a session unless one is alive: the way on after TOKEN_REVOKED, SESSION_REPLACED and UNAUTHENTICATED.
   *
   * Rejects with Unauthenticated if the client has nothing to open one with, else as `call`.
   */
  async openSession(): Promise<ClientSession> {
    this.#sessions.want();
    await this.#readyDuring(this.#patience());
    return this.#sessions.session as ClientSession;
  }

  /** Reset the connection without a word, as a network would: for tests. The client comes back by itself. */
  cut(): void {
    this.#links.abort();
  }

  // --- calls ------------------------------------------------------------------------------------

  /**
   * Call a method of the server; resolves to its result.
   *
   * Rejects with CallError for the server's answer, DeadlineExceeded for the timeout, ConnectionClosed if the connection
   * was lost and the call may have run, CannotConnect or TlsError if there is no way to the server.
   */
  async call<Result = unknown>(method: string, params: Params | null = {}, options: CallOptions = {}): Promise<Result> {
    const patience = this.#patience(options);
    const sessions = this.#sessions;
    let attempt: Attempt | undefined;
    for (;;) {
      let { link } = this.#links;
      if (link?.ready !== true || this.#clock.now() >= sessions.goodUntil || this.#closing !== undefined) {
        link = await this.#readyDuring(patience);
      }
      try {
        patience.check();
      } catch (error) {
        link.passOn();
        throw error;
      }
      const { token } = sessions;
      sessions.used(this.#clock.now());
      try {
        const call = link.request(method, params, token, metaOf(options, patience.leftMs()), patience.deadline);
        return (await (options.signal === undefined ? call.answer : abortable(call, options.signal))) as Result;
      } catch (error) {
        attempt ??= { backoff: new Backoff(this.#settings.random), done: new Set() };
        await this.#afterFailure(error, { attempt, link, token, patience, options });
      }
    }
  }

  #patience({ timeoutMs = this.#settings.timeoutMs, signal }: CallOptions = {}): Patience {
    return new Patience(this.#clock, timeoutMs, signal);
  }

  /** Settles when a call that failed may be sent again; rejects with its error if it may not. */
  async #afterFailure(error: unknown, failed: Failed): Promise<void> {
    const { link, attempt, options } = failed;
    options.signal?.throwIfAborted();
    if (error instanceof CallError) {
      await this.#afterAnswer(error, failed);
    } else if (
      error instanceof ConnectionClosed &&
      this.#closing === undefined &&
      (link.unansweredNotRun || options.idempotencyKey !== undefined)
    ) {
      // A call that brings its server down must not do so as fast as connections are made.
      await this.#wait(attempt.backoff.next(), error, failed);
    } else {
      throw error;
    }
  }

  async #afterAnswer(error: CallError, failed: Failed): Promise<void> {
    const { attempt, token, link, patience } = failed;
    const sessions = this.#sessions;
    const then = whatNext(error);
    const isFirst = !attempt.done.has(then);
    if (then === "later") {
      await this.#wait(attempt.backoff.next(retryAfterMs(error.details)), error, failed);
    } else if (then === "at_once" && isFirst) {
      attempt.done.add(then);
    } else if (then === "attach" && token !== NO_TOKEN && isFirst) {
      attempt.done.add(then);
      await this.#attach(error, failed);
    } else if (then === "reopen" && token !== NO_TOKEN && isFirst && sessions.reopen(token)) {
      attempt.done.add(then);
    } else if (then === "renew" && token !== NO_TOKEN && isFirst) {
      attempt.done.add(then);
      sessions.expired(token);
    } else if (SESSION_IS_OVER.has(error.code) && token !== NO_TOKEN) {
      if (token !== sessions.token && !sessions.isOver && isFirst) {
        attempt.done.add(then); // the token of a session before this one
        return;
      }
      sessions.ended(token, error);
      throw error;
    } else if (error instanceof InvalidArgument && isTooLarge(error, link) && !attempt.done.has("at_once")) {
      attempt.done.add("at_once");
      await this.#showToken(error, token, patience);
    } else {
      if (error.code === Code.UNAUTHENTICATED && token !== NO_TOKEN) {
        sessions.unknown(token);
      }
      throw error;
    }
  }

  async #attach(error: CallError, failed: Failed): Promise<void> {
    const { attempt, link, token, patience } = failed;
    let hasDevice: boolean;
    try {
      hasDevice = await patience.during((signal) => this.#sessions.attach(link, token, signal));
    } catch (refused) {
      if (!(refused instanceof CallError) || refused.code === Code.DEADLINE_EXCEEDED) {
        throw refused;
      }
      if (whatNext(refused) === "later") {
        attempt.done.delete("attach"); // it did not come to that after all
      }
      await this.#afterAnswer(refused, failed);
      return;
    }
    if (!hasDevice) {
      throw error;
    }
  }

  /** Wait before a call is sent again. Rejects with its error now if that would be too late. */
  async #wait(delayMs: number, error: ZcprotoError, { patience }: Failed): Promise<void> {
    if (patience.isOverIn(delayMs)) {
      throw error;
    }
    await sleep(this.#clock, delayMs, patience.signal);
  }

  /** A request is too large for a connection without a session: show the token by a small one first. */
  async #showToken(error: CallError, token: Token, patience: Patience): Promise<void> {
    if (token === NO_TOKEN) {
      throw error;
    }
    const timeoutMs = patience.leftMs() ?? Number.POSITIVE_INFINITY;
    await this.call("session.info", null, { timeoutMs, signal: patience.signal });
  }

  /** A connection that takes a request now, with its session if one is wanted. */
  #readyDuring(patience: Patience): Promise<Link> {
    const lastError = () => (this.#links.link === undefined ? this.#links.lastError : undefined);
    return patience.during((signal) => this.#ready(signal), lastError);
  }

  async #ready(signal: AbortSignal | undefined): Promise<Link> {
    for (;;) {
      if (this.#closing !== undefined) {
        throw new ConnectionClosed("this client is closed", { clean: true });
      }
      await this.#sessions.makeGood(signal);
      const link = await this.#links.get(signal);
      await link.waitReady(signal);
      if (link.ready && this.#clock.now() < this.#sessions.goodUntil) {
        return link;
      }
    }
  }

  #eventReceived(event: EventReceived): void {
    this.#sessions.eventReceived(event, this.#links.link);
    const seen = { name: event.name, data: event.data };
    if (this.#settings.onEvent === undefined) {
      this.events.put(seen);
    } else {
      this.#settings.onEvent(seen);
    }
  }
}

/** What a call has tried already. Made at its first error: most calls have none. */
interface Attempt {
  readonly backoff: Backoff;
  readonly done: Set<Then>;
}

interface Failed {
  readonly attempt: Attempt;
  readonly link: Link;
  readonly token: Token;
  readonly patience: Patience;
  readonly options: CallOptions;
}

function isTooLarge(error: InvalidArgument, link: Link): boolean {
  return "size" in error.details && !link.hasSession;
}

function metaOf({ idempotencyKey, traceparent }: CallOptions, deadlineMs: number | undefined): Meta | undefined {
  if (idempotencyKey === undefined && traceparent === undefined) {
    return deadlineMs === undefined ? undefined : { deadline_ms: deadlineMs };
  }
  return {
    ...(deadlineMs === undefined ? {} : { deadline_ms: deadlineMs }),
    ...(idempotencyKey === undefined ? {} : { idempotency_key: idempotencyKey }),
    ...(traceparent === undefined ? {} : { traceparent }),
  };
}

/** The answer of a call, unless its signal is aborted before: then the server is told, and the reason is thrown. */
async function abortable(call: ReturnType<Link["request"]>, signal: AbortSignal): Promise<unknown> {
  const aborted = () => call.link.abandon(call, signal.reason as Error);
  signal.addEventListener("abort", aborted, { once: true });
  try {
    return await call.answer;
  } finally {
    signal.removeEventListener("abort", aborted);
  }
}
