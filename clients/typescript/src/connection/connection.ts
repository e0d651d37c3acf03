/**
 * The client's end of a connection, without I/O: bytes and time in; events, bytes and the next deadline out.
 *
 * Decides: WELCOME, the clock offset, freshness of received frames, which request a response belongs to, what can be sent now
 * (streams in flight, frame size), keepalive, and what ends the connection.
 * Must not know: sockets, TLS, clocks, retries, and sessions beyond their tokens.
 *
 * Rules where the protocol leaves the choice to a client:
 *
 * - On an error of the server a client only ends the connection and reports why: it has no ERROR to send.
 * - A RESPONSE or ERROR with an invalid body fails its call with INTERNAL (it may have run). An invalid WELCOME, GOAWAY,
 *   EVENT or ERROR on stream 0 ends the connection.
 * - A frame is judged by the clock at the arrival of its header, so a large one on a slow link is not stale.
 * - A stale answer, ITEM or CREDIT fails its call with DATA_LOSS. A stale CALL is refused, and a stale WITHDRAW is honoured. Any
 *   other stale frame is dropped and counted. The tenth consecutive one ends the connection. ERROR STALE_TIMESTAMP is processed
 *   even if it is stale itself, since it corrects the clock offset.
 * - The bytes of an incomplete frame count as a sign of life, until it has taken FRAME_TIMEOUT_MS.
 * - Until a RESPONSE shows that the server accepted a token, frames are limited as on a connection without a session.
 * - At most one PONG waits to be sent. It answers all PINGs that arrive until then, so that a server that sends PINGs and
 *   reads nothing cannot fill the memory.
 * - Frames that answer no request are read at a limited rate: a server that floods them gets back-pressure.
 *
 * `wall` is this machine's time in milliseconds since the Unix epoch; `now` is monotonic, in milliseconds.
 */

import {
  Code,
  ConnectionClosed,
  knownCode,
  ProtocolError,
  ResourceExhausted,
  Unavailable,
  Unimplemented,
} from "../errors.js";
import { decodeBody, MAX_DEPTH, phraseOf } from "../wire/body.js";
import { FrameDecoder } from "../wire/decoder.js";
import { acceptedBy, type Extension, type Frame, HEADER_SIZE, Kind, NO_TOKEN, type Token } from "../wire/frame.js";
import {
  type Credit,
  decodeError,
  decodeEvent,
  type ErrorMessage,
  isInt,
  type Meta,
  type Params,
} from "../wire/message.js";
import type { ClientEvent, ConnectionEnded } from "./events.js";
import { FloodLimit } from "./flood_limit.js";
import { correctsClock, Freshness, MAX_CONSECUTIVE_STALE } from "./freshness.js";
import { type ItemStream, ItemStreams } from "./item_streams.js";
import { Keepalive } from "./keepalive.js";
import { Output, type Send } from "./output.js";
import { MAX_FRAME_BEFORE_SESSION, Requests } from "./requests.js";
import { ServerCalls } from "./server_calls.js";
import { nextState, type State } from "./state.js";
import { readGoAway, readWelcome, type Welcome } from "./welcome.js";

/** Milliseconds from the header of a frame to its last byte, after which the connection counts as lost. */
export const FRAME_TIMEOUT_MS = 300_000;

/** The largest accepted server time: timestamps derived from a larger one could exceed 64 bits. */
export const MAX_SERVER_TIME = 2n ** 62n;

const STALE_ANSWER = "the answer was delayed for too long; check whether the request took effect";
const STALE_ITEM = "an item was delayed for too long; the stream is incomplete";
const EMPTY = new Uint8Array(0);

export interface ConnectionSettings {
  /** The largest `length` accepted from the server after WELCOME. */
  readonly maxFrame?: number;
  /** The tolerated difference of timestamps from the estimated server time. */
  readonly toleranceMs?: number;
  readonly maxDepth?: number;
}

/**
 * One connection to a server. Requests can be made after the `welcomed` event. Bytes to send are queued until
 * `dataToSend`.
 */
export class ClientConnection {
  state: State = "awaiting_welcome";
  welcome: Welcome | undefined;
  droppedStale = 0;
  droppedUnknown = 0;
  /** Whether the transport cannot send; call `unblockOutput` when it can again. */
  isOutputBlocked = false;
  readonly streams: ItemStreams;
  readonly calls: ServerCalls;
  readonly #maxFrame: number;
  readonly #toleranceMs: number;
  readonly #maxDepth: number;
  readonly #decoder: FrameDecoder;
  #freshness: Freshness | undefined; // set by WELCOME
  #staleCount = 0;
  #partial: { readonly wall: bigint; readonly now: number } | undefined; // when the header of an incomplete frame arrived
  readonly #requests: Requests;
  readonly #output = new Output();
  #pongOwed: Token | undefined; // the token of the latest PING without a PONG
  readonly #unrequested = new FloodLimit();
  readonly #keepalive = new Keepalive();

