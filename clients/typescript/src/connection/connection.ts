/**
 * The client's end of a conversation: bytes and time in; events, bytes and the next deadline out.
 *
 * What it decides: the greeting, the clock offset, freshness of what the server sends, which request an answer belongs
 * to, what may be sent now (streams in flight, frame size), keepalive, and what ends the connection.
 *
 * What it must not know: sockets, TLS, clocks, retries, sessions beyond their tokens.
 *
 * Rules where the contract leaves the choice to a client:
 *
 * - A client has no ERROR to send. On a fault of the server it just ends, and says why to what is above it.
 * - A RESPONSE or ERROR with a body that cannot be read fails its own call with INTERNAL (it may have run). A WELCOME,
 *   GOAWAY, EVENT or ERROR on stream 0 that cannot be read ends the connection.
 * - A stale frame is dropped and counted, and the tenth in a row ends the connection. ERROR STALE_TIMESTAMP is heard
 *   whatever its own timestamp says: it is what sets the clock offset right.
 * - Before a RESPONSE has shown that the server took a token here, the limit of a connection without a session holds for
 *   what is sent.
 *
 * `wall` is our own clock, milliseconds since the Unix epoch; `now` is monotonic, in milliseconds.
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
import { Freshness, MAX_STALE_IN_A_ROW } from "./freshness.js";
import { nextState, type State } from "./state.js";
import { readGoAway, readWelcome, type Welcome } from "./welcome.js";

/** Largest `length` on a connection without a session, both ways: WELCOME does not tell another. */
export const MAX_FRAME_BEFORE_SESSION = 16_384;

/** Milliseconds of silence after a PING, after which the server is taken for dead. */
export const PONG_TIMEOUT_MS = 10_000;

/** A server with a tiny idle timeout must not make its clients flood it. */
export const MIN_KEEPALIVE_INTERVAL_MS = 250;

/** A server's clock beyond this is refused: timestamps made from it could outgrow their 64 bits. */
export const MAX_SERVER_TIME = 2n ** 62n;

const UINT64_MAX = 2n ** 64n - 1n;
const OPENING_METHODS: ReadonlySet<string> = new Set(["session.open", "session.refresh"]);
const OPENING: Token = ""; // stands for the token of a request that is sent with none to get one
const DEAD_TOKEN_CODES: ReadonlySet<number> = new Set([
  Code.UNAUTHENTICATED,
  Code.TOKEN_EXPIRED,
  Code.TOKEN_REVOKED,
  Code.SESSION_REPLACED,
]);
const EMPTY = new Uint8Array(0);

export interface ConnectionSettings {
  /** The largest `length` accepted from the server once its WELCOME was read. */
  readonly maxFrame?: number;
  /** How far the server's timestamps may be off our estimate of its clock. */
  readonly toleranceMs?: number;
  readonly maxDepth?: number;
}

/**
 * One conversation with a server. Nothing may be requested before the `welcomed` event. Bytes for the server gather
 * until `dataToSend` takes them.
 */
export class ClientConnection {
  state: State = "awaiting_welcome";
  welcome: Welcome | undefined;
  /** The server's clock minus ours. */
  clockOffset = 0n;
  droppedStale = 0;
  droppedUnknown = 0;
  queuedBytes = 0;
  /** The stream of the next request, unless that is in flight. Any that a stream can have will do. */
  nextStream = 1;
  readonly #maxFrame: number;
  readonly #toleranceMs: number;
  readonly #maxDepth: number;
  readonly #decoder: FrameDecoder;
  #freshness: Freshness | undefined; // from WELCOME on
  #counter = 0n; // of the last frame sent; the first has 1
  #staleInARow = 0;
  readonly #inFlight = new Map<number, Token>(); // stream -> the token that its request carried
  readonly #tokens = new Set<Token>(); // those that the server took on this connection
  #out: Buffer[] = [];
  #lastHeard = 0;
  #sentSinceLook = false;
  #keepaliveInterval = Number.POSITIVE_INFINITY;
  #keepaliveAt = Number.POSITIVE_INFINITY;
  #pongDeadline = Number.POSITIVE_INFINITY;

