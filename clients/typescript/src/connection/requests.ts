/**
 * The requests of one connection without a response, and the tokens that the server has accepted there.
 *
 * A request is a REQUEST or an OPEN: their numbers are one space.
 */

import { Code, InvalidArgument, ResourceExhausted } from "../errors.js";
import { phraseOf } from "../wire/body.js";
import { type Kind, MAX_STREAM, MIN_LENGTH, NO_TOKEN, TOKEN_SIZE, type Token, tokenOf } from "../wire/frame.js";
import { encodeRequest, isMap, type Meta, type Params } from "../wire/message.js";
import type { Send } from "./output.js";

/** The largest `length` on a connection without a session, in both directions, whatever WELCOME allows. */
export const MAX_FRAME_BEFORE_SESSION = 16_384;

const OPENING_METHODS: ReadonlySet<string> = new Set(["session.open", "session.refresh"]);
const OPENING: Token = ""; // marks a request that returns a token
const REFRESH = "session.refresh";
const INVALID_TOKEN_CODES: ReadonlySet<number> = new Set([
  Code.UNAUTHENTICATED,
  Code.TOKEN_EXPIRED,
  Code.TOKEN_REVOKED,
  Code.SESSION_REPLACED,
]);

export class Requests {
  /** Limits of the server. */
  maxStreams = 0;
  maxFrame = 0;
  /** The number of the next request, unless it is in flight. */
  next = 1;
  readonly #send: Send;
  readonly #inFlight = new Map<number, Token>(); // number -> the token of its request
  readonly #tokens = new Set<Token>();
  readonly #refreshing = new Map<number, Token>(); // number -> the token that the response replaces

  constructor(send: Send) {
    this.#send = send;
  }

  /** The number of requests in flight. */
  get size(): number {
    return this.#inFlight.size;
  }

  /** Whether the server has accepted a token. */
  get hasSession(): boolean {
    return this.#tokens.size > 0;
  }

  /** The largest `length` that can be sent now. */
  get sendLimit(): number {
    return this.hasSession ? this.maxFrame : Math.min(this.maxFrame, MAX_FRAME_BEFORE_SESSION);
  }

  has(number: number): boolean {
    return this.#inFlight.has(number);
  }

  /** Throws ResourceExhausted if the server runs no further request. */
  requireRoom(): void {
    if (this.#inFlight.size >= this.maxStreams) {
      throw new ResourceExhausted("too many requests in flight on this connection");
    }
  }

  /** Send a REQUEST or an OPEN, and return its number. Throws InvalidArgument. */
  send(kind: Kind, method: string, params: Params | null, token: Token, meta: Meta | undefined, wall: bigint): number {
    let body: Uint8Array;
    try {
      body = encodeRequest(method, params, meta);
    } catch (error) {
      throw new InvalidArgument(phraseOf(error), {}, { cause: error });
    }
    const size = MIN_LENGTH + body.length;
    const limit = this.sendLimit;
    if (size > limit) {
      throw new InvalidArgument(`the request has ${size} bytes; the server accepts ${limit}`, { size, limit });
    }
    const number = this.#freeNumber();
    const isOpening = OPENING_METHODS.has(method);
    this.#inFlight.set(number, isOpening ? OPENING : token);
    if (method === REFRESH) {
      this.#refreshing.set(number, token);
    }
    this.#send(kind, number, isOpening ? NO_TOKEN : token, body, wall);
    return number;
  }

  #freeNumber(): number {
    let number = this.next;
    while (this.#inFlight.has(number)) {
      number = number === MAX_STREAM ? 1 : number + 1;
    }
    this.next = number === MAX_STREAM ? 1 : number + 1;
    return number;
  }

  /** Return the token that a request was sent with, or undefined if it is not in flight. */
  sentToken(number: number): Token | undefined {
    const token = this.#inFlight.get(number);
    return token === OPENING ? NO_TOKEN : token;
  }

  /** Remove a request that was answered. Return false if it is not in flight. */
  remove(number: number): boolean {
    if (this.#refreshing.size > 0) {
      this.#refreshing.delete(number);
    }
    return this.#inFlight.delete(number);
  }

  /**
   * Remove a request after its RESPONSE, which shows that the server accepts its token. For `session.refresh`, return the old
   * and the new token of the session.
   */
  succeeded(number: number, value: unknown): readonly [Token, Token] | undefined {
    const token = this.#inFlight.get(number);
    const replaced = this.#refreshing.get(number);
    this.remove(number);
    if (token === undefined || this.#tokens.has(token)) {
      return undefined;
    }
    const accepted = token === OPENING ? issuedToken(value) : token;
    if (accepted === NO_TOKEN) {
      return undefined;
    }
    this.#tokens.add(accepted);
    if (replaced === undefined) {
      return undefined;
    }
    this.#tokens.delete(replaced);
    return [replaced, accepted];
  }

  /** Remove a request that failed with an error of the server. */
  failed(number: number, code: number): void {
    const token = this.#inFlight.get(number);
    this.remove(number);
    if (token !== undefined && INVALID_TOKEN_CODES.has(code)) {
      this.#tokens.delete(token);
    }
  }

  /** Replace a token that was refreshed on another connection. */
  tokenRenewed(old: Token, token: Token): void {
    if (this.#tokens.delete(old)) {
      this.#tokens.add(token);
    }
  }

  /** Forget the token of a session that has ended. */
  sessionEnded(token: Token): void {
    this.#tokens.delete(token);
  }
}

/** Return the token in the result of `session.open` or `session.refresh`; NO_TOKEN without one. */
function issuedToken(value: unknown): Token {
  const token = isMap(value) ? value["token"] : undefined;
  return token instanceof Uint8Array && token.length === TOKEN_SIZE ? tokenOf(token) : NO_TOKEN;
}
