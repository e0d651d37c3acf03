/**
 * Calls, streams and handlers of one user, over the connection that the sessions of a client share.
 *
 * Decides: whether a call or a stream is retried after an error, by the table of zcp1.md, section 11.1 (`retry.ts`).
 * Must not know: when connections are made (`connection_manager.ts`) and sessions opened (`session_manager.ts`).
 */

import type { CallReceived, EventReceived } from "../connection/events.js";
import { CallError, Code, ConnectionClosed, InvalidArgument, NotFound, type ZcprotoError } from "../errors.js";
import { NO_TOKEN, type Token } from "../wire/frame.js";
import type { Meta, Params } from "../wire/message.js";
import { type Clock, sleep, unlessAborted } from "./clock.js";
import type { ConnectionDriver, PendingCall, PendingStream } from "./connection_driver.js";
import { Deadline } from "./deadline.js";
import { EventStream } from "./event_stream.js";
import { callBack, Handlers } from "./handlers.js";
import { Attempt, isInterruption, retryAction, retryAfterMs, SESSION_ENDED_CODES } from "./retry.js";
import type { ClientSession, Credentials } from "./session.js";
import { SessionManager } from "./session_manager.js";
import type { ConnectedSession, SharedConnection } from "./shared_connection.js";
import {
  type ResumeOptions,
  RunPosition,
  Stream,
  type StreamOptions,
  type StreamRequest,
  type StreamRunner,
  type WaitToReopen,
} from "./stream.js";
import type { ClientSettings, Handler, OutgoingCall } from "./types.js";

/** Timeout of a call, including all retries. */
export const DEFAULT_TIMEOUT_MS = 30_000;

export interface CallOptions {
  /** Timeout in milliseconds, including waiting for a connection and retries; Infinity for none. */
  readonly timeoutMs?: number | undefined;
  /** Aborts the call: it rejects with the signal's reason and is cancelled on the server. */
  readonly signal?: AbortSignal | undefined;
  /** At most 64 characters. The call is retried even if its response was lost; the server runs it once. */
  readonly idempotencyKey?: string | undefined;
  /** The `traceparent` of W3C Trace Context. */
  readonly traceparent?: string | undefined;
}

/** A durable stream as the server describes it; there may be more keys. */
export interface DurableStream {
  readonly id: string;
  readonly method: string;
  readonly state: "running" | "ended";
  /** The first position that is kept, and that after the last one. */
  readonly first: number;
  readonly next: number;
  /** When it began, in milliseconds since the Unix epoch. */
  readonly since: number;
  readonly attached: boolean;
  /** The session that has opened it, and the address of that. */
  readonly session: string;
  readonly address: string;
}

/**
 * One user of a client, made by `client.sessionFor`. Any number of calls and streams can run concurrently; they share the
 * connection of the client.
 */
export class UserClient implements AsyncDisposable {
  /** Events of the session, unless `onEvent` is given. */
  readonly events = new EventStream();
  protected closing: Promise<void> | undefined;
  readonly #settings: ClientSettings;
  readonly #clock: Clock;
  readonly #shared: SharedConnection;
  readonly #sessions: SessionManager;
  readonly #handlers: Handlers;
  readonly #self: ConnectedSession;