  constructor({ maxFrame = 1_048_576, toleranceMs = 30_000, maxDepth = MAX_DEPTH }: ConnectionSettings = {}) {
    this.#maxFrame = maxFrame;
    this.#toleranceMs = toleranceMs;
    this.#maxDepth = maxDepth;
    this.#decoder = new FrameDecoder("client", Math.min(maxFrame, MAX_FRAME_BEFORE_SESSION));
  }

  /** What no other connection has: proofs are made for it. */
  get salt(): bigint {
    return this.#freshness?.salt ?? 0n;
  }

  /** Requests without their answers yet. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** Whether the server is known to have taken a token on this connection. */
  get hasSession(): boolean {
    return this.#tokens.size > 0;
  }

  /** The largest `length` that the server takes now. */
  get sendLimit(): number {
    const limit = this.welcome?.max_frame ?? 0;
    return this.hasSession ? limit : Math.min(limit, MAX_FRAME_BEFORE_SESSION);
  }

  // --- what arrives -----------------------------------------------------------------------------

  /** Take in decrypted bytes; returns what they mean. Bytes after the end mean nothing. */
  receiveData(data: Buffer, wall: bigint, now: number): ClientEvent[] {
    const events: ClientEvent[] = [];
    if (this.state === "closed") {
      return events;
    }
    try {
      this.#decoder.feed(data);
      for (let frame = this.#decoder.next(); frame !== undefined; frame = this.#decoder.next()) {
        const event = this.#received(frame, wall, now);
        if (event !== undefined) {
          events.push(event);
          if (event.type === "ended") {
            break;
          }
        }
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) {
        throw error;
      }
      events.push(this.#endWith(error.code, error.reason));
    }
    return events;
  }

  #received(frame: Frame, wall: bigint, now: number): ClientEvent | undefined {
    const freshness = this.#freshness;
    if (freshness === undefined) {
      return this.#receivedFirst(frame, wall, now);
    }
    const serverTime = wall + this.clockOffset;
    const verdict = freshness.judge(frame.salt, frame.counter, frame.timestamp, serverTime);
    if (verdict !== "fresh") {
      if (verdict === "other_salt") {
        throw new ProtocolError(Code.REPLAYED, "nonce belongs to another connection");
      }
      if (verdict === "counter_used") {
        throw new ProtocolError(Code.REPLAYED, "nonce counter did not grow");
      }
      if (!this.#correctsClock(frame)) {
        this.#countStale();
        return undefined;
      }
    }
    this.#staleInARow = 0;
    this.#lastHeard = now;
    return frame.kind === Kind.RESPONSE ? this.#receivedResponse(frame) : this.#receivedOther(frame, wall);
  }

