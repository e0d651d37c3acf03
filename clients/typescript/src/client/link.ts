/**
 * The pump of one connection: transport <-> conversation <-> waiting calls.
 *
 *     request -> connection.request -> once a turn: connection.dataToSend -> transport.write
 *     data -> connection.receiveData -> for each answer: the call that waits for it
 *
 * What it decides: which call gets which answer, when a call may be sent (streams, back-pressure), how a timed out or
 * cancelled call leaves without disturbing another, keepalive, and what the calls still waiting at the end are told. It
 * knows no retries and no sessions.
 */

import type { ClientConnection } from "../connection/connection.js";
import type { ClientEvent, ConnectionEnded, EventReceived, GoAwayReceived } from "../connection/events.js";
import type { Welcome } from "../connection/welcome.js";
import { CallError, ConnectionClosed, DeadlineExceeded, type TlsError } from "../errors.js";
import type { Token } from "../wire/frame.js";
import type { Meta, Params } from "../wire/message.js";
import type { Clock, Timer } from "./clock.js";
import { printable } from "./printable.js";

/** Bytes of requests gathered in one turn, beyond which they are written without waiting for its end. */
const SENT_AT_ONCE = 65_536;

/** What a link writes to. Each `close` and `abort` is followed by `connectionLost`. */
export interface Transport {
  /** SHA-256 of the certificate (DER) that the server has shown. */
  readonly leaf: Buffer;
  write(data: Buffer): void;
  /** Send what was written and close_notify, then end. */
  close(): void;
  /** Reset the connection. */
  abort(): void;
}

/** Whoever uses a connection, and is told what concerns it as a whole. */
export interface Owner {
  eventReceived(link: Link, event: EventReceived): void;
  linkDraining(link: Link, event: GoAwayReceived): void;
  linkLost(link: Link, error: ConnectionClosed): void;
}

/** A request on its way. `answer` settles once. */
export class PendingCall {
  readonly answer: Promise<unknown>;
  isDone = false;
  timer: Timer | undefined;
  #resolve!: (value: unknown) => void;
  #reject!: (error: Error) => void;

  constructor(
    readonly link: Link,
    readonly stream: number,
  ) {
    this.answer = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  succeed(value: unknown): void {
    this.isDone = true;
    this.timer?.cancel();
    this.#resolve(value);
  }

  fail(error: Error): void {
    this.isDone = true;
    this.timer?.cancel();
    this.#reject(error);
  }
}

/** One connection to a server. */
export class Link {
  /** A request may be sent now; wait for it with `waitReady`. */
  ready = false;
  /** GOAWAY was said. */
  draining = false;
  /** Some request was answered here. */
  answered = false;
  /** A device has proved its key here. */
  proved = false;
  /**
   * After the end: what had no answer was certainly not run, as the server had said GOAWAY and then closed in an orderly
   * way.
   */
  unansweredNotRun = false;
  /** Why the connection ended, once it did. */
  error: ConnectionClosed | undefined;
  readonly welcomed: Promise<Welcome>;
  /** Settles when the transport is gone. */
  readonly gone: Promise<void>;
  readonly #clock: Clock;
  readonly #connection: ClientConnection;
  #owner: Owner | undefined;
  #transport: Transport | undefined;
  readonly #pending = new Map<number, PendingCall>();
  #waiters: (() => void)[] = [];
  #flushPlanned = false;
  #paused = false;
  #maxStreams = 0;
  #timer: Timer | undefined;
  #welcomeResolve!: (welcome: Welcome) => void;
  #welcomeReject!: (error: Error) => void;
  #goneResolve!: () => void;

  constructor(owner: Owner, clock: Clock, connection: ClientConnection) {
    this.#owner = owner;
    this.#clock = clock;
    this.#connection = connection;
    this.welcomed = new Promise((resolve, reject) => {
      this.#welcomeResolve = resolve;
      this.#welcomeReject = reject;
    });
    this.welcomed.catch(() => undefined); // whoever waits is told; if nobody does, that is no fault
    this.gone = new Promise((resolve) => {
      this.#goneResolve = resolve;
    });
  }

  get welcome(): Welcome | undefined {
    return this.#connection.welcome;
  }

  /** The server's clock minus ours, in milliseconds. */
  get clockOffset(): bigint {
    return this.#connection.clockOffset;
  }

