/**
 * Drives one connection: transport <-> ClientConnection <-> pending calls.
 *
 *     request -> connection.request -> once per tick: connection.dataToSend -> transport.write
 *     data -> connection.receiveData -> for each response, item and credit: its pending call
 *
 * Decides: which call gets which response, when a call can be sent (streams, back-pressure), how a call is abandoned without
 * affecting others, keepalive, and the error of calls pending at the end.
 * Must not know: retries and sessions.
 */

import type { ClientConnection } from "../connection/connection.js";
import type {
  CallReceived,
  ClientEvent,
  ConnectionEnded,
  EventReceived,
  GoAwayReceived,
} from "../connection/events.js";
import type { ItemStream } from "../connection/item_streams.js";
import { PROBE_MS, QUIET_MS, Silence } from "../connection/silence.js";
import type { Welcome } from "../connection/welcome.js";
import { CallError, Code, ConnectionClosed, DeadlineExceeded, type TlsError } from "../errors.js";
import type { Token } from "../wire/frame.js";
import type { Credit, Meta, Params } from "../wire/message.js";
import type { Endpoint } from "./address.js";
import type { Clock, Timer } from "./clock.js";
import { TIMED_OUT, TOO_LATE } from "./deadline.js";
import { MAX_RETRY_AFTER_MS } from "./retry.js";
import { escapeText } from "./text.js";
import { WaitingQueue } from "./waiting_queue.js";

/** Bytes gathered in one tick that are written at once. */
const FLUSH_BYTES = 65_536;

/** The shortest pause of reading: flooding servers are read in batches, not frame by frame. */
const MIN_READING_PAUSE_MS = 50;

const MAX_MESSAGE = 1_000;

/** The transport of a connection. `close` and `abort` are followed by `connectionLost`. */
export interface Transport {
  /** SHA-256 of the server's certificate (DER). */
  readonly leaf: Buffer;
  /** Bytes that are written but not sent. `resumeWriting` follows once all are sent. */
  readonly unsentBytes: number;
  write(data: Buffer): void;
  pauseReading(): void;
  resumeReading(): void;
  /** Send written data and close_notify, then end. */
  close(): void;
  /** Reset the connection. */
  abort(): void;
}

/** Receives the events of a connection as a whole. */
export interface ConnectionListener {
  eventReceived(connection: ConnectionDriver, event: EventReceived): void;
  callReceived(connection: ConnectionDriver, event: CallReceived): void;
  callWithdrawn(connection: ConnectionDriver, number: number): void;
  connectionDraining(connection: ConnectionDriver, event: GoAwayReceived): void;
  connectionEnded(connection: ConnectionDriver, error: ConnectionClosed): void;
  /** The server answers no requests in flight. Called again while that lasts; `connectionHeard` follows once a byte arrives. */
  connectionSilent(connection: ConnectionDriver): void;
  connectionHeard(connection: ConnectionDriver): void;
  /** More requests can be sent, for which none of the connection's own callers waits. */
  connectionFree(requests: number): void;
}

/** A request in flight. `response` settles once. */
export class PendingCall {
  readonly response: Promise<unknown>;
  isDone = false;
  timer: Timer | undefined;
  #resolve!: (value: unknown) => void;
  #reject!: (error: Error) => void;