  /** @internal */
  constructor(settings: ClientSettings, credentials: Credentials | undefined, shared: SharedConnection) {
    const { clock, random, client, maxCalls, onWarning, tracing } = settings;
    this.#settings = settings;
    this.#clock = clock;
    this.#shared = shared;
    this.#handlers = new Handlers(maxCalls, onWarning, tracing);
    this.#sessions = new SessionManager({
      clock,
      random,
      getConnection: (signal) => shared.manager.get(signal),
      waitReady: (signal) => shared.manager.waitReady(signal),
      connections: () => shared.manager.all,
      credentials,
      client,
      handlers: this.#handlers,
    });
    this.#self = this.#connectedSession();
    shared.add(this.#self);
  }

  #connectedSession(): ConnectedSession {
    const sessions = this.#sessions;
    const handlers = this.#handlers;
    return {
      get hasEnded() {
        return sessions.hasEnded;
      },
      ownsToken: (token) => sessions.ownsToken(token),
      present: (connection) => sessions.presentToken(connection),
      showBeside: (connection) => sessions.showBeside(connection),
      eventReceived: (event) => this.#eventReceived(event),
      callReceived: (connection, event) => this.#callReceived(connection, event),
      callWithdrawn: (connection, number) => handlers.withdraw(connection, number),
      connectionEnded: (connection, error) => handlers.abort(error, connection),
      close: () => this.close(),
    };
  }

  /** Open the session, if there is one to open. @internal */
  async open(): Promise<void> {
    try {
      if (this.#settings.opensSession) {
        this.#sessions.requireSession();
      }
      await this.#waitReady(this.#deadlineOf());
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  /** Close the session. Pending calls get ConnectionClosed, and handlers are aborted. */
  close(): Promise<void> {
    this.closing ??= this.closeNow();
    return this.closing;
  }

  protected async closeNow(): Promise<void> {
    try {
      await this.#sessions.close(this.#shared.manager.current);
    } finally {
      this.#handlers.abort(new ConnectionClosed("this session is closed", { clean: true }));
      this.#shared.remove(this.#self);
      this.events.close();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** The open session, if any. */
  get session(): ClientSession | undefined {
    return this.#sessions.session;
  }

  /**
   * Open a session unless there is a valid one, for example after TOKEN_REVOKED, SESSION_REPLACED or UNAUTHENTICATED.
   *
   * Rejects with Unauthenticated without credentials, otherwise like `call`.
   */
  async openSession(): Promise<ClientSession> {
    this.#sessions.requireSession();
    await this.#waitReady(this.#deadlineOf());
    return this.#sessions.session as ClientSession;
  }

  // --- calls -------------------------------------------------------------------------------------

  /**
   * Call a method of the server and return its result.
   *
   * Rejects with CallError for an error of the server, DeadlineExceeded for the timeout, ConnectionClosed if the connection
   * was lost and the call may have run, and CannotConnect or TlsError if connecting fails.
   */
  call<Result = unknown>(method: string, params: Params | null = {}, options: CallOptions = {}): Promise<Result> {
    const { tracing } = this.#settings;
    if (tracing === undefined) {
      return this.#call(method, params, options) as Promise<Result>;
    }
    return tracing.call(
      this.#outgoing(method, options.traceparent, false),
      (traceparent) => this.#call(method, params, { ...options, traceparent }) as Promise<Result>,
    );
  }

  #outgoing(method: string, traceparent: string | undefined, isStream: boolean): OutgoingCall {
    return { method, traceparent, endpoint: this.#shared.manager.current?.endpoint, isStream };
  }

  #call(method: string, params: Params | null, options: CallOptions): Promise<unknown> {
    const deadline = this.#deadlineOf(options);
    const { signal, idempotencyKey } = options;
    const send = (connection: ConnectionDriver, token: Token) => {
      const call = connection.request(method, params, token, metaOf(options, deadline.remainingMs()), deadline.at);
      return signal === undefined ? call.response : abortable(call, signal);
    };
    return this.#run({ send, deadline, isIdempotent: idempotencyKey !== undefined });
  }

  /** Send a call until it gets a response or a definite error. */
  async #run(call: RetriedCall): Promise<unknown> {
    const { deadline } = call;
    let attempt: Attempt | undefined;
    for (;;) {
      const connection = this.#readyConnection() ?? (await this.#waitReady(deadline));
      const token = this.#begin(connection, deadline);
      try {
        return await call.send(connection, token);
      } catch (error) {
        attempt ??= new Attempt(this.#settings.random);
        await this.#afterFailure(error, { call, attempt, connection, token });
      }
    }
  }

  /** Return the connection if a call can be sent at once. */
  #readyConnection(): ConnectionDriver | undefined {
    const connection = this.#shared.manager.current;
    const isReady =
      connection?.ready === true &&
      this.#clock.now() < this.#sessions.usableUntil &&
      this.closing === undefined &&
      this.#sessions.preparing(connection) === undefined;
    return isReady ? connection : undefined;
  }

  /** Return the token for a call that is sent now. Throws if its deadline has passed. */
  #begin(connection: ConnectionDriver, deadline: Deadline): Token {
    try {
      deadline.check();
    } catch (error) {
      connection.releaseTurn();
      throw error;
    }
    const { token } = this.#sessions;
    this.#sessions.touch(this.#clock.now());
    return token;
  }

  #deadlineOf(options: CallOptions = {}): Deadline {
    const { timeoutMs = this.#settings.timeoutMs, signal } = options;
    if (typeof timeoutMs !== "number" || "timeout" in options) {
      throw new TypeError("give timeoutMs, a number of milliseconds");
    }
    return new Deadline(this.#clock, timeoutMs, signal);
  }

  /** Wait until a failed call can be retried. Rejects with its error if it must not be. */
  async #afterFailure(error: unknown, failed: FailedCall): Promise<void> {
    const { call, connection, attempt } = failed;
    call.deadline.signal?.throwIfAborted();
    if (
      call.reopening !== undefined &&
      isInterruption(error, call.wasLost?.() === true) &&
      this.closing === undefined
    ) {
      const progress = await call.reopening(error);
      if (progress === "items") {
        attempt.reset();
      } else if (progress === "accepted") {
        attempt.accepted();
      }
      await this.#wait(attempt.delayMs(askedBy(error, connection)), error, failed);
      return;
    }
    if (call.hasBegun?.() === true) {
      throw error;
    }
    if (error instanceof CallError) {
      await this.#afterCallError(error, failed);
    } else if (
      error instanceof ConnectionClosed &&
      this.closing === undefined &&
      (connection.unansweredDidNotRun || call.isIdempotent)
    ) {
      // Back off: the call itself may be what crashes the server.
      await this.#wait(attempt.delayMs(), error, failed);
    } else {
      throw error;
    }
  }

  async #afterCallError(error: CallError, failed: FailedCall): Promise<void> {
    const { attempt, token, connection, call } = failed;
    const sessions = this.#sessions;
    switch (attempt.afterError(error, sessions.shown(token), sessions.canOpen)) {
      case "later":
        await this.#wait(attempt.delayMs(askedBy(error, connection)), error, failed);
        return;
      case "at_once":
      case "catch_up":
        return;
      case "attach":
        await this.#attach(error, failed);
        return;
      case "renew":
        sessions.markExpired(token);
        return;
      case "replace":
        sessions.markLost(token);
        return;
      case "reopen":
        if (sessions.reopen(token)) {
          return;
        }
        break;
      case "report":
        break;
    }
    if (error instanceof InvalidArgument && isTooLarge(error, connection) && attempt.once("at_once")) {
      await this.#presentTokenFirst(error, token, call.deadline);
      return;
    }
    if (token !== NO_TOKEN && SESSION_ENDED_CODES.has(error.code)) {
      sessions.markEnded(token, error);
    } else if (token !== NO_TOKEN && error.code === Code.UNAUTHENTICATED) {
      sessions.markRefused(token);
    }
    throw error;
  }

  async #attach(error: CallError, failed: FailedCall): Promise<void> {
    const { attempt, connection, token, call } = failed;
    let hasDevice: boolean;
    try {
      hasDevice = await call.deadline.run((signal) => this.#sessions.attach(connection, token, signal));
    } catch (refusal) {
      if (!(refusal instanceof CallError) || refusal.code === Code.DEADLINE_EXCEEDED) {
        throw refusal;
      }
      if (retryAction(refusal) === "later") {
        attempt.undo("attach"); // the session was not attached
      }
      await this.#afterCallError(refusal, failed);
      return;
    }
    if (!hasDevice) {
      throw error;
    }
  }

  /** Wait before a retry. Rejects with the error at once if the deadline would pass. */
  async #wait(delayMs: number, error: ZcprotoError, { call: { deadline } }: FailedCall): Promise<void> {
    if (deadline.expiresWithin(delayMs)) {
      throw error;
    }
    await sleep(this.#clock, delayMs, deadline.signal);
  }

  /** Present the token by a small request, after one that is too large for a connection without a session. */
  async #presentTokenFirst(error: CallError, token: Token, deadline: Deadline): Promise<void> {
    if (token === NO_TOKEN) {
      throw error;
    }
    const timeoutMs = deadline.remainingMs() ?? Number.POSITIVE_INFINITY;
    await this.call("session.info", null, { timeoutMs, signal: deadline.signal });
  }

  /** Return a connection that is ready for a request, with a session if one is required. */
  #waitReady(deadline: Deadline): Promise<ConnectionDriver> {
    const { manager } = this.#shared;
    const lastError = () => (manager.current === undefined ? manager.lastError : this.#sessions.renewalProblem);
    return deadline.run((signal) => this.#ready(signal), lastError);
  }

  async #ready(signal: AbortSignal | undefined): Promise<ConnectionDriver> {
    for (;;) {
      if (this.closing !== undefined) {
        throw new ConnectionClosed("this client is closed; connect again", { clean: true });
      }
      await this.#sessions.waitUntilUsable(signal);
      const connection = await this.#shared.manager.waitReady(signal);
      const preparing = this.#sessions.preparing(connection);
      if (preparing !== undefined) {
        connection.releaseTurn();
        await unlessAborted(preparing, signal);
      } else if (connection.ready && this.#clock.now() < this.#sessions.usableUntil) {
        return connection;
      }
    }
  }

  // --- streams -----------------------------------------------------------------------------------

  /**
   * Open a stream of a method of the server: iterate its items, then read its `result`.
   *
   *     for await (const piece of client.stream<string>("tokens", { prompt: "hi" })) { ... }
   *     const count = await client.stream("upload", { name }, { items: chunks() }).result;
   *
   * With `durable` it goes on without its connection.
   */
  stream<Item = unknown, Result = unknown>(
    method: string,
    params: Params | null = {},
    options: StreamOptions<Item> = {},
  ): Stream<Item, Result> {
    const run = options.durable === true ? new RunPosition(this.#settings.newRunId()) : undefined;
    return new Stream<Item, Result>(this.#streamRunner(), method, params, options, run);
  }

  /**
   * Go on with a durable stream of this user by its id. `timeoutMs` limits this attachment and not the method.
   *
   * It rejects with NotFound for a run that is not kept any more, OutOfRange for items that are not, otherwise like `stream`.
   */
  resume<Item = unknown, Result = unknown>(
    id: string,
    { method = "", after = this.#settings.positions?.position(id) ?? 0, ...options }: ResumeOptions = {},
  ): Stream<Item, Result> {
    return new Stream<Item, Result>(this.#streamRunner(), method, null, options, new RunPosition(id, after, true));
  }

  /** Return the durable streams of this user that run or are kept. */
  durableStreams(): Promise<DurableStream[]> {
    return this.call<DurableStream[]>("stream.list");
  }

  #streamRunner(): StreamRunner {
    return {
      clock: this.#clock,
      run: (request, opened) =>
        request.method === "" && request.run !== undefined
          ? this.#methodOf(request.run.id).then((method) => this.#runTracedStream({ ...request, method }, opened))
          : this.#runTracedStream(request, opened),
      touchSession: () => this.#sessions.touch(this.#clock.now()),
      cancelRun: async (id) => (await this.call<{ cancelled: boolean }>("stream.cancel", { id })).cancelled,
      positions: this.#settings.positions,
    };
  }

  async #methodOf(id: string): Promise<string> {
    const found = (await this.durableStreams()).find((run) => run.id === id);
    if (found === undefined) {
      throw new NotFound("there is no durable stream with this id; call durableStreams for those that are kept");
    }
    return found.method;
  }

  #runTracedStream(request: StreamRequest, opened: (pending: PendingStream) => void): Promise<unknown> {
    const { tracing } = this.#settings;
    if (tracing === undefined) {
      return this.#runStream(request, opened);
    }
    const call = this.#outgoing(request.method, request.traceparent, true);
    return tracing.call(call, (traceparent) => this.#runStream({ ...request, traceparent }, opened));
  }

  #runStream(request: StreamRequest, opened: (pending: PendingStream) => void): Promise<unknown> {
    const { method, params, reopening, run, window, deadline, signal, traceparent } = request;
    const announced = request.hasItems ? { items: true as const } : {};
    let pending: PendingStream | undefined;
    const send = (connection: ConnectionDriver, token: Token) => {
      const now = this.#clock.now();
      if (run?.mayOpen(now) === false) {
        throw new ConnectionClosed("the stream may have begun; call durableStreams to find it");
      }
      const resume = run === undefined ? {} : { resume: run.resume(now) };
      const meta = { ...metaOf({ traceparent }, deadline.remainingMs()), window, ...resume, ...announced };
      pending = connection.openStream(method, params(), token, meta, deadline.at);
      opened(pending);
      return abortable(pending, signal);
    };
    const hasBegun = () => pending?.hasBegun === true;
    const wasLost = () => pending?.items.wasLost === true;
    return this.#run({ send, deadline, isIdempotent: false, hasBegun, wasLost, reopening });
  }

  // --- calls of the server -----------------------------------------------------------------------

  /**
   * Handle calls of the server to a method, in this session and on each of its connections. A handler gets the params and the call;
   * its result is the answer.
   *
   *     await client.handle("approve", async ({ tool }, { signal }) => ask(tool, signal));
   *
   * Resolves once the server can call the method. Rejects with Unimplemented if the server does not call clients, otherwise like
   * `call`.
   */
  async handle(method: string, handler: Handler): Promise<void> {
    this.#handlers.add(method, handler);
    let registeredOn: ConnectionDriver | undefined;
    const send = (connection: ConnectionDriver) => {
      registeredOn = connection;
      return this.#sessions.registerHandlers(connection);
    };
    await this.#run({ send, deadline: this.#deadlineOf(), isIdempotent: true });
    await this.#sessions.registerElsewhere(registeredOn);
  }

  #callReceived(connection: ConnectionDriver, event: CallReceived): void {
    this.#handlers.call(connection, event, this.session?.user ?? "");
  }

  // --- events ------------------------------------------------------------------------------------

  #eventReceived(event: EventReceived): void {
    this.#sessions.eventReceived(event, this.#shared.manager.current);
    const { onEvent, onWarning } = this.#settings;
    if (onEvent === undefined) {
      this.events.put(event.body);
    } else {
      void callBack("onEvent", () => onEvent({ name: event.name, data: event.data }), onWarning);
    }
  }
}