  #countStale(): void {
    this.droppedStale += 1;
    this.#staleInARow += 1;
    if (this.#staleInARow >= MAX_STALE_IN_A_ROW) {
      throw new ProtocolError(Code.STALE_TIMESTAMP, "ten stale frames in a row");
    }
  }

  #receivedResponse({ stream, body }: Frame): ClientEvent | undefined {
    const sentWith = this.#inFlight.get(stream);
    if (sentWith === undefined) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.#inFlight.delete(stream);
    let value: unknown;
    try {
      value = decodeBody(body, { maxDepth: this.#maxDepth });
    } catch (error) {
      return { type: "error", stream, ...unreadable(error) };
    }
    if (!this.#tokens.has(sentWith)) {
      this.#tokenTaken(sentWith, value);
    }
    return { type: "response", stream, value };
  }

  /** A fresh frame that is no RESPONSE. */
  #receivedOther(frame: Frame, wall: bigint): ClientEvent | undefined {
    switch (frame.kind) {
      case Kind.ERROR:
        return this.#receivedError(frame, wall);
      case Kind.EVENT:
        return this.#receivedEvent(frame);
      case Kind.GOAWAY: {
        const said = readGoAway(frame.body, this.#maxDepth);
        this.state = nextState(this.state, "goaway");
        return { type: "goaway", ...said };
      }
      case Kind.WELCOME:
        throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME came twice");
      default:
    }
    if (frame.body.length > 0) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame has no body");
    }
    if (frame.kind === Kind.PING) {
      this.#send(Kind.PONG, 0, frame.token, EMPTY, wall);
    } else {
      this.#pongDeadline = Number.POSITIVE_INFINITY;
    }
    return undefined;
  }

  #receivedEvent({ body, token }: Frame): ClientEvent {
    try {
      const { name, data } = decodeEvent(body, this.#maxDepth);
      if (name === "session.revoked") {
        this.#tokens.delete(token);
      }
      return { type: "event", name, data, token };
    } catch (error) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, `EVENT cannot be read: ${phraseOf(error)}`);
    }
  }

  #receivedError({ stream, body }: Frame, wall: bigint): ClientEvent | undefined {
    let said: ErrorMessage;
    try {
      said = decodeError(body, this.#maxDepth);
    } catch (error) {
      if (stream === 0) {
        throw new ProtocolError(Code.PROTOCOL_ERROR, `ERROR cannot be read: ${phraseOf(error)}`);
      }
      said = unreadable(error);
    }
    if (said.code === Code.STALE_TIMESTAMP) {
      this.#correctClock(said.details["server_time"], wall);
    }
    if (stream === 0) {
      return this.#endWith(knownCode(said.code), said.message);
    }
    const sentWith = this.#inFlight.get(stream);
    if (sentWith === undefined) {
      this.droppedUnknown += 1;
      return undefined;
    }
    this.#inFlight.delete(stream);
    if (DEAD_TOKEN_CODES.has(said.code)) {
      this.#tokens.delete(sentWith);
    }
    return { type: "error", stream, ...said };
  }

  #receivedFirst(frame: Frame, wall: bigint, now: number): ClientEvent {
    if (frame.kind !== Kind.WELCOME) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not WELCOME");
    }
    if (frame.counter !== 0n) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME must have counter 0");
    }
    if (frame.timestamp > MAX_SERVER_TIME) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the server's clock is beyond all years");
    }
    const welcome = readWelcome(frame.body, this.#maxDepth);
    this.welcome = welcome;
    this.#freshness = new Freshness(frame.salt, 0n, this.#toleranceMs);
    this.clockOffset = frame.timestamp - wall;
    this.#decoder.limit = this.#maxFrame;
    this.#lastHeard = now;
    if (welcome.idle_timeout_ms > 0) {
      this.#keepaliveInterval = Math.max(welcome.idle_timeout_ms / 3, MIN_KEEPALIVE_INTERVAL_MS);
      this.#keepaliveAt = now + this.#keepaliveInterval;
    }
    this.state = nextState(this.state, "welcome");
    return { type: "welcomed", welcome };
  }

  // --- clock ------------------------------------------------------------------------------------

  /** Whether a frame that is not fresh is an ERROR STALE_TIMESTAMP, which is heard all the same. */
  #correctsClock({ kind, body }: Frame): boolean {
    if (kind !== Kind.ERROR) {
      return false;
    }
    try {
      return decodeError(body, this.#maxDepth).code === Code.STALE_TIMESTAMP;
    } catch (error) {
      phraseOf(error);
      return false; // dropped as stale, like any other
    }
  }

  #correctClock(serverTime: unknown, wall: bigint): void {
    if (isInt(serverTime) && serverTime >= 0 && serverTime <= MAX_SERVER_TIME) {
      this.clockOffset = BigInt(serverTime) - wall;
    }
  }

  // --- requests ---------------------------------------------------------------------------------

  /**
   * Queue a REQUEST; returns its stream, by which its answer is known.
   *
   * The methods that open a session are sent without a token whatever `token` is. Throws InvalidArgument for what cannot
   * be sent (if it is too large, its details have `size` and `limit`), ResourceExhausted if as many are in flight as the
   * server allows, Unavailable after GOAWAY, ConnectionClosed after the end.
   */
  request(method: string, params: Params | null, token: Token, meta: Meta | undefined, wall: bigint): number {
    const { welcome } = this;
    if (this.state !== "open" || welcome === undefined) {
      throw this.#refusal();
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

  #refusal(): Error {
    if (this.state === "draining") {
      return new Unavailable("the server takes no new requests on this connection");
    }
    if (this.state === "closed") {
      return new ConnectionClosed("the connection has ended");
    }
    return new Unavailable("the server has not sent its WELCOME yet");
  }

  #checkSize(size: number): void {
    const limit = this.sendLimit;
    if (size > limit) {
      throw new InvalidArgument(`the request has ${size} bytes, and the server takes ${limit}`, { size, limit });
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

  /** A RESPONSE shows that the server took its request's token, or gave one. */
  #tokenTaken(sentWith: Token, value: unknown): void {
    let taken = sentWith;
    if (sentWith === OPENING) {
      const given = isMap(value) ? value["token"] : undefined;
      if (!(given instanceof Uint8Array) || given.length !== TOKEN_SIZE) {
        return;
      }
      taken = tokenOf(given);
    }
    if (taken !== NO_TOKEN) {
      this.#tokens.add(taken);
    }
  }

  /** A session is over, as its user knows: it no longer counts as one that this connection has. */
  sessionEnded(token: Token): void {
    this.#tokens.delete(token);
  }

  /** Queue a CANCEL. The request stays in flight until its answer comes. */
  cancel(stream: number, wall: bigint): void {
    const token = this.#inFlight.get(stream);
    if (token !== undefined && this.state !== "closed") {
      this.#send(Kind.CANCEL, stream, token === OPENING ? NO_TOKEN : token, EMPTY, wall);
    }
  }

  // --- time -------------------------------------------------------------------------------------

  /** Queue a PING. */
  ping(wall: bigint): void {
    if (this.state === "open" || this.state === "draining") {
      this.#send(Kind.PING, 0, NO_TOKEN, EMPTY, wall);
    }
  }

  /**
   * When `handleTimeout` must be called at the latest; infinite if it need not. It changes with WELCOME and with each
   * `handleTimeout` only.
   */
  nextDeadline(): number {
    return this.state === "closed" ? Number.POSITIVE_INFINITY : Math.min(this.#keepaliveAt, this.#pongDeadline);
  }

  /**
   * Do what is due: a PING after a silence, the end after a PING that brought nothing.
   *
   * It looks at the connection in intervals of a third of the server's idle timeout. A PING goes out if since the last
   * look nothing was sent or nothing was heard, so no silence lasts two thirds of it. Calling it early does nothing.
   */
  handleTimeout(wall: bigint, now: number): ConnectionEnded | undefined {
    if (this.state === "closed") {
      return undefined;
    }
    if (this.#pongDeadline <= now) {
      if (this.#lastHeard <= this.#pongDeadline - PONG_TIMEOUT_MS) {
        return this.#endWith(undefined, "the server does not answer");
      }
      this.#pongDeadline = Number.POSITIVE_INFINITY; // other frames have shown that it lives
    }
    if (this.#keepaliveAt <= now) {
      const heardSinceLook = this.#lastHeard > this.#keepaliveAt - this.#keepaliveInterval;
      if (!(this.#sentSinceLook && heardSinceLook)) {
        this.ping(wall);
        if (this.#pongDeadline === Number.POSITIVE_INFINITY) {
          this.#pongDeadline = now + PONG_TIMEOUT_MS;
        }
      }
      this.#sentSinceLook = false;
      this.#keepaliveAt = now + this.#keepaliveInterval;
    }
    return undefined;
  }

  // --- the end ----------------------------------------------------------------------------------

  /** The transport is gone, or about to be closed after what is queued. */
  end(): void {
    this.state = nextState(this.state, "end");
  }

  #endWith(code: Code | undefined, reason: string): ConnectionEnded {
    this.state = nextState(this.state, "fatal");
    return { type: "ended", code, reason };
  }

  // --- bytes out --------------------------------------------------------------------------------

  #send(kind: Kind, stream: number, token: Token, body: Uint8Array, wall: bigint): void {
    this.#counter += 1n;
    this.#sentSinceLook = true;
    const time = wall + this.clockOffset;
    // Our clock may go anywhere meanwhile; the field holds 64 bits.
    const timestamp = time < 0n ? 0n : time > UINT64_MAX ? UINT64_MAX : time;
    const frame = encodeFrame(kind, stream, timestamp, this.salt, this.#counter, token, body);
    this.queuedBytes += frame.length;
    this.#out.push(frame);
  }

  /** All bytes for the server that were not taken yet; undefined if there are none. */
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

/** The phrase of a MessageError. Any other error is a bug here, and is thrown. */
function phraseOf(error: unknown): string {
  if (error instanceof MessageError) {
    return error.message;
  }
  throw error;
}

function unreadable(error: unknown): ErrorMessage {
  return { code: Code.INTERNAL, message: `the answer cannot be read: ${phraseOf(error)}`, details: {} };
}
