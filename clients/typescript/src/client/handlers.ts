/**
 * The application's handlers for calls of the server in one session.
 *
 * Decides: which handler runs, how many run at once, when a handler is aborted, and how its outcome becomes an answer. An answer
 * takes the place of another call until the server reads, so that a server that reads nothing cannot fill the memory.
 * Must not know: when methods are registered, and when connections are made.
 */

import type { CallReceived } from "../connection/events.js";
import { CallError, Cancelled, InternalError, ResourceExhausted, Unimplemented } from "../errors.js";
import type { ConnectionDriver } from "./connection_driver.js";
import type { Handler, Tracing } from "./types.js";

/** Calls of the server that run at once, unless `maxCalls` is given. */
export const DEFAULT_MAX_CALLS = 16;

interface Running {
  readonly connection: ConnectionDriver;
  readonly number: number;
  readonly controller: AbortController;
}

export class Handlers {
  /** How many calls may run at once. */
  readonly max: number;
  readonly #onWarning: (message: string) => void;
  readonly #tracing: Tracing | undefined;
  readonly #handlers = new Map<string, Handler>();
  readonly #running = new Set<Running>();

  constructor(max: number, onWarning: (message: string) => void, tracing: Tracing | undefined) {
    this.max = max;
    this.#onWarning = onWarning;
    this.#tracing = tracing;
  }

  get methods(): string[] {
    return [...this.#handlers.keys()];
  }

  add(method: string, handler: Handler): void {
    this.#handlers.set(method, handler);
  }

  /** Run the handler of a call and answer it. */
  call(connection: ConnectionDriver, event: CallReceived, user: string): void {
    const { stream: number, method, params, deadlineMs, traceparent } = event;
    const handler = this.#handlers.get(method);
    if (handler === undefined) {
      connection.failCall(number, new Unimplemented("this client does not handle this method"));
      return;
    }
    if ([...this.#running].filter((running) => running.connection === connection).length >= this.max) {
      connection.failCall(number, new ResourceExhausted(`this client handles ${this.max} calls at once`));
      return;
    }
    const running = { connection, number, controller: new AbortController() };
    this.#running.add(running);
    const { signal } = running.controller;
    const call = { method, user, deadlineMs, traceparent, signal };
    const handle = async () => handler(params, call);
    void this.#run(running, () => this.#tracing?.handle(call, handle) ?? handle());
  }

  async #run(running: Running, handle: () => Promise<unknown>): Promise<void> {
    const { connection, number, controller } = running;
    let answer: () => void;
    try {
      const value = (await handle()) ?? null;
      answer = () => connection.answerCall(number, value);
    } catch (error) {
      if (!(error instanceof CallError || controller.signal.aborted)) {
        this.#onWarning(failureOf("a handler of calls", error));
      }
      answer = () =>
        connection.failCall(number, error instanceof CallError ? error : new InternalError("the handler failed"));
    }
    await connection.waitWritable();
    this.#running.delete(running);
    if (!controller.signal.aborted) {
      answer(); // otherwise it was answered, and its number may be in use again
    }
  }

  /** Abort the handler of a call that the server has withdrawn. */
  withdraw(connection: ConnectionDriver, number: number): void {
    for (const running of this.#running) {
      if (running.connection === connection && running.number === number && !running.controller.signal.aborted) {
        running.controller.abort(new Cancelled("the server has withdrawn the call"));
      }
    }
  }

  /** Abort all handlers, or those of one connection, which has ended. */
  abort(reason: Error, connection?: ConnectionDriver): void {
    for (const running of this.#running) {
      const isMeant = connection === undefined || running.connection === connection;
      if (isMeant && !running.controller.signal.aborted) {
        running.connection.failCall(running.number, new Cancelled(reason.message));
        running.controller.abort(reason);
      }
    }
  }
}

/** Call a function of the application, and report an error of it as a warning. */
export async function callBack(
  name: string,
  callback: () => unknown,
  onWarning: (message: string) => void,
): Promise<void> {
  try {
    await callback();
  } catch (error) {
    onWarning(failureOf(name, error));
  }
}

function failureOf(what: string, error: unknown): string {
  return `${what} failed: ${error instanceof Error ? (error.stack ?? error.message) : error}`;
}
