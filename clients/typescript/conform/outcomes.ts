/**
 * The outcomes of decoding the bytes of a vector, in the form of the vectors.
 *
 * With receiver "client", the bytes run through a ClientConnection in the state of the context; with receiver "server", only
 * through the decoder and the body parser, since a client does not implement a server.
 */

import { isDeepStrictEqual } from "node:util";
import { ClientConnection } from "../src/connection/connection.js";
import type { ClientEvent } from "../src/connection/events.js";
import { Code, ProtocolError } from "../src/errors.js";
import { decodeBody, encodeBody, Float, MessageError } from "../src/wire/body.js";
import { FrameDecoder } from "../src/wire/decoder.js";
import {
  encodeFrame,
  type Frame,
  HEADER_SIZE,
  Kind,
  LENGTH_SIZE,
  NO_TOKEN,
  type Side,
  tokenBytes,
} from "../src/wire/frame.js";
import { isInt, isMap, isTraceparent } from "../src/wire/message.js";
import { type Json, typed } from "./typed.js";

export interface Context {
  readonly limit: number;
  readonly max_depth: number;
  readonly salt: string | null;
  readonly last_counter: string;
  readonly now: string;
  readonly tolerance_ms: number;
  readonly tokens: readonly string[];
  readonly in_flight: readonly number[];
}

export type Outcome = { readonly [key: string]: Json };

const KIND_NAMES = new Map<number, string>(Object.entries(Kind).map(([name, kind]) => [kind, name]));
const WITHOUT_BODY: ReadonlySet<number> = new Set([Kind.CANCEL, Kind.PING, Kind.PONG]);
const METHOD = /^[a-z0-9_.]{1,128}$/;

/** Return the outcomes of bytes that arrive in pieces. */
export function outcomesOf(
  receiver: Side,
  context: Context,
  pieces: readonly Buffer[],
  times: readonly string[] = pieces.map(() => context.now),
): Outcome[] {
  return receiver === "client" ? asClient(context, pieces, times.map(BigInt)) : asServer(context, pieces);
}

// --- receiver "client": through a ClientConnection ---------------------------------------------------

function asClient(context: Context, pieces: readonly Buffer[], times: readonly bigint[]): Outcome[] {
  const inPieces = connectionIn(context);
  const events: ClientEvent[] = pieces.flatMap((piece, index) => inPieces.receiveData(piece, times[index] ?? 0n, 0));
  // Once more frame by frame, for the outcome of each.
  const byFrame = connectionIn(context);
  const eventsByFrame: ClientEvent[] = [];
  const outcomes: Outcome[] = [];
  const { frames, left, fault } = framesOf(new FrameDecoder("client", context.limit), pieces);
  let end = 0;
  for (const frame of frames) {
    const before = byFrame.droppedStale + byFrame.droppedUnknown;
    const now = timeOf(end + HEADER_SIZE, pieces, times);
    end += LENGTH_SIZE + frame.length;
    const eventsOfFrame = byFrame.receiveData(bytesOf(frame), now, 0);
    eventsByFrame.push(...eventsOfFrame);
    const [event] = eventsOfFrame;
    if (event?.type === "ended") {
      // A valid ERROR on stream 0 is itself a frame, which ends the connection.
      const isFatalError = frame.kind === Kind.ERROR && frame.stream === 0 && isValidBody(frame, context.max_depth);
      outcomes.push(isFatalError ? frameOutcome(frame, context.max_depth) : errorOutcome(event.code ?? 0, true));
      break;
    }
    if (event?.type === "error" && event.code !== messageOf(frame, context.max_depth)?.["code"]) {
      outcomes.push(errorOutcome(event.code, false));
    } else if (byFrame.droppedStale + byFrame.droppedUnknown > before) {
      outcomes.push({ result: "dropped" });
    } else {
      outcomes.push(frameOutcome(frame, context.max_depth));
    }
  }
  if (byFrame.state !== "closed") {
    if (fault !== undefined) {
      eventsByFrame.push({ type: "ended", code: fault.code, reason: fault.reason });
      outcomes.push(errorOutcome(fault.code, true));
    } else if (left > 0) {
      outcomes.push({ result: "incomplete", have: left });
    }
  }
  if (!isDeepStrictEqual(events, eventsByFrame)) {
    throw new Error("the events depend on how the bytes are split");
  }
  return outcomes;
}

/** Return the time at which a number of bytes have arrived. */
function timeOf(count: number, pieces: readonly Buffer[], times: readonly bigint[]): bigint {
  let arrived = 0;
  const index = pieces.findIndex((piece) => {
    arrived += piece.length;
    return arrived >= count;
  });
  return times[index] ?? 0n;
}

/** Return a connection in the state of a context. */
function connectionIn(context: Context): ClientConnection {
  const connection = new ClientConnection({
    maxFrame: context.limit,
    toleranceMs: context.tolerance_ms,
    maxDepth: context.max_depth,
  });
  if (context.salt === null) {
    return connection;
  }
  const now = BigInt(context.now);
  const salt = BigInt(`0x${context.salt}`);
  const receive = (kind: Kind, counter: bigint, body: Uint8Array) => {
    connection.receiveData(encodeFrame(kind, 0, now, salt, counter, NO_TOKEN, body), now, 0);
  };
  receive(Kind.WELCOME, 0n, encodeBody(WELCOME));
  const last = BigInt(context.last_counter);
  if (last > 0n) {
    receive(Kind.PING, last, Buffer.alloc(0));
  }
  const [token = ""] = context.tokens;
  for (const stream of context.in_flight) {
    connection.nextStream = stream;
    connection.request("echo", {}, Buffer.from(token, "hex").toString("latin1"), undefined, now);
  }
  if (connection.state !== "open" || connection.inFlight !== context.in_flight.length) {
    throw new Error("the connection cannot reach the state of the context");
  }
  return connection;
}

