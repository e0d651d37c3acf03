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
 * - A stale answer fails its call with DATA_LOSS; any other stale frame is dropped and counted. The tenth consecutive one ends
 *   the connection. ERROR STALE_TIMESTAMP is processed even if it is stale itself, since it corrects the clock offset.
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
  InvalidArgument,
  knownCode,
  ProtocolError,
  ResourceExhausted,
  Unavailable,
} from "../errors.js";
import { decodeBody, MAX_DEPTH, MessageError } from "../wire/body.js";
import { FrameDecoder } from "../wire/decoder.js";
import {
  encodeFrame,
  type Frame,
  HEADER_SIZE,
  Kind,
  MAX_STREAM,
  MIN_LENGTH,
  NO_TOKEN,
  TOKEN_SIZE,
  type Token,
  tokenOf,
} from "../wire/frame.js";
import {
  decodeError,
  decodeEvent,
  type ErrorMessage,
  encodeRequest,
  isInt,
  isMap,
  type Meta,
  type Params,
} from "../wire/message.js";
import type { ClientEvent, ConnectionEnded } from "./events.js";
import { FloodLimit } from "./flood_limit.js";
import { Freshness, MAX_CONSECUTIVE_STALE } from "./freshness.js";
import { Keepalive } from "./keepalive.js";
import { nextState, type State } from "./state.js";
import { readGoAway, readWelcome, type Welcome } from "./welcome.js";

/** The largest `length` on a connection without a session, in both directions, whatever WELCOME allows. */
export const MAX_FRAME_BEFORE_SESSION = 16_384;

/** Milliseconds from the header of a frame to its last byte, after which the connection counts as lost. */
export const FRAME_TIMEOUT_MS = 300_000;

/** The largest accepted server time: timestamps derived from a larger one could exceed 64 bits. */
export const MAX_SERVER_TIME = 2n ** 62n;