  constructor({ maxFrame = 1_048_576, toleranceMs = 30_000, maxDepth = MAX_DEPTH }: ConnectionSettings = {}) {
    this.#maxFrame = maxFrame;
    this.#toleranceMs = toleranceMs;
    this.#maxDepth = maxDepth;
    const send: Send = (kind, stream, token, body, wall) => this.#send(kind, stream, token, body, wall);
    this.#requests = new Requests(send);
    this.streams = new ItemStreams(send, maxDepth);
    this.calls = new ServerCalls(send, maxDepth);
    this.#decoder = new FrameDecoder("client", Math.min(maxFrame, MAX_FRAME_BEFORE_SESSION));
  }

  /** The salt, unique to this connection and part of device signatures. */
  get salt(): bigint {
    return this.#output.salt;
  }

  /** The offset of the server's clock from this one. */
  get clockOffset(): bigint {
    return this.#output.clockOffset;
  }

  get queuedBytes(): number {
    return this.#output.queuedBytes;
  }

  /** The number of requests without a response, including streams of items. */
  get inFlight(): number {
    return this.#requests.size;
  }

  /** The stream of the next request, unless it is in flight. */
  set nextStream(stream: number) {
    this.#requests.next = stream;
  }

  /** Whether the server has accepted a token on this connection. */
  get hasSession(): boolean {
    return this.#requests.hasSession;
  }

  /** The largest `length` that can be sent now. */
  get sendLimit(): number {
    return this.#requests.sendLimit;
  }

  // --- receiving ---------------------------------------------------------------------------------

