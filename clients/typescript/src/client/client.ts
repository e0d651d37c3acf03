/**
 * The client: calls over one connection at a time, retried until they get a response or a definite error.
 *
 * Decides: whether a call is retried after an error, by the table of zcp1.md, section 11.1 (`retry.ts`).
 * Must not know: when connections are made (`connection_manager.ts`) and sessions opened (`session_manager.ts`).
 */

import type { EventReceived } from "../connection/events.js";
import type { Welcome } from "../connection/welcome.js";
import { CallError, Code, ConnectionClosed, InvalidArgument, type ZcprotoError } from "../errors.js";
import { NO_TOKEN, type Token } from "../wire/frame.js";
import type { Meta, Params } from "../wire/message.js";
import { type Address, addressText } from "./address.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep } from "./clock.js";
import type { ConnectionDriver, ConnectionListener } from "./connection_driver.js";
import { ConnectionManager } from "./connection_manager.js";
import { Deadline } from "./deadline.js";
import { EventStream, type ServerEvent } from "./event_stream.js";
import { type RetryAction, retryAction, retryAfterMs, SESSION_ENDED_CODES } from "./retry.js";
import type { ClientSession, Credentials } from "./session.js";
import { SessionManager } from "./session_manager.js";

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

/** Settings that `connect` derives from its options. */
export interface ClientSettings {
  readonly address: Address;
  readonly dial: (listener: ConnectionListener, signal: AbortSignal) => Promise<ConnectionDriver>;
  readonly credentials: Credentials | undefined;
  readonly opensSession: boolean;
  readonly timeoutMs: number;
  readonly client: string;
  readonly onEvent: ((event: ServerEvent) => void) | undefined;
  readonly clock: Clock;
  readonly random: Random;
}

/**
 * A client of one server, made by `connect`. Any number of calls can run concurrently; they share one connection.
 */
export class Client implements AsyncDisposable {
  readonly address: string;
  /** Events of the server, unless `onEvent` is given. */
  readonly events = new EventStream();
  readonly #settings: ClientSettings;
  readonly #clock: Clock;
  readonly #connections: ConnectionManager;
  readonly #sessions: SessionManager;
  #closing: Promise<void> | undefined;