const UINT64_MAX = 2n ** 64n - 1n;
const OPENING_METHODS: ReadonlySet<string> = new Set(["session.open", "session.refresh"]);
const OPENING: Token = ""; // marks a request that returns a token
const INVALID_TOKEN_CODES: ReadonlySet<number> = new Set([
  Code.UNAUTHENTICATED,
  Code.TOKEN_EXPIRED,
  Code.TOKEN_REVOKED,
  Code.SESSION_REPLACED,
]);
const STALE_ANSWER = "the answer was delayed for too long; check whether the request took effect";
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
  /** The offset of the server's clock from this one. */
  clockOffset = 0n;
  droppedStale = 0;
  droppedUnknown = 0;
  queuedBytes = 0;
  /** Whether the transport cannot send; call `unblockOutput` when it can again. */
  isOutputBlocked = false;
  /** The stream of the next request, unless it is in flight. */
  nextStream = 1;
  readonly #maxFrame: number;
  readonly #toleranceMs: number;
  readonly #maxDepth: number;
  readonly #decoder: FrameDecoder;
  #freshness: Freshness | undefined; // set by WELCOME
  #counter = 0n; // of the last frame sent
  #staleCount = 0;
  #partial: { readonly wall: bigint; readonly now: number } | undefined; // when the header of an incomplete frame arrived
  readonly #inFlight = new Map<number, Token>(); // stream -> the token of its request
  readonly #tokens = new Set<Token>(); // accepted by the server on this connection
  #out: Buffer[] = [];
  #pongOwed: Token | undefined; // the token of the latest PING without a PONG
  readonly #unrequested = new FloodLimit();
  readonly #keepalive = new Keepalive();

  constructor({ maxFrame = 1_048_576, toleranceMs = 30_000, maxDepth = MAX_DEPTH }: ConnectionSettings = {}) {
    this.#maxFrame = maxFrame;
    this.#toleranceMs = toleranceMs;
    this.#maxDepth = maxDepth;
    this.#decoder = new FrameDecoder("client", Math.min(maxFrame, MAX_FRAME_BEFORE_SESSION));
  }

  /** The salt, unique to this connection and part of device signatures. */
  get salt(): bigint {
    return this.#freshness?.salt ?? 0n;
  }

  /** The number of requests without a response. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** Whether the server has accepted a token on this connection. */
  get hasSession(): boolean {
    return this.#tokens.size > 0;
  }

  /** The largest `length` that can be sent now. */
  get sendLimit(): number {
    const limit = this.welcome?.max_frame ?? 0;
    return this.hasSession ? limit : Math.min(limit, MAX_FRAME_BEFORE_SESSION);
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
      if (!this.#correctsClock(frame)) {
        return this.#receivedStale(frame);
      }
    }
    this.#staleCount = 0;
    this.#keepalive.received(now);
    if (!this.#inFlight.has(frame.stream)) {
      this.#unrequested.count(frame.body.length, now);
    }
    return frame.kind === Kind.RESPONSE ? this.#receivedResponse(frame) : this.#receivedOther(frame, wall);
  }

  /** Return the time for which to stop reading, because of a flood of frames that answer no request. */
  readingDelay(now: number): number {
    return this.#unrequested.delay(now);
  }

  #receivedStale({ kind, stream }: Frame): ClientEvent | undefined {
    this.#staleCount += 1;
    if (this.#staleCount >= MAX_CONSECUTIVE_STALE) {
      throw new ProtocolError(Code.STALE_TIMESTAMP, "ten consecutive stale frames");
    }
    if ((kind === Kind.RESPONSE || kind === Kind.ERROR) && this.#inFlight.delete(stream)) {
      return { type: "error", stream, code: Code.DATA_LOSS, message: STALE_ANSWER, details: {} };
    }
    this.droppedStale += 1;
    return undefined;
  }

  #receivedResponse({ stream, body }: Frame): ClientEvent | undefined {
    const requestToken = this.#inFlight.get(stream);
    if (requestToken === undefined) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.#inFlight.delete(stream);
    let value: unknown;
    try {
      value = decodeBody(body, { maxDepth: this.#maxDepth });
    } catch (error) {
      return { type: "error", stream, ...invalidResponse(error) };
    }
    if (!this.#tokens.has(requestToken)) {
      this.#tokenAccepted(requestToken, value);
    }
    return { type: "response", stream, value };
  }

  /** Handle a fresh frame other than RESPONSE. */
  #receivedOther(frame: Frame, wall: bigint): ClientEvent | undefined {
    switch (frame.kind) {
      case Kind.ERROR:
        return this.#receivedError(frame, wall);
      case Kind.EVENT:
        return this.#receivedEvent(frame);
      case Kind.GOAWAY: {
        const goAway = readGoAway(frame.body, this.#maxDepth);
        this.state = nextState(this.state, "goaway");
        return { type: "goaway", ...goAway };
      }
      case Kind.WELCOME:
        throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME was sent twice");
      default:
    }
    if (frame.body.length > 0) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame must not have a body");
    }
    if (frame.kind === Kind.PING) {
      this.#pongOwed = frame.token;
    } else {
      this.#keepalive.pongReceived();
    }
    return undefined;
  }

  #receivedEvent({ body, token }: Frame): ClientEvent {
    try {
      const { name, data } = decodeEvent(body, this.#maxDepth);
      if (name === "session.revoked") {
        this.#tokens.delete(token);
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
    const requestToken = this.#inFlight.get(stream);
    if (requestToken === undefined) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.#inFlight.delete(stream);
    if (INVALID_TOKEN_CODES.has(message.code)) {
      this.#tokens.delete(requestToken);
    }
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
    this.clockOffset = frame.timestamp - wall;
    this.#decoder.limit = this.#maxFrame;
    this.#keepalive.start(welcome.idle_timeout_ms, now);
    this.state = nextState(this.state, "welcome");
    return { type: "welcomed", welcome };
  }

  // --- clock -------------------------------------------------------------------------------------

  /** Return whether a stale frame is an ERROR STALE_TIMESTAMP, which is processed all the same. */
  #correctsClock({ kind, body }: Frame): boolean {
    if (kind !== Kind.ERROR) {
      return false;
    }
    try {
      return decodeError(body, this.#maxDepth).code === Code.STALE_TIMESTAMP;
    } catch (error) {
      phraseOf(error);
      return false; // dropped like any other stale frame
    }
  }

  #correctClock(serverTime: unknown, wall: bigint): void {
    if (isInt(serverTime) && serverTime >= 0 && serverTime <= MAX_SERVER_TIME) {
      this.clockOffset = BigInt(serverTime) - wall;
    }
  }

  // --- requests ----------------------------------------------------------------------------------

  /**
   * Queue a REQUEST and return its stream, which identifies the response.
   *
   * Methods that open a session are sent without a token. Throws InvalidArgument for a request that cannot be sent (if it is
   * too large, details have `size` and `limit`), ResourceExhausted if max_streams are in flight, Unavailable after GOAWAY,
   * ConnectionClosed after the end.
   */
  request(method: string, params: Params | null, token: Token, meta: Meta | undefined, wall: bigint): number {
    const { welcome } = this;
    if (this.state !== "open" || welcome === undefined) {
      throw this.#notOpenError();
    }
    if (this.#inFlight.size >= welcome.max_streams) {
      throw new ResourceExhausted("too many requests in flight on this connection");
    }
    let body: Uint8Array;
    try {
      body = encodeRequest(method, params, meta);
    } catch (error) {
      throw new InvalidArgument(phraseOf(error), {}, { cause: error });
    }
    this.#checkSize(MIN_LENGTH + body.length);
    const stream = this.#freeStream();
    if (OPENING_METHODS.has(method)) {
      this.#inFlight.set(stream, OPENING);
      this.#send(Kind.REQUEST, stream, NO_TOKEN, body, wall);
    } else {
      this.#inFlight.set(stream, token);
      this.#send(Kind.REQUEST, stream, token, body, wall);
    }
    return stream;
  }

  #notOpenError(): Error {
    if (this.state === "draining") {
      return new Unavailable("the server accepts no new requests on this connection");
    }
    if (this.state === "closed") {
      return new ConnectionClosed("the connection has ended");
    }
    return new Unavailable("the server has not sent its WELCOME yet");
  }

  #checkSize(size: number): void {
    const limit = this.sendLimit;
    if (size > limit) {
      throw new InvalidArgument(`the request has ${size} bytes; the server accepts ${limit}`, { size, limit });
    }
  }

  #freeStream(): number {
    let stream = this.nextStream;
    while (this.#inFlight.has(stream)) {
      stream = stream === MAX_STREAM ? 1 : stream + 1;
    }
    this.nextStream = stream === MAX_STREAM ? 1 : stream + 1;
    return stream;
  }

  /** Record the token that a RESPONSE shows to be accepted: that of its request, or the one it returns. */
  #tokenAccepted(requestToken: Token, value: unknown): void {
    let accepted = requestToken;
    if (requestToken === OPENING) {
      const issued = isMap(value) ? value["token"] : undefined;
      if (!(issued instanceof Uint8Array) || issued.length !== TOKEN_SIZE) {
        return;
      }
      accepted = tokenOf(issued);
    }
    if (accepted !== NO_TOKEN) {
      this.#tokens.add(accepted);
    }
  }

  /** Forget the token of a session that has ended. */
  sessionEnded(token: Token): void {
    this.#tokens.delete(token);
  }

  /** Queue a CANCEL. The request stays in flight until its response. */
  cancel(stream: number, wall: bigint): void {
    const token = this.#inFlight.get(stream);
    if (token !== undefined && this.state !== "closed") {
      this.#send(Kind.CANCEL, stream, token === OPENING ? NO_TOKEN : token, EMPTY, wall);
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
    this.#counter += 1n;
    this.#keepalive.sentSinceCheck = true;
    const time = wall + this.clockOffset;
    // The local clock may have been set to any time; the field has 64 bits.
    const timestamp = time < 0n ? 0n : time > UINT64_MAX ? UINT64_MAX : time;
    const frame = encodeFrame(kind, stream, timestamp, this.salt, this.#counter, token, body);
    this.queuedBytes += frame.length;
    this.#out.push(frame);
  }

  /** Return all queued bytes, or undefined if the queue is empty. */
  dataToSend(): Buffer | undefined {
    const out = this.#out;
    if (out.length === 0) {
      return undefined;
    }
    this.#out = [];
    this.queuedBytes = 0;
    return out.length === 1 ? out[0] : Buffer.concat(out);
  }
}

/** Return the phrase of a MessageError. Any other error is a bug and is rethrown. */
function phraseOf(error: unknown): string {
  if (error instanceof MessageError) {
    return error.message;
  }
  throw error;
}

function invalidResponse(error: unknown): ErrorMessage {
  return { code: Code.INTERNAL, message: `the response is invalid: ${phraseOf(error)}`, details: {} };
}