  /** Process decrypted bytes and return events. Bytes after the end are ignored. */
  receiveData(data: Buffer, wall: bigint, now: number): ClientEvent[] {
    const events: ClientEvent[] = [];
    if (this.state === "closed") {
      return events;
    }
    try {
      this.#decoder.feed(data);
      let judgedAt = this.#partial?.wall ?? wall;
      for (let frame = this.#decoder.next(); frame !== undefined; frame = this.#decoder.next()) {
        const event = this.#received(frame, judgedAt, wall, now);
        this.#partial = undefined;
        judgedAt = wall;
        if (event !== undefined) {
          events.push(event);
          if (event.type === "ended") {
            break;
          }
        }
      }
      if (this.#decoder.buffered >= HEADER_SIZE) {
        this.#partial ??= { wall, now };
        this.#keepalive.received(now);
        if (now >= this.#partial.now + FRAME_TIMEOUT_MS) {
          events.push(this.#endWith(undefined, "a frame of the server took too long to arrive"));
        }
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) {
        throw error;
      }
      events.push(this.#endWith(error.code, error.reason));
    }
    if (this.#pongOwed !== undefined && !this.isOutputBlocked) {
      this.#sendPong(wall);
    }
    return events;
  }

  #received(frame: Frame, judgedAt: bigint, wall: bigint, now: number): ClientEvent | undefined {
    const freshness = this.#freshness;
    if (freshness === undefined) {
      return this.#receivedFirst(frame, wall, now);
    }
    const serverTime = judgedAt + this.clockOffset;
    const verdict = freshness.check(frame.salt, frame.counter, frame.timestamp, serverTime);
    if (verdict !== "fresh") {
      if (verdict === "wrong_salt") {
        throw new ProtocolError(Code.REPLAYED, "nonce belongs to another connection");
      }
      if (verdict === "counter_used") {
        throw new ProtocolError(Code.REPLAYED, "nonce counter did not increase");
      }
      if (!correctsClock(frame, this.#maxDepth)) {
        return this.#receivedStale(frame, wall);
      }
    }
    this.#staleCount = 0;
    this.#keepalive.received(now);
    const isOfCall = frame.kind === Kind.CALL || frame.kind === Kind.WITHDRAW; // their numbers are the server's
    if (isOfCall || !this.#requests.has(frame.stream)) {
      this.#unrequested.count(frame.body.length, now);
    }
    return frame.kind === Kind.RESPONSE ? this.#receivedResponse(frame) : this.#receivedOther(frame, wall);
  }

  /** Return the time for which to stop reading, because of a flood of frames that answer no request. */
  readingDelay(now: number): number {
    return this.#unrequested.delay(now);
  }

  #receivedStale(frame: Frame, wall: bigint): ClientEvent | undefined {
    const { kind, stream } = frame;
    this.#staleCount += 1;
    if (this.#staleCount >= MAX_CONSECUTIVE_STALE) {
      throw new ProtocolError(Code.STALE_TIMESTAMP, "ten consecutive stale frames");
    }
    if (kind === Kind.CALL || kind === Kind.WITHDRAW) {
      return this.#receivedOfCall(frame, true, wall);
    }
    if ((kind === Kind.RESPONSE || kind === Kind.ERROR) && this.#requests.remove(stream)) {
      this.streams.lost(stream);
      this.streams.answered(stream);
      return { type: "error", stream, code: Code.DATA_LOSS, message: STALE_ANSWER, details: {} };
    }
    if ((kind === Kind.ITEM || kind === Kind.CREDIT || kind === Kind.ACCEPTED) && this.streams.isRead(stream)) {
      const lost = this.streams.lost(stream);
      if (lost?.resume === undefined) {
        this.cancel(stream, wall); // a lost item would go unnoticed, and lost credit would block the stream
      } else {
        this.streams.detach(lost, wall);
      }
      return { type: "error", stream, code: Code.DATA_LOSS, message: STALE_ITEM, details: {} };
    }
    this.droppedStale += 1;
    return undefined;
  }

  #receivedResponse({ stream, body }: Frame): ClientEvent | undefined {
    if (!this.#requests.has(stream)) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.streams.answered(stream);
    let value: unknown;
    try {
      value = decodeBody(body, { maxDepth: this.#maxDepth });
    } catch (error) {
      this.#requests.remove(stream);
      return { type: "error", stream, ...invalidResponse(error) };
    }
    const refreshed = this.#requests.succeeded(stream, value);
    if (refreshed !== undefined) {
      this.calls.tokenRenewed(...refreshed); // a CALL with the new token may be in the same read
    }
    return { type: "response", stream, value };
  }

  /** Handle a fresh frame other than RESPONSE. */
  #receivedOther(frame: Frame, wall: bigint): ClientEvent | undefined {
    switch (frame.kind) {
      case Kind.ERROR:
        return this.#receivedError(frame, wall);
      case Kind.ACCEPTED:
      case Kind.ITEM:
      case Kind.CREDIT:
        if (!this.#requests.has(frame.stream)) {
          this.droppedUnknown += 1;
          return undefined;
        }
        return this.streams.receive(frame);
      case Kind.EVENT:
        return this.#receivedEvent(frame);
      case Kind.CALL:
      case Kind.WITHDRAW:
        return this.#receivedOfCall(frame, false, wall);
      case Kind.GOAWAY: {
        const goAway = readGoAway(frame.body, this.#maxDepth);
        this.state = nextState(this.state, "goaway");
        return { type: "goaway", ...goAway };
      }
      case Kind.WELCOME:
        throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME was sent twice");
      default:
    }
    requireNoBody(frame);
    if (frame.kind === Kind.PING) {
      this.#pongOwed = frame.token;
    } else {
      this.#keepalive.pongReceived();
    }
    return undefined;
  }

  #receivedOfCall(frame: Frame, isStale: boolean, wall: bigint): ClientEvent | undefined {
    const state = { isStale, isBlocked: this.isOutputBlocked };
    if (frame.kind === Kind.CALL) {
      return this.calls.receive(frame, state, wall);
    }
    requireNoBody(frame);
    const event = this.calls.withdraw(frame, state, wall);
    if (event === undefined) {
      this.droppedUnknown += 1;
    }
    return event;
  }

  #receivedEvent({ body, token }: Frame): ClientEvent {
    try {
      const { name, data } = decodeEvent(body, this.#maxDepth);
      if (name === "session.revoked") {
        this.#requests.sessionEnded(token);
      }
      return { type: "event", name, data, token, body };
    } catch (error) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, `EVENT is invalid: ${phraseOf(error)}`);
    }
  }