/** A call that is sent again after some errors. */
interface RetriedCall {
  readonly send: (connection: ConnectionDriver, token: Token) => Promise<unknown>;
  readonly deadline: Deadline;
  /** Whether it can be sent again even if it may have run. */
  readonly isIdempotent: boolean;
  /** Whether the last attempt certainly has begun: never send it again. */
  readonly hasBegun?: () => boolean;
  /** Whether the last attempt failed because a frame of it was stale. */
  readonly wasLost?: () => boolean;
  /** Waits until it can be sent again after an interruption, even if it has begun. */
  readonly reopening?: WaitToReopen | undefined;
}

interface FailedCall {
  readonly call: RetriedCall;
  readonly attempt: Attempt;
  readonly connection: ConnectionDriver;
  readonly token: Token;
}

/**
 * Return the delay that a server asks for. If it goes away the next connection waits for that, unless it is to another
 * server.
 */
function askedBy(error: ZcprotoError, { draining }: ConnectionDriver): number {
  return error instanceof CallError && !draining ? retryAfterMs(error.details) : 0;
}

function isTooLarge(error: InvalidArgument, connection: ConnectionDriver): boolean {
  return "size" in error.details && !connection.hasSession;
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

/** Wait for the response of a call. If its signal is aborted first, cancel the call and reject with the signal's reason. */
async function abortable(call: PendingCall, signal: AbortSignal): Promise<unknown> {
  const aborted = () => call.connection.abandon(call, signal.reason as Error);
  signal.addEventListener("abort", aborted, { once: true });
  try {
    return await call.response;
  } finally {
    signal.removeEventListener("abort", aborted);
  }
}