  constructor(
    readonly connection: ConnectionDriver,
    readonly stream: number,
  ) {
    this.response = new Promise((resolve, reject) => {
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

/** A stream of items in flight. `response` settles at its end; items that have arrived can still be taken then. */
export class PendingStream extends PendingCall {
  /** Called after an ITEM or CREDIT, and when the connection can send again. */
  onChange: () => void = () => undefined;

  constructor(
    connection: ConnectionDriver,
    readonly items: ItemStream,
  ) {
    super(connection, items.number);
  }

  /** Report which items of a durable stream the application does not need any more. */
  sendTaken(): void {
    this.connection.withStreams((streams, wall) => streams.sendCredit(this.items, wall));
  }

  /** Whether the server may have begun the stream: it must not be opened again. */
  get hasBegun(): boolean {
    return this.items.hasBegun;
  }

  get hasItem(): boolean {
    return this.items.items.held > 0;
  }

  /** Whether an item can be sent now. */
  get maySend(): boolean {
    return this.items.maySend && this.connection.canWrite;
  }

  /** Return an item, one of which waits. Throws InternalError for an invalid one: abandon the stream then. */
  takeItem(): unknown {
    return this.connection.withStreams((streams, wall) => streams.takeItem(this.items, wall));
  }

  /** Send an item if the stream is still in flight. Throws InvalidArgument for a value that cannot be sent. */
  sendItem(item: unknown): void {
    if (this.items.state === "open") {
      this.connection.withStreams((streams, wall) => streams.sendItem(this.items, item, wall));
    }
  }

  endItems(): void {
    this.connection.withStreams((streams, wall) => streams.endItems(this.items, wall));
  }
}

/** One connection to a server. */
export class ConnectionDriver {
  /** Whether a request can be sent now; await it with `waitReady`. */
  ready = false;
  /** Whether GOAWAY was received. */
  draining = false;
  /**
   * After the end: whether requests without a response certainly did not run, because the server sent GOAWAY and then closed
   * cleanly.
   */
  unansweredDidNotRun = false;
  /** What the server asked for with GOAWAY. */
  retryAfterMs = 0;
  /** Why the connection ended. */
  error: ConnectionClosed | undefined;
  readonly welcomed: Promise<Welcome>;
  /** Settles when the transport is closed. */
  readonly closed: Promise<void>;
  readonly #clock: Clock;
  readonly #connection: ClientConnection;
  #listener: ConnectionListener | undefined;
  #transport: Transport | undefined;
  readonly #pending = new Map<number, PendingCall>();
  readonly #waiting = new WaitingQueue(); // for a request
  readonly #writers: (() => void)[] = []; // for the transport
  #isFlushScheduled = false;
  #paused = false;
  #maxStreams = 0;
  #timer: Timer | undefined;
  #readingTimer: Timer | undefined;
  protected silence: Silence | undefined; // with `watchSilence`
  #silenceTimer: Timer | undefined;
  #welcomeResolve!: (welcome: Welcome) => void;
  #welcomeReject!: (error: Error) => void;
  #closedResolve!: () => void;

  constructor(
    listener: ConnectionListener,
    clock: Clock,
    connection: ClientConnection,
    readonly endpoint: Endpoint,
  ) {
    this.#listener = listener;
    this.#clock = clock;
    this.#connection = connection;
    this.welcomed = new Promise((resolve, reject) => {
      this.#welcomeResolve = resolve;
      this.#welcomeReject = reject;
    });
    this.welcomed.catch(() => undefined); // not every caller awaits it
    this.closed = new Promise((resolve) => {
      this.#closedResolve = resolve;
    });
  }

  get welcome(): Welcome | undefined {
    return this.#connection.welcome;
  }

  /** The offset of the server's clock from this one, in milliseconds. */
  get clockOffset(): bigint {
    return this.#connection.clockOffset;
  }

  /** Whether the server has accepted a token on this connection. */
  get hasSession(): boolean {
    return this.#connection.hasSession;
  }

  get salt(): bigint {
    return this.#connection.salt;
  }

  /** SHA-256 of the server's certificate (DER) on this connection. */
  get leaf(): Buffer {
    return this.#transport?.leaf ?? Buffer.alloc(0);
  }

  // --- called by the transport -------------------------------------------------------------------

  connectionMade(transport: Transport): void {
    this.#transport = transport;
  }

  dataReceived(data: Buffer): void {
    const now = this.#clock.now();
    if (this.silence?.heard(now) === true) {
      this.#listener?.connectionHeard(this);
    }
    for (const event of this.#connection.receiveData(data, this.#wall(), now)) {
      this.#handle(event);
      if (this.error !== undefined) {
        return;
      }
    }
    if (this.#connection.queuedBytes > 0) {
      this.#flushSoon();
    }
    this.#updateReady();
    this.#checkSilenceLater();
    if (this.#closeIfDrained()) {
      return;
    }
    const delay = this.#connection.readingDelay(this.#clock.now());
    if (delay > 0) {
      this.#pauseReading(Math.max(delay, MIN_READING_PAUSE_MS));
    }
  }

  /** Close the connection after GOAWAY, once all requests and calls are answered. */
  #closeIfDrained(): boolean {
    const isDrained = this.draining && this.#pending.size === 0 && this.#connection.calls.size === 0;
    if (isDrained) {
      this.close("the server is going away");
    }
    return isDrained;
  }

  /** Read nothing for a time: the server floods this connection. */
  #pauseReading(delay: number): void {
    this.#transport?.pauseReading();
    this.#readingTimer?.cancel();
    this.#readingTimer = this.#clock.after(delay, () => this.#transport?.resumeReading());
  }

  /** Handle the end of the stream: by close_notify if there is no error. */
  endReceived(error: TlsError | undefined): void {
    if (error !== undefined) {
      this.#ended(new ConnectionClosed(error.failure, { cause: error }));
    } else if (this.error === undefined) {
      this.unansweredDidNotRun = this.draining;
      this.#ended(new ConnectionClosed("the server closed the connection", { clean: true }));
    }
  }

  /** Handle the close of the transport. */
  connectionLost(error: TlsError | undefined): void {
    this.endReceived(error);
    this.#transport = undefined;
    this.#closedResolve();
  }

  pauseWriting(): void {
    this.#paused = true;
    this.ready = false;
    this.#connection.isOutputBlocked = true;
  }

  resumeWriting(): void {
    this.#paused = false;
    this.#connection.unblockOutput(this.#wall());
    this.#flushSoon();
    this.#updateReady();
    this.#wakeWriters();
    for (const call of this.#pending.values()) {
      this.#changed(call);
    }
  }

  // --- events ------------------------------------------------------------------------------------

  #handle(event: ClientEvent): void {
    switch (event.type) {
      case "response":
        this.#removePending(event.stream)?.succeed(event.value);
        break;
      case "error":
        this.#removePending(event.stream)?.fail(
          event.code === Code.DEADLINE_EXCEEDED && event.message === TOO_LATE
            ? new DeadlineExceeded(TIMED_OUT, event.details)
            : CallError.fromWire(event.code, escapeText(event.message, MAX_MESSAGE), event.details),
        );
        break;
      case "accepted":
      case "item":
      case "credit":
        this.#changed(this.#pending.get(event.stream));
        break;
      case "call":
        this.#listener?.callReceived(this, event);
        break;
      case "withdrawn":
        this.#listener?.callWithdrawn(this, event.stream);
        break;
      case "event":
        this.#listener?.eventReceived(this, event);
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

  #changed(call: PendingCall | undefined): void {
    if (call instanceof PendingStream) {
      call.onChange();
    }
  }

  #removePending(stream: number): PendingCall | undefined {
    const call = this.#pending.get(stream);
    this.#pending.delete(stream);
    return call;
  }