  #receivedError({ stream, body }: Frame, wall: bigint): ClientEvent | undefined {
    let message: ErrorMessage;
    try {
      message = decodeError(body, this.#maxDepth);
    } catch (error) {
      if (stream === 0) {
        throw new ProtocolError(Code.PROTOCOL_ERROR, `ERROR is invalid: ${phraseOf(error)}`);
      }
      message = invalidResponse(error);
    }
    if (message.code === Code.STALE_TIMESTAMP) {
      this.#correctClock(message.details["server_time"], wall);
    }
    if (stream === 0) {
      return this.#endWith(knownCode(message.code), message.message);
    }
    if (!this.#requests.has(stream)) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.#requests.failed(stream, message.code);
    this.streams.answered(stream);
    return { type: "error", stream, ...message };
  }

  #receivedFirst(frame: Frame, wall: bigint, now: number): ClientEvent {
    if (frame.kind !== Kind.WELCOME) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not WELCOME");
    }
    if (frame.counter !== 0n) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME must have counter 0");
    }
    if (frame.timestamp > MAX_SERVER_TIME) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the server's time is out of range");
    }
    const welcome = readWelcome(frame.body, this.#maxDepth);
    this.welcome = welcome;
    this.#freshness = new Freshness(frame.salt, 0n, this.#toleranceMs);
    this.#output.salt = frame.salt;
    this.#output.clockOffset = frame.timestamp - wall;
    this.#decoder.limit = this.#maxFrame;
    this.streams.maxItem = welcome.streams?.max_item ?? 0;
    this.calls.maxFrame = this.#requests.maxFrame = welcome.max_frame;
    this.#requests.maxStreams = welcome.max_streams;
    this.#accept(extensionsOf(welcome));
    this.#keepalive.start(welcome.idle_timeout_ms, now);
    this.state = nextState(this.state, "welcome");
    return { type: "welcomed", welcome };
  }

  // --- clock -------------------------------------------------------------------------------------

  #correctClock(serverTime: unknown, wall: bigint): void {
    if (isInt(serverTime) && serverTime >= 0 && serverTime <= MAX_SERVER_TIME) {
      this.#output.clockOffset = BigInt(serverTime) - wall;
    }
  }

  #accept(extensions: readonly Extension[]): void {
    this.#decoder.accepted = acceptedBy("client", extensions, this.streams.maxItem);
  }

  // --- requests ----------------------------------------------------------------------------------

  /**
   * Queue a REQUEST and return its stream, which identifies the response.
   *
   * Methods that open a session are sent without a token; that of `session.refresh` is the one that its response replaces. Throws InvalidArgument for a request that cannot be sent (if it is
   * too large, details have `size` and `limit`), ResourceExhausted if max_streams are in flight, Unavailable after GOAWAY,
   * ConnectionClosed after the end.
   */
  request(method: string, params: Params | null, token: Token, meta: Meta | undefined, wall: bigint): number {
    this.#openWelcome();
    this.#requests.requireRoom();
    return this.#requests.send(Kind.REQUEST, method, params, token, meta, wall);
  }

  /**
   * Queue a request that shows a token after its refresh, and return its stream. It is also sent while the server drains and while
   * max_streams are in flight: the token counts as shown even if the server refuses the request (zcp1.md, section 9.6). Throws
   * ConnectionClosed after the end.
   */
  show(method: string, params: Params | null, token: Token, wall: bigint): number {
    if (this.state !== "draining") {
      this.#openWelcome();
    }
    return this.#requests.send(Kind.REQUEST, method, params, token, undefined, wall);
  }

  /**
   * Queue an OPEN that grants `window`; `resume` makes it durable. Throws like `request`, and also Unimplemented if the server has
   * no such streams, ResourceExhausted if its `max_open` are in flight.
   */
  openStream(
    method: string,
    params: Params | null,
    token: Token,
    { window, ...meta }: Omit<Meta, "credit"> & { readonly window: Credit },
    wall: bigint,
  ): ItemStream {
    const { streams } = this.#openWelcome();
    if (streams === undefined) {
      throw new Unimplemented("this server has no streams");
    }
    if (meta.resume !== undefined && streams.durable !== true) {
      throw new Unimplemented("this server has no durable streams");
    }
    if (this.streams.size >= streams.max_open) {
      const details = { limit: streams.max_open };
      throw new ResourceExhausted("too many streams on this connection; close some", details);
    }
    this.#requests.requireRoom();
    const number = this.#requests.send(Kind.OPEN, method, params, token, { ...meta, credit: window }, wall);
    return this.streams.add(number, token, window, meta.resume);
  }

  /**
   * Queue a `session.handle`, which registers methods for calls of the server in the session of a token. `max` of them may run at
   * once. Throws like `request`, and also Unimplemented if the server calls no clients.
   */
  handle(token: Token, methods: readonly string[], max: number, wall: bigint): number {
    const welcome = this.#openWelcome();
    if (welcome.calls === undefined) {
      throw new Unimplemented("this server does not call clients");
    }
    const stream = this.request("session.handle", { methods, max }, token, undefined, wall);
    this.calls.register(token, methods);
    this.#accept([...extensionsOf(welcome), "calls"]);
    return stream;
  }

  /** Return WELCOME. Throws if no request can be sent now. */
  #openWelcome(): Welcome {
    if (this.state === "open" && this.welcome !== undefined) {
      return this.welcome;
    }
    if (this.state === "draining") {
      throw new Unavailable("the server accepts no new requests on this connection");
    }
    if (this.state === "closed") {
      throw new ConnectionClosed("the connection has ended");
    }
    throw new Unavailable("the server has not sent its WELCOME yet");
  }

  /** Replace the token of a session that was refreshed on another connection. */
  tokenRenewed(old: Token, token: Token): void {
    this.#requests.tokenRenewed(old, token);
    this.calls.tokenRenewed(old, token);
  }

  /** Forget the token of a session that has ended. */
  sessionEnded(token: Token): void {
    this.#requests.sessionEnded(token);
    this.calls.sessionEnded(token);
  }

  /** Queue a CANCEL, once for a stream of items. The request stays in flight until its response. */
  cancel(stream: number, wall: bigint): void {
    const token = this.#requests.sentToken(stream);
    if (token !== undefined && this.streams.leave(stream)) {
      this.#send(Kind.CANCEL, stream, token, EMPTY, wall);
    }
  }

  // --- time --------------------------------------------------------------------------------------

  /** Queue a PING. */
  ping(wall: bigint): void {
    if (this.state === "open" || this.state === "draining") {
      this.#send(Kind.PING, 0, NO_TOKEN, EMPTY, wall);
    }
  }

  /**
   * Return when to call `handleTimeout`, or Infinity. It changes only with WELCOME and `handleTimeout`.
   */
  nextDeadline(): number {
    return this.state === "closed" ? Number.POSITIVE_INFINITY : this.#keepalive.deadline;
  }

  /**
   * Send a PING on an idle connection, and end the connection after a PING without a response. Calling it early has no
   * effect.
   */
  handleTimeout(wall: bigint, now: number): ConnectionEnded | undefined {
    if (this.state === "closed") {
      return undefined;
    }
    const verdict = this.#keepalive.check(now);
    if (verdict === "unreachable") {
      return this.#endWith(undefined, "the server does not respond");
    }
    if (verdict === "ping" && !this.isOutputBlocked) {
      this.ping(wall);
      this.#keepalive.sentSinceCheck = false;
    }
    return undefined;
  }

  // --- the end -----------------------------------------------------------------------------------

  /** Handle the end of the transport, or announce that it will be closed after the queued bytes. */
  end(): void {
    this.state = nextState(this.state, "end");
  }

  #endWith(code: Code | undefined, reason: string): ConnectionEnded {
    this.state = nextState(this.state, "fatal");
    return { type: "ended", code, reason };
  }

  // --- bytes out ---------------------------------------------------------------------------------

  /** Send what waited for the transport. Call this when it can send again. */
  unblockOutput(wall: bigint): void {
    this.isOutputBlocked = false;
    if (this.#pongOwed !== undefined) {
      this.#sendPong(wall);
    }
  }

  #sendPong(wall: bigint): void {
    if (this.state !== "closed") {
      this.#send(Kind.PONG, 0, this.#pongOwed ?? NO_TOKEN, EMPTY, wall);
    }
    this.#pongOwed = undefined;
  }

  #send(kind: Kind, stream: number, token: Token, body: Uint8Array, wall: bigint): void {
    if (this.state !== "closed") {
      this.#keepalive.sentSinceCheck = true;
      this.#output.send(kind, stream, token, body, wall);
    }
  }

  /** Return all queued bytes, or undefined if the queue is empty. */
  dataToSend(): Buffer | undefined {
    return this.#output.take();
  }
}

/** Return what a client accepts after WELCOME, before it handles calls. */
function extensionsOf({ streams }: Welcome): Extension[] {
  if (streams === undefined) {
    return [];
  }
  return streams.durable === true ? ["streams", "durable"] : ["streams"];
}

function requireNoBody({ body }: Frame): void {
  if (body.length > 0) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame must not have a body");
  }
}

function invalidResponse(error: unknown): ErrorMessage {
  return { code: Code.INTERNAL, message: `the response is invalid: ${phraseOf(error)}`, details: {} };
}