  /** Whether the server is known to have taken a session's token here. */
  get hasSession(): boolean {
    return this.#connection.hasSession;
  }

  get salt(): bigint {
    return this.#connection.salt;
  }

  /** SHA-256 of the certificate (DER) that the server has shown here. */
  get leaf(): Buffer {
    return this.#transport?.leaf ?? Buffer.alloc(0);
  }

  // --- the transport's calls --------------------------------------------------------------------

  connectionMade(transport: Transport): void {
    this.#transport = transport;
  }

  dataReceived(data: Buffer): void {
    for (const event of this.#connection.receiveData(data, this.#wall(), this.#clock.now())) {
      this.#handle(event);
      if (this.error !== undefined) {
        return;
      }
    }
    if (this.#connection.queuedBytes > 0) {
      this.#flushSoon();
    }
    this.#updateReady();
    if (this.draining && this.#pending.size === 0) {
      this.close("the server is going away");
    }
  }

  /** Nothing more comes from the server: after a close_notify if there is no error. */
  endReceived(error: TlsError | undefined): void {
    if (error !== undefined) {
      this.#ended(new ConnectionClosed(error.failure, { cause: error }));
    } else if (this.error === undefined) {
      this.unansweredNotRun = this.draining;
      this.#ended(new ConnectionClosed("the server closed the connection", { clean: true }));
    }
  }

  /** The transport is gone. */
  connectionLost(error: TlsError | undefined): void {
    this.endReceived(error);
    this.#transport = undefined;
    this.#goneResolve();
  }

  pauseWriting(): void {
    this.#paused = true;
    this.ready = false;
  }

  resumeWriting(): void {
    this.#paused = false;
    this.#updateReady();
  }

  // --- what the server says ---------------------------------------------------------------------

  #handle(event: ClientEvent): void {
    switch (event.type) {
      case "response":
        this.answered = true;
        this.#take(event.stream)?.succeed(event.value);
        break;
      case "error":
        this.answered = true;
        this.#take(event.stream)?.fail(CallError.fromWire(event.code, event.message, event.details));
        break;
      case "event":
        this.#owner?.eventReceived(this, event);
        break;
      case "goaway":
        this.#goAway(event);
        break;
      case "welcomed":
        this.#maxStreams = event.welcome.max_streams;
        this.#setTimer();
        this.#updateReady();
        this.#welcomeResolve(event.welcome);
        break;
      case "ended":
        this.#endWith(event);
        break;
    }
  }