const WELCOME = {
  server: "vectors",
  versions: [1],
  max_frame: 1_048_576,
  max_streams: 128,
  idle_timeout_ms: 0,
  tolerance_ms: 30_000,
  sts: { max_age: 0, include_subdomains: false },
};

function isValidBody(frame: Frame, maxDepth: number): boolean {
  return messageOf(frame, maxDepth) !== undefined;
}

// --- receiver "server": decoder and bodies only ------------------------------------------------------

function asServer(context: Context, pieces: readonly Buffer[]): Outcome[] {
  const { frames, left, fault } = framesOf(new FrameDecoder("server", context.limit), pieces);
  const outcomes: Outcome[] = [];
  for (const frame of frames) {
    if (WITHOUT_BODY.has(frame.kind) && frame.body.length > 0) {
      return [...outcomes, errorOutcome(Code.PROTOCOL_ERROR, true)];
    }
    const isValid = WITHOUT_BODY.has(frame.kind) || isValidBody(frame, context.max_depth);
    outcomes.push(isValid ? frameOutcome(frame, context.max_depth) : errorOutcome(Code.INVALID_ARGUMENT, false));
  }
  if (fault !== undefined) {
    outcomes.push(errorOutcome(fault.code, true));
  } else if (left > 0) {
    outcomes.push({ result: "incomplete", have: left });
  }
  return outcomes;
}

// --- frames ------------------------------------------------------------------------------------------

interface Decoded {
  readonly frames: Frame[];
  readonly left: number;
  readonly fault: ProtocolError | undefined;
}

function framesOf(decoder: FrameDecoder, pieces: readonly Buffer[]): Decoded {
  const frames: Frame[] = [];
  try {
    for (const piece of pieces) {
      decoder.feed(piece);
      for (let frame = decoder.next(); frame !== undefined; frame = decoder.next()) {
        frames.push(frame);
      }
    }
  } catch (error) {
    if (!(error instanceof ProtocolError)) {
      throw error;
    }
    return { frames, left: 0, fault: error };
  }
  return { frames, left: decoder.buffered, fault: undefined };
}

function bytesOf({ kind, stream, timestamp, salt, counter, token, body }: Frame): Buffer {
  return encodeFrame(kind, stream, timestamp, salt, counter, token, body);
}

function errorOutcome(code: number, fatal: boolean): Outcome {
  return { result: "error", code, fatal };
}

function frameOutcome(frame: Frame, maxDepth: number): Outcome {
  const message = WITHOUT_BODY.has(frame.kind) ? undefined : messageOf(frame, maxDepth);
  return {
    result: "frame",
    length: frame.length,
    version: 1,
    kind: KIND_NAMES.get(frame.kind) ?? "",
    flags: 0,
    stream: frame.stream,
    timestamp: frame.timestamp.toString(),
    salt: frame.salt.toString(16).padStart(16, "0"),
    counter: frame.counter.toString(),
    token: tokenBytes(frame.token).toString("hex"),
    body: frame.body.toString("hex"),
    ...(message === undefined ? {} : { message }),
  };
}

/** Decode the body of a frame. Return undefined if it is invalid for its kind. */
function messageOf(frame: Frame, maxDepth: number): Outcome | undefined {
  let value: unknown;
  try {
    value = decodeBody(frame.body, { maxDepth, float: Float.of });
  } catch (error) {
    if (error instanceof MessageError) {
      return undefined;
    }
    throw error;
  }
  switch (frame.kind) {
    case Kind.RESPONSE:
      return { value: typed(value) };
    case Kind.WELCOME:
    case Kind.GOAWAY:
      return isMap(value) ? { map: typed(value) } : undefined;
    case Kind.REQUEST:
      return Array.isArray(value) ? requestOf(value) : undefined;
    case Kind.ERROR:
      return Array.isArray(value) ? errorOf(value) : undefined;
    case Kind.EVENT:
      return Array.isArray(value) && value.length === 2 && typeof value[0] === "string"
        ? { name: value[0], data: typed(value[1]) }
        : undefined;
    default:
      return undefined;
  }
}

function errorOf(value: readonly unknown[]): Outcome | undefined {
  const [code, message, details = null] = value;
  const hasForm = value.length === 2 || value.length === 3;
  if (!hasForm || !isInt(code) || typeof message !== "string" || !(details === null || isMap(details))) {
    return undefined;
  }
  return { code: Number(code), message, details: typed(details ?? {}) };
}

function requestOf(value: readonly unknown[]): Outcome | undefined {
  const [method, params, meta] = value;
  const hasForm = value.length === 2 || (value.length === 3 && isMap(meta));
  if (!hasForm || typeof method !== "string" || !METHOD.test(method) || !(params === null || isMap(params))) {
    return undefined;
  }
  const known = isMap(meta) ? metaOf(meta) : {};
  return known === undefined
    ? undefined
    : { method, params: typed(params), ...(value.length === 3 ? { meta: known } : {}) };
}

function metaOf(meta: Record<string, unknown>): Outcome | undefined {
  const { deadline_ms: deadline = null, idempotency_key: key = null, traceparent } = meta;
  const isKey = typeof key === "string" && key.length >= 1 && [...key].length <= 64;
  if (!(deadline === null || isInt(deadline)) || !(key === null || isKey)) {
    return undefined;
  }
  const isTrace = typeof traceparent === "string" && isTraceparent(traceparent);
  return {
    ...(deadline === null ? {} : { deadline_ms: typed(deadline) }),
    ...(key === null ? {} : { idempotency_key: key as string }),
    ...(isTrace ? { traceparent } : {}),
  };
}