  #goAway(event: GoAwayReceived): void {
    if (this.draining) {
      return;
    }
    this.draining = true;
    this.retryAfterMs = Math.min(event.retryAfterMs, MAX_RETRY_AFTER_MS);
    this.ready = false;
    this.#waiting.wake(Number.POSITIVE_INFINITY);
    this.#listener?.connectionDraining(this, event);
  }

  #endWith({ reason, code }: ConnectionEnded): void {
    this.#ended(new ConnectionClosed(escapeText(reason), { code }));
    this.#transport?.close();
  }

  // --- requests ----------------------------------------------------------------------------------

  /**
   * Send a request; await its `response`. Call this only while `ready`.
   *
   * `deadline` is in the clock's `now`, infinite without a timeout. Throws like `ClientConnection.request`. Call `abandon`
   * to stop waiting.
   */
  request(method: string, params: Params | null, token: Token, meta: Meta | undefined, deadline: number): PendingCall {
    const stream = this.#connection.request(method, params, token, meta, this.#wall());
    return this.#sent(new PendingCall(this, stream), deadline);
  }

  /** Show a token after its refresh on another connection. Throws like `ClientConnection.show`. */
  show(method: string, params: Params | null, token: Token, deadline: number): PendingCall {
    const stream = this.#connection.show(method, params, token, this.#wall());
    return this.#sent(new PendingCall(this, stream), deadline);
  }

  /** Open a stream of items like a request. Throws like `ClientConnection.openStream`. */
  openStream(
    method: string,
    params: Params | null,
    token: Token,
    meta: Omit<Meta, "credit"> & { readonly window: Credit },
    deadline: number,
  ): PendingStream {
    const items = this.#connection.openStream(method, params, token, meta, this.#wall());
    return this.#sent(new PendingStream(this, items), deadline);
  }

  /** Register methods for calls of the server in the session of a token. Throws like `ClientConnection.handle`. */
  handle(token: Token, methods: readonly string[], max: number, deadline: number): PendingCall {
    const stream = this.#connection.handle(token, methods, max, this.#wall());
    return this.#sent(new PendingCall(this, stream), deadline);
  }

  #sent<Call extends PendingCall>(call: Call, deadline: number): Call {
    const connection = this.#connection;
    this.#pending.set(call.stream, call);
    if (deadline !== Number.POSITIVE_INFINITY) {
      call.timer = this.#clock.after(deadline - this.#clock.now(), () => {
        this.abandon(call, new DeadlineExceeded(TIMED_OUT));
        if (this.silence?.callTimedOut(this.#clock.now()) === true) {
          this.probe();
        }
      });
    }
    this.#checkSilenceLater();
    if (connection.inFlight >= this.#maxStreams) {
      this.ready = false;
    }
    this.#flushWritten();
    return call;
  }

  /** Whether the transport takes more data without delay. */
  get canWrite(): boolean {
    return !this.#paused && (this.#transport?.unsentBytes ?? 0) < FLUSH_BYTES;
  }

  /** Run a step with the streams of items and send its frames. @internal */
  withStreams<T>(step: (streams: ClientConnection["streams"], wall: bigint) => T): T {
    const result = step(this.#connection.streams, this.#wall());
    this.#flushWritten();
    return result;
  }

  /** Answer a call of the server. Does nothing if it was answered before. */
  answerCall(number: number, value: unknown): void {
    this.#connection.calls.answer(number, value, this.#wall());
    this.#flushWritten();
    this.#closeIfDrained();
  }

  /** Answer a call of the server with an error. Does nothing if it was answered before. */
  failCall(number: number, error: CallError): void {
    this.#connection.calls.fail(number, error, this.#wall());
    this.#flushWritten();
    this.#closeIfDrained();
  }

  /** Cancel a call on the server, or leave a durable stream, and fail it. Does nothing after its response. */
  abandon(call: PendingCall, error: Error): void {
    if (this.#pending.get(call.stream) !== call) {
      return;
    }
    this.#pending.delete(call.stream);
    if (call instanceof PendingStream && call.items.resume !== undefined) {
      this.#connection.streams.detach(call.items, this.#wall());
    } else {
      this.#connection.cancel(call.stream, this.#wall());
    }
    this.#flushSoon();
    call.fail(error);
  }

  /** Cancel a stream on the server, and go on waiting for its response. */
  cancelStream(call: PendingStream): void {
    this.#connection.cancel(call.stream, this.#wall());
    this.#flushSoon();
  }

  /**
   * Wait until a request can be sent, or until no more can be sent on this connection. First come, first served. Rejects
   * with the signal's reason.
   */
  async waitReady(signal?: AbortSignal): Promise<void> {
    let wasWoken = false;
    while (!this.ready && !this.draining && this.error === undefined) {
      await this.#waiting.wait(wasWoken, signal);
      wasWoken = true;
    }
  }

  /** Wake the next waiter instead, if one that was woken does not send a request. */
  releaseTurn(): void {
    this.#updateReady();
  }

  /** How many more requests the server allows in flight. */
  get freeStreams(): number {
    return this.#maxStreams - this.#connection.inFlight;
  }

  /** Whether no request and no call of the server is in flight. */
  get isIdle(): boolean {
    return this.#connection.inFlight === 0 && this.#connection.calls.size === 0;
  }

  #updateReady(): void {
    let free = this.freeStreams;
    const wasReady = this.ready;
    if (this.#paused || this.#connection.state !== "open" || free <= 0) {
      return;
    }
    this.ready = true;
    free -= this.#waiting.wake(free);
    if (free > 0 && !wasReady) {
      this.#listener?.connectionFree(free);
    }
  }

  /** Wait until the transport can send, or has ended. */
  async waitWritable(): Promise<void> {
    while (this.#paused && this.error === undefined) {
      await new Promise<void>((resolve) => this.#writers.push(resolve));
    }
  }

  #wakeWriters(): void {
    for (const wake of this.#writers.splice(0)) {
      wake();
    }
  }

  // --- bytes out ---------------------------------------------------------------------------------

  #flushWritten(): void {
    const { queuedBytes } = this.#connection;
    if (queuedBytes >= FLUSH_BYTES) {
      this.#flush();
    } else if (queuedBytes > 0) {
      this.#flushSoon();
    }
  }

  /** Gather the requests of one tick into one write. */
  #flushSoon(): void {
    if (!this.#isFlushScheduled) {
      this.#isFlushScheduled = true;
      process.nextTick(this.#flushNow);
    }
  }

  readonly #flushNow = () => {
    this.#isFlushScheduled = false;
    this.#flush();
  };

  #flush(): void {
    const data = this.#connection.dataToSend();
    if (data !== undefined) {
      this.silence?.sent(data.length);
      this.#transport?.write(data);
    }
  }

  // --- time --------------------------------------------------------------------------------------

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
      this.lose(ended.reason);
      return;
    }
    this.#flush();
    this.#setTimer();
  }

  // --- silence -----------------------------------------------------------------------------------

  /** Report to the listener from now on when the server stops answering requests. */
  watchSilence(): void {
    this.silence ??= new Silence(this.#clock.now());
    this.#checkSilenceLater();
  }

  /** Whether the server has stopped answering requests in flight. */
  get isSilent(): boolean {
    return this.silence?.isSilent === true;
  }

  /** Whether a byte has arrived here since the PING to another server, which is silent. */
  hasAnsweredSince({ silence }: ConnectionDriver): boolean {
    return this.silence !== undefined && silence !== undefined && this.silence.heardAt > silence.probedAt;
  }

  #checkSilenceLater(): void {
    const isChecked = this.silence !== undefined && this.#silenceTimer === undefined && !this.silence.isSilent;
    if (isChecked && this.#connection.inFlight > 0 && this.error === undefined) {
      this.#checkSilenceIn(QUIET_MS);
    }
  }

  #checkSilenceIn(ms: number): void {
    this.#silenceTimer?.cancel();
    this.#silenceTimer = this.#clock.after(ms, () => {
      this.#silenceTimer = undefined;
      if (this.#connection.inFlight > 0 || this.silence?.isProbed === true) {
        this.#checkSilence();
      }
    });
  }

  #checkSilence(): void {
    const now = this.#clock.now();
    const due = this.silence?.check(now, this.#transport?.unsentBytes ?? 0);
    if (due === "ping") {
      this.probe();
    } else if (due === "silent") {
      this.#checkSilenceIn(PROBE_MS);
      this.#listener?.connectionSilent(this);
    } else if (due !== undefined) {
      this.#checkSilenceIn(due - now);
    }
  }

  /** Find out by a PING whether the server answers, if its silence is watched. */
  probe(): void {
    if (this.silence !== undefined && !this.silence.isProbed && this.error === undefined) {
      const unsentBytes = this.#transport?.unsentBytes ?? 0; // before the PING
      this.#connection.ping(this.#wall());
      this.#flush();
      this.silence.probe(this.#clock.now(), unsentBytes);
      this.#checkSilence();
    }
  }

  // --- the end -----------------------------------------------------------------------------------

  /** Accept calls of the server with the newer token of a session. */
  tokenRenewed(old: Token, token: Token): void {
    this.#connection.tokenRenewed(old, token);
  }

  /** Handle the end of a session: the limits of a connection without a session may apply again. */
  sessionEnded(token: Token): void {
    this.#connection.sessionEnded(token);
  }

  /** Send queued data and close_notify. Pending calls get ConnectionClosed. */
  close(reason: string): void {
    this.#flush();
    this.#ended(new ConnectionClosed(reason, { clean: true }));
    this.#transport?.close();
  }

  /** End a connection whose server does not answer, without close_notify. */
  lose(reason: string): void {
    this.#ended(new ConnectionClosed(reason));
    this.#transport?.abort();
  }

  /** Reset the connection, like a network failure. */
  abort(): void {
    this.#transport?.abort();
  }

  /** End the connection. Only the first error counts. */
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
    this.#readingTimer?.cancel();
    this.#silenceTimer?.cancel();
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const call of pending) {
      call.fail(copy(error));
    }
    this.#welcomeReject(copy(error));
    this.#waiting.wake(Number.POSITIVE_INFINITY);
    this.#wakeWriters();
    const listener = this.#listener;
    this.#listener = undefined;
    listener?.connectionEnded(this, error);
  }
}

/** Return a copy, so that each call gets an error with its own stack. */
function copy({ reason, clean, code, cause }: ConnectionClosed): ConnectionClosed {
  return new ConnectionClosed(reason, { clean, code, cause });
}