  /** @internal */
  constructor(settings: ClientSettings) {
    const { address, clock, random, dial, credentials, client } = settings;
    this.address = addressText(address);
    this.#settings = settings;
    this.#clock = clock;
    this.#connections = new ConnectionManager({
      clock,
      backoff: new Backoff(random),
      dial,
      onEvent: (event) => this.#eventReceived(event),
      onConnection: (connection) => this.#sessions.presentToken(connection),
      isWanted: () => !this.#sessions.hasEnded,
    });
    this.#sessions = new SessionManager({
      clock,
      random,
      getConnection: (signal) => this.#connections.get(signal),
      credentials,
      client,
    });
  }

  /** Connect, and open a session if there are credentials. The first attempt is not retried. @internal */
  async open(): Promise<void> {
    try {
      if (this.#settings.opensSession) {
        this.#sessions.requireSession();
      }
      await this.#connections.get(); // limited by the connect timeout
      await this.#waitReady(this.#deadlineOf());
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  /** Close the session and the connection. Pending calls get ConnectionClosed. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    try {
      await this.#sessions.close(this.#connections.current);
    } finally {
      await this.#connections.close();
      this.events.close();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  // --- state -------------------------------------------------------------------------------------

  /** The open session, if any. */
  get session(): ClientSession | undefined {
    return this.#sessions.session;
  }

  /** The WELCOME of the current connection, if any. */
  get welcome(): Welcome | undefined {
    return this.#connections.current?.welcome;
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

  /** Reset the connection like a network failure, for tests. The client reconnects. */
  cut(): void {
    this.#connections.abort();
  }

  // --- calls -------------------------------------------------------------------------------------

  /**
   * Call a method of the server and return its result.
   *
   * Rejects with CallError for an error of the server, DeadlineExceeded for the timeout, ConnectionClosed if the connection
   * was lost and the call may have run, and CannotConnect or TlsError if connecting fails.
   */
  async call<Result = unknown>(method: string, params: Params | null = {}, options: CallOptions = {}): Promise<Result> {
    const deadline = this.#deadlineOf(options);
    const sessions = this.#sessions;
    let attempt: Attempt | undefined;
    for (;;) {
      let connection = this.#connections.current;
      if (connection?.ready !== true || this.#clock.now() >= sessions.usableUntil || this.#closing !== undefined) {
        connection = await this.#waitReady(deadline);
      }
      try {
        deadline.check();
      } catch (error) {
        connection.releaseTurn();
        throw error;
      }
      const { token } = sessions;
      sessions.touch(this.#clock.now());
      try {
        const call = connection.request(method, params, token, metaOf(options, deadline.remainingMs()), deadline.at);
        return (await (options.signal === undefined ? call.response : abortable(call, options.signal))) as Result;
      } catch (error) {
        attempt ??= { backoff: new Backoff(this.#settings.random), done: new Set() };
        await this.#afterFailure(error, { attempt, connection, token, deadline, options });
      }
    }
  }

  #deadlineOf({ timeoutMs = this.#settings.timeoutMs, signal }: CallOptions = {}): Deadline {
    return new Deadline(this.#clock, timeoutMs, signal);
  }

  /** Wait until a failed call can be retried. Rejects with its error if it must not be. */
  async #afterFailure(error: unknown, failed: FailedCall): Promise<void> {
    const { connection, attempt, options } = failed;
    options.signal?.throwIfAborted();
    if (error instanceof CallError) {
      await this.#afterCallError(error, failed);
    } else if (
      error instanceof ConnectionClosed &&
      this.#closing === undefined &&
      (connection.unansweredDidNotRun || options.idempotencyKey !== undefined)
    ) {
      // Back off: the call itself may be what crashes the server.
      await this.#wait(attempt.backoff.next(), error, failed);
    } else {
      throw error;
    }
  }

  async #afterCallError(error: CallError, failed: FailedCall): Promise<void> {
    const { attempt, token, connection, deadline } = failed;
    const sessions = this.#sessions;
    const action = retryAction(error);
    const isFirst = !attempt.done.has(action);
    if (action === "later") {
      await this.#wait(attempt.backoff.next(retryAfterMs(error.details)), error, failed);
    } else if (action === "at_once" && isFirst) {
      attempt.done.add(action);
    } else if (action === "attach" && token !== NO_TOKEN && isFirst) {
      attempt.done.add(action);
      await this.#attach(error, failed);
    } else if (action === "reopen" && token !== NO_TOKEN && isFirst && sessions.reopen(token)) {
      attempt.done.add(action);
    } else if (action === "renew" && token !== NO_TOKEN && isFirst) {
      attempt.done.add(action);
      sessions.markExpired(token);
    } else if (SESSION_ENDED_CODES.has(error.code) && token !== NO_TOKEN) {
      if (token !== sessions.token && !sessions.hasEnded && isFirst) {
        attempt.done.add(action); // the token of a previous session
        return;
      }
      sessions.markEnded(token, error);
      throw error;
    } else if (error instanceof InvalidArgument && isTooLarge(error, connection) && !attempt.done.has("at_once")) {
      attempt.done.add("at_once");
      await this.#presentTokenFirst(error, token, deadline);
    } else {
      if (error.code === Code.UNAUTHENTICATED && token !== NO_TOKEN) {
        sessions.markUnknown(token);
      }
      throw error;
    }
  }

  async #attach(error: CallError, failed: FailedCall): Promise<void> {
    const { attempt, connection, token, deadline } = failed;
    let hasDevice: boolean;
    try {
      hasDevice = await deadline.run((signal) => this.#sessions.attach(connection, token, signal));
    } catch (refusal) {
      if (!(refusal instanceof CallError) || refusal.code === Code.DEADLINE_EXCEEDED) {
        throw refusal;
      }
      if (retryAction(refusal) === "later") {
        attempt.done.delete("attach"); // the session was not attached
      }
      await this.#afterCallError(refusal, failed);
      return;
    }
    if (!hasDevice) {
      throw error;
    }
  }

  /** Wait before a retry. Rejects with the error at once if the deadline would pass. */
  async #wait(delayMs: number, error: ZcprotoError, { deadline }: FailedCall): Promise<void> {
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
    const lastError = () =>
      this.#connections.current === undefined ? this.#connections.lastError : this.#sessions.renewalProblem;
    return deadline.run((signal) => this.#ready(signal), lastError);
  }

  async #ready(signal: AbortSignal | undefined): Promise<ConnectionDriver> {
    for (;;) {
      if (this.#closing !== undefined) {
        throw new ConnectionClosed("this client is closed", { clean: true });
      }
      await this.#sessions.waitUntilUsable(signal);
      const connection = await this.#connections.get(signal);
      await connection.waitReady(signal);
      if (connection.ready && this.#clock.now() < this.#sessions.usableUntil) {
        return connection;
      }
    }
  }

  #eventReceived(event: EventReceived): void {
    this.#sessions.eventReceived(event, this.#connections.current);
    if (this.#settings.onEvent === undefined) {
      this.events.put(event.body);
    } else {
      this.#settings.onEvent({ name: event.name, data: event.data });
    }
  }
}

/** The retries of a call. Created at its first error, which most calls never have. */
interface Attempt {
  readonly backoff: Backoff;
  readonly done: Set<RetryAction>;
}

interface FailedCall {
  readonly attempt: Attempt;
  readonly connection: ConnectionDriver;
  readonly token: Token;
  readonly deadline: Deadline;
  readonly options: CallOptions;
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
async function abortable(call: ReturnType<ConnectionDriver["request"]>, signal: AbortSignal): Promise<unknown> {
  const aborted = () => call.connection.abandon(call, signal.reason as Error);
  signal.addEventListener("abort", aborted, { once: true });
  try {
    return await call.response;
  } finally {
    signal.removeEventListener("abort", aborted);
  }
}
