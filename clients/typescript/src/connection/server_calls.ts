/**
 * The calls of the server on one connection at the client (zcp1.md, section 19).
 *
 * Decides: which calls are refused at once, and which are in flight.
 * Must not know: the handlers, and how many of them may run.
 */

import {
  type CallError,
  Cancelled,
  Code,
  DeadlineExceeded,
  InternalError,
  InvalidArgument,
  ProtocolError,
  StaleTimestamp,
  Unauthenticated,
  Unimplemented,
} from "../errors.js";
import { encodeBody, phraseOf } from "../wire/body.js";
import { type Frame, Kind, MIN_LENGTH, NO_TOKEN, type Token } from "../wire/frame.js";
import { decodeRequest, type RequestMessage } from "../wire/message.js";
import type { CallReceived, CallWithdrawn } from "./events.js";
import type { Send } from "./output.js";

/** The largest code of a FAILURE, apart from STALE_TIMESTAMP. */
const MAX_FAILURE_CODE = 16;

/** How many FAILUREs of calls that were not run may wait for a server that does not read. */
export const MAX_BLOCKED_REFUSALS = 1_000;

interface CallState {
  /** Whether the frame is stale. */
  readonly isStale: boolean;
  /** Whether the server reads nothing. */
  readonly isBlocked: boolean;
}

interface Registration {
  readonly methods: ReadonlySet<string>;
  /** The token before the last refresh: calls with it may be under way. */
  readonly previous?: Token;
}

export class ServerCalls {
  /** The largest `length` that the server accepts. */
  maxFrame = 0;
  #blockedRefusals = 0;
  readonly #registrations = new Map<Token, Registration>(); // by the token of their session
  readonly #inFlight = new Map<number, Token>();
  readonly #send: Send;
  readonly #maxDepth: number;

  constructor(send: Send, maxDepth: number) {
    this.#send = send;
    this.#maxDepth = maxDepth;
  }

  /** The number of calls without an answer. */
  get size(): number {
    return this.#inFlight.size;
  }

  // --- sessions ----------------------------------------------------------------------------------

  /** Register the methods of a session, in place of earlier ones. */
  register(token: Token, methods: Iterable<string>): void {
    this.#registrations.set(token, { methods: new Set(methods) });
  }

  /** Accept calls with a newer token of the session. */
  tokenRenewed(old: Token, token: Token): void {
    const registration = this.#registrations.get(old);
    if (registration !== undefined) {
      this.#registrations.delete(registration.previous ?? NO_TOKEN);
      this.#registrations.set(token, { methods: registration.methods, previous: old });
    }
  }

  sessionEnded(token: Token): void {
    this.#registrations.delete(this.#registrations.get(token)?.previous ?? NO_TOKEN);
    this.#registrations.delete(token);
  }

  // --- receiving ---------------------------------------------------------------------------------

  /** Process a CALL. Return undefined if it was refused by FAILURE. Throws ProtocolError if its number is in flight. */
  receive(frame: Frame, { isStale, isBlocked }: CallState, wall: bigint): CallReceived | undefined {
    const { stream, token } = frame;
    if (this.#inFlight.has(stream)) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the number of this CALL is in flight");
    }
    this.#inFlight.set(stream, token);
    const call = isStale ? new StaleTimestamp("the call was delayed for too long") : this.#parse(frame);
    if (call instanceof Error) {
      this.#refuse(stream, call, isBlocked, wall);
      return undefined;
    }
    return call;
  }

  #parse({ stream, token, body }: Frame): CallReceived | CallError {
    const methods = this.#registrations.get(token)?.methods;
    if (methods === undefined) {
      return new Unauthenticated("no session of this client has this token");
    }
    let call: RequestMessage;
    try {
      call = decodeRequest(body, this.#maxDepth);
    } catch (error) {
      return new InvalidArgument(`the call is invalid: ${phraseOf(error)}`);
    }
    const { method, params, meta } = call;
    const { deadline_ms: deadlineMs, traceparent } = meta;
    if (deadlineMs === undefined) {
      return new InvalidArgument("the call is invalid: deadline_ms is missing");
    }
    if (deadlineMs <= 0) {
      return new DeadlineExceeded("the deadline of the call has passed");
    }
    if (!methods.has(method)) {
      return new Unimplemented("this client does not handle this method");
    }
    return { type: "call", stream, token, method, params, deadlineMs, traceparent };
  }

  /** Process a WITHDRAW. Return undefined if the call was answered before. */
  withdraw({ stream, token }: Frame, { isBlocked }: CallState, wall: bigint): CallWithdrawn | undefined {
    if (this.#inFlight.get(stream) !== token) {
      return undefined;
    }
    this.#refuse(stream, new Cancelled("the server has withdrawn the call"), isBlocked, wall);
    return { type: "withdrawn", stream };
  }

  /** Send a FAILURE that the server causes. Throws ProtocolError if it reads none of many. */
  #refuse(number: number, error: CallError, isBlocked: boolean, wall: bigint): void {
    this.#blockedRefusals = isBlocked ? this.#blockedRefusals + 1 : 0;
    if (this.#blockedRefusals > MAX_BLOCKED_REFUSALS) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "the server calls, but reads no answers");
    }
    this.fail(number, error, wall);
  }

  // --- sending -----------------------------------------------------------------------------------

  /** Answer a call with its result, or with INTERNAL if that cannot be sent. Does nothing after an answer. */
  answer(number: number, value: unknown, wall: bigint): void {
    try {
      const body = encodeBody(value);
      if (MIN_LENGTH + body.length <= this.maxFrame) {
        this.#answer(Kind.RESULT, number, body, wall);
      } else {
        this.fail(number, new InternalError("the result is too large"), wall);
      }
    } catch (error) {
      this.fail(number, new InternalError(`the result cannot be sent: ${phraseOf(error)}`), wall);
    }
  }

  /** Answer a call with an error. Does nothing after an answer. */
  fail(number: number, error: CallError, wall: bigint): void {
    this.#answer(Kind.FAILURE, number, failureBody(error, this.maxFrame), wall);
  }

  #answer(kind: Kind, number: number, body: Uint8Array, wall: bigint): void {
    const token = this.#inFlight.get(number);
    if (token !== undefined) {
      this.#inFlight.delete(number);
      this.#send(kind, number, token, body, wall);
    }
  }
}

/** Encode a FAILURE of at most `limit` bytes. Message and details that cannot be sent are left out. */
function failureBody({ code, message, details }: CallError, limit: number): Uint8Array {
  const known = code <= MAX_FAILURE_CODE || code === Code.STALE_TIMESTAMP ? code : Code.UNKNOWN;
  try {
    const body = encodeBody([known, message, details]);
    if (MIN_LENGTH + body.length <= limit) {
      return body;
    }
  } catch (error) {
    phraseOf(error);
  }
  return encodeBody([known, "the error cannot be sent"]);
}