  #take(stream: number): PendingCall | undefined {
    const call = this.#pending.get(stream);
    this.#pending.delete(stream);
    return call;
  }

  #goAway(event: GoAwayReceived): void {
    if (this.draining) {
      return;
    }
    this.draining = true;
    this.ready = false;
    this.#wakeAll();
    this.#owner?.linkDraining(this, event);
  }

  #endWith({ reason, code }: ConnectionEnded): void {
    this.#ended(new ConnectionClosed(printable(reason), { code }));
    this.#transport?.close();
  }

  // --- requests ---------------------------------------------------------------------------------

  /**
   * Send a request; await its `answer`. Call it only while `ready`.
   *
   * `deadline` is in the clock's `now`, infinite for none. Throws as `ClientConnection.request`. Whoever stops waiting
   * calls `abandon`.
   */
  request(method: string, params: Params | null, token: Token, meta: Meta | undefined, deadline: number): PendingCall {
    const connection = this.#connection;
    const stream = connection.request(method, params, token, meta, this.#wall());
    const call = new PendingCall(this, stream);
    this.#pending.set(stream, call);
    if (deadline !== Number.POSITIVE_INFINITY) {
      call.timer = this.#clock.after(deadline - this.#clock.now(), () => {
        this.abandon(call, new DeadlineExceeded("no answer within the call's timeout"));
      });
    }
    if (connection.inFlight >= this.#maxStreams) {
      this.ready = false;
    }
    if (connection.queuedBytes >= SENT_AT_ONCE) {
      this.#flush();
    } else {
      this.#flushSoon();
    }
    return call;
  }

  /** Nobody waits for a call's answer any more: tell the server, and fail the call. Nothing if it had its answer. */
  abandon(call: PendingCall, error: Error): void {
    if (this.#pending.get(call.stream) !== call) {
      return;
    }
    this.#pending.delete(call.stream);
    this.#connection.cancel(call.stream, this.#wall());
    this.#flushSoon();
    call.fail(error);
  }

  /**
   * Settles when a request may be sent, or when none can be sent here any more. First come, first served. Rejects with
   * the signal's reason.
   */
  async waitReady(signal?: AbortSignal): Promise<void> {
    let wasWoken = false;
    while (!this.ready && !this.draining && this.error === undefined) {
      await this.#wait(wasWoken, signal);
      wasWoken = true;
    }
  }

  /** Whoever was woken does not send after all: let the next have the turn. */
  passOn(): void {
    this.#updateReady();
  }

  #wait(wasWoken: boolean, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) {
        reject(signal.reason as Error);
        return;
      }
      const wake = () => {
        signal?.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        this.#waiters = this.#waiters.filter((waiter) => waiter !== wake);
        reject(signal?.reason as Error);
      };
      signal?.addEventListener("abort", leave, { once: true });
      if (wasWoken) {
        this.#waiters.unshift(wake); // somebody else was quicker in this turn: the place in the queue is kept
      } else {
        this.#waiters.push(wake);
      }
    });
  }

  #updateReady(): void {
    let free = this.#maxStreams - this.#connection.inFlight;
    if (this.#paused || this.#connection.state !== "open" || free <= 0) {
      return;
    }
    this.ready = true;
    while (free > 0 && this.#waiters.length > 0) {
      this.#waiters.shift()?.();
      free -= 1;
    }
  }

  #wakeAll(): void {
    const waiters = this.#waiters;
    this.#waiters = [];
    for (const wake of waiters) {
      wake();
    }
  }

  // --- bytes out --------------------------------------------------------------------------------

  /** Gather what is sent in one turn into one write: the next tick comes when all that can run now has run. */
  #flushSoon(): void {
    if (!this.#flushPlanned) {
      this.#flushPlanned = true;
      process.nextTick(this.#flushNow);
    }
  }

  readonly #flushNow = () => {
    this.#flushPlanned = false;
    this.#flush();
  };

  #flush(): void {
    const data = this.#connection.dataToSend();
    if (data !== undefined) {
      this.#transport?.write(data);
    }
  }

  // --- time -------------------------------------------------------------------------------------

  #wall(): bigint {
    return BigInt(this.#clock.wall());
  }

  #setTimer(): void {
    this.#timer?.cancel();
    const deadline = this.#connection.nextDeadline();
    this.#timer =
      deadline === Number.POSITIVE_INFINITY
        ? undefined
        : this.#clock.after(deadline - this.#clock.now(), () => this.#timedOut());
  }

  #timedOut(): void {
    const ended = this.#connection.handleTimeout(this.#wall(), this.#clock.now());
    if (ended !== undefined) {
      this.#ended(new ConnectionClosed(ended.reason));
      this.#transport?.abort(); // nobody is there to take leave of
      return;
    }
    this.#flush();
    this.#setTimer();
  }

  // --- the end ----------------------------------------------------------------------------------

  /** A session is over: the limits of a connection without one may hold again. */
  sessionEnded(token: Token): void {
    this.#connection.sessionEnded(token);
  }

  /** Send what is queued and close_notify; calls that still wait get ConnectionClosed. */
  close(reason: string): void {
    this.#flush();
    this.#ended(new ConnectionClosed(reason, { clean: true }));
    this.#transport?.close();
  }

  /** Reset the connection, as a network would. */
  abort(): void {
    this.#transport?.abort();
  }

  /** The conversation is over. The first cause counts. */
  #ended(error: ConnectionClosed): void {
    if (this.error !== undefined) {
      return;
    }
    this.error = error;
    this.ready = false;
    if (this.#connection.state !== "closed") {
      this.#connection.end();
    }
    this.#timer?.cancel();
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const call of pending) {
      call.fail(copy(error));
    }
    this.#welcomeReject(copy(error));
    this.#wakeAll();
    const owner = this.#owner;
    this.#owner = undefined;
    owner?.linkLost(this, error);
  }
}

/** Each call rejects with its own, as each has its own stack. */
function copy({ reason, clean, code, cause }: ConnectionClosed): ConnectionClosed {
  return new ConnectionClosed(reason, { clean, code, cause });
}
