/**
 * The outcomes of decoding the bytes of a vector, in the form of the vectors.
 *
 * With receiver "client", the bytes run through a ClientConnection in the state of the context; with receiver "server", only
 * through the decoder and the body parser, since a client does not implement a server.
 */

import { isDeepStrictEqual } from "node:util";
import { ClientConnection } from "../src/connection/connection.js";
import { ItemQueue, SendCredit } from "../src/connection/credit.js";
import type { ClientEvent } from "../src/connection/events.js";
import type { ItemStream } from "../src/connection/item_streams.js";
import { CallError, Code, ProtocolError } from "../src/errors.js";
import { decodeBody, encodeBody, Float, MessageError } from "../src/wire/body.js";
import { FrameDecoder } from "../src/wire/decoder.js";
import {
  acceptedBy,
  type Extension,
  encodeFrame,
  type Frame,
  HEADER_SIZE,
  Kind,
  LENGTH_SIZE,
  MAX_LENGTH,
  MAX_STREAM,
  NO_TOKEN,
  type Side,
  tokenBytes,
} from "../src/wire/frame.js";
import {
  type Credit,
  decodeAccepted,
  decodeCredit,
  decodeError,
  isInt,
  isMap,
  isTraceparent,
  type Resume,
} from "../src/wire/message.js";
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
  /** Streams and calls, in vectors of them. */
  readonly announced?: {
    readonly streams: { readonly max_open: number; readonly max_item: number; readonly durable?: boolean } | null;
    readonly calls: { readonly max: number } | null;
  };
  readonly open?: readonly OpenStream[];
  readonly calls?: readonly number[];
  readonly handles?: readonly string[] | null;
}

interface OpenStream {
  readonly stream: number;
  readonly granted: Credit;
  readonly received: Credit;
  readonly credit: Credit;
  readonly resume?: Resume;
  readonly accepted?: boolean;
}

export type Outcome = { readonly [key: string]: Json };

const KIND_NAMES = new Map<number, string>(Object.entries(Kind).map(([name, kind]) => [kind, name]));
const WITHOUT_BODY: ReadonlySet<number> = new Set([Kind.CANCEL, Kind.PING, Kind.PONG, Kind.END, Kind.WITHDRAW]);
/** The first token of the vectors, which opened a stream if its context has no token. */
const FIRST_TOKEN = Buffer.from(Array.from({ length: 32 }, (_, index) => index + 1)).toString("latin1");
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
  const inPieces = new Receiver(context);
  const events = pieces.flatMap((piece, index) => inPieces.receive(piece, times[index] ?? 0n));
  // Once more frame by frame, for the outcome of each.
  const byFrame = new Receiver(context);
  const eventsByFrame: ClientEvent[] = [];
  const outcomes: Outcome[] = [];
  const decoder = new FrameDecoder("client", context.limit);
  decoder.accepted = acceptedBy("client", extensionsOf(context), context.announced?.streams?.max_item);
  const { frames, left, fault } = framesOf(decoder, pieces);
  let end = 0;
  for (const frame of frames) {
    const before = byFrame.dropped;
    const now = timeOf(end + HEADER_SIZE, pieces, times);
    end += LENGTH_SIZE + frame.length;
    const eventsOfFrame = byFrame.receive(bytesOf(frame), now);
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
    } else if (byFrame.dropped > before) {
      outcomes.push({ result: "dropped" });
    } else {
      outcomes.push(frameOutcome(frame, context.max_depth));
    }
  }
  if (byFrame.connection.state !== "closed") {
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

/** A connection whose application takes each item at once. Calls that it refuses are events, too. */
class Receiver {
  readonly connection: ClientConnection;
  readonly #streams = new Map<number, ItemStream>();
  readonly #maxDepth: number;

  constructor(context: Context) {
    this.connection = connectionIn(context, this.#streams);
    this.#maxDepth = context.max_depth;
    this.connection.dataToSend();
  }

  get dropped(): number {
    return this.connection.droppedStale + this.connection.droppedUnknown;
  }

  receive(data: Buffer, now: bigint): ClientEvent[] {
    const events = this.connection.receiveData(data, now, 0).map((event): ClientEvent => {
      try {
        if (event.type === "item") {
          this.#streams.get(event.stream)?.takeItem(this.#maxDepth);
        }
        return event;
      } catch (error) {
        if (!(error instanceof CallError)) {
          throw error;
        }
        this.connection.cancel(event.type === "item" ? event.stream : 0, now);
        return { type: "error", stream: 0, code: error.code, message: error.message, details: {} };
      }
    });
    const refused = this.#refused();
    return events.some(({ type }) => type === "withdrawn") ? events : [...events, ...refused];
  }

  /** Return an error for each FAILURE that was sent. */
  #refused(): ClientEvent[] {
    const decoder = new FrameDecoder("server", MAX_LENGTH);
    decoder.accepted = acceptedBy("server", ["streams", "calls"]);
    const { frames } = framesOf(decoder, [this.connection.dataToSend() ?? Buffer.alloc(0)]);
    return frames
      .filter(({ kind }) => kind === Kind.FAILURE)
      .map(({ stream, body }) => ({ type: "error", stream, ...decodeError(body) }));
  }
}

/** Return what a client in the state of a context accepts, or a server has announced. */
function extensionsOf({ announced, handles }: Context): Extension[] {
  return [
    ...(announced?.streams == null ? [] : (["streams"] as const)),
    ...(announced?.streams?.durable === true ? (["durable"] as const) : []),
    ...(announced?.calls == null || handles === null ? [] : (["calls"] as const)),
  ];
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
function connectionIn(context: Context, streams: Map<number, ItemStream>): ClientConnection {
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
  const { announced, in_flight: inFlight, open = [], handles, calls = [] } = context;
  const extensions = Object.entries(announced ?? {}).filter(([, limits]) => limits !== null);
  receive(Kind.WELCOME, 0n, encodeBody({ ...WELCOME, ...Object.fromEntries(extensions) }));
  const last = BigInt(context.last_counter);
  if (last > 0n) {
    receive(Kind.PING, last, Buffer.alloc(0));
  }
  const [text] = context.tokens;
  const token = text === undefined ? FIRST_TOKEN : Buffer.from(text, "hex").toString("latin1");
  for (const stream of inFlight) {
    connection.nextStream = stream;
    connection.request("echo", {}, token, undefined, now);
  }
  for (const { stream: number, granted, received, credit, resume, accepted = false } of open) {
    connection.nextStream = number;
    const window = { window: granted };
    const stream = connection.openStream("m", null, token, resume === undefined ? window : { ...window, resume }, now);
    stream.isAccepted = accepted;
    stream.credit = new SendCredit(credit);
    stream.items = new ItemQueue(granted, granted, received);
    streams.set(number, stream);
  }
  const registrations = handles == null ? 0 : 1;
  if (handles != null) {
    connection.nextStream = MAX_STREAM;
    connection.handle(token, handles, 1, now);
  }
  for (const stream of calls) {
    const body = Buffer.from(encodeBody([handles?.[0], {}, { deadline_ms: 1 }]));
    connection.calls.receive(
      { length: 0, kind: Kind.CALL, stream, timestamp: now, salt, counter: 0n, token, body },
      { isStale: false, isBlocked: false },
      now,
    );
  }
  if (connection.state !== "open" || connection.inFlight !== inFlight.length + open.length + registrations) {
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
  const decoder = new FrameDecoder("server", context.limit);
  decoder.accepted = acceptedBy("server", extensionsOf(context), context.announced?.streams?.max_item);
  const { frames, left, fault } = framesOf(decoder, pieces);
  const outcomes: Outcome[] = [];
  for (const frame of frames) {
    if (WITHOUT_BODY.has(frame.kind) && frame.body.length > 0) {
      return [...outcomes, errorOutcome(Code.PROTOCOL_ERROR, true)];
    }
    const isValid = WITHOUT_BODY.has(frame.kind) || isValidBody(frame, context.max_depth);
    if (!isValid && frame.kind === Kind.CREDIT) {
      return [...outcomes, errorOutcome(Code.PROTOCOL_ERROR, true)];
    }
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
    case Kind.ITEM:
    case Kind.RESULT:
      return { value: typed(value) };
    case Kind.CREDIT: {
      const credit = creditOf(value);
      return credit === undefined ? undefined : { credit };
    }
    case Kind.ACCEPTED:
      return isAccepted(frame.body, maxDepth) && isMap(value) ? { map: typed(value) } : undefined;
    case Kind.WELCOME:
    case Kind.GOAWAY:
      return isMap(value) ? { map: typed(value) } : undefined;
    case Kind.REQUEST:
    case Kind.OPEN:
    case Kind.CALL:
      return Array.isArray(value) ? requestOf(value, frame.kind) : undefined;
    case Kind.ERROR:
    case Kind.FAILURE:
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

function isAccepted(body: Buffer, maxDepth: number): boolean {
  try {
    decodeAccepted(body, maxDepth);
    return true;
  } catch {
    return false;
  }
}

/** Return the totals of a credit; undefined if it is invalid. */
function creditOf(value: unknown): readonly number[] | undefined {
  try {
    return decodeCredit(Buffer.from(encodeBody(value)));
  } catch (error) {
    if (error instanceof MessageError) {
      return undefined;
    }
    throw error;
  }
}

function requestOf(value: readonly unknown[], kind: Kind): Outcome | undefined {
  const [method, params, meta] = value;
  const hasForm = value.length === 2 || (value.length === 3 && isMap(meta));
  if (!hasForm || typeof method !== "string" || !METHOD.test(method) || !(params === null || isMap(params))) {
    return undefined;
  }
  const known = isMap(meta) ? metaOf(meta, kind) : {};
  return known === undefined
    ? undefined
    : { method, params: typed(params), ...(value.length === 3 ? { meta: known } : {}) };
}

function metaOf(meta: Record<string, unknown>, kind: Kind): Outcome | undefined {
  const { deadline_ms: deadline = null, idempotency_key: key = null, traceparent } = meta;
  const credit = kind === Kind.OPEN ? (meta["credit"] ?? null) : null;
  if (kind === Kind.OPEN && (key !== null || (credit !== null && creditOf(credit)?.length !== 2))) {
    return undefined;
  }
  const resume = meta["resume"] ?? null;
  if (resume !== null && !(kind === Kind.OPEN && isResume(resume))) {
    return undefined;
  }
  const isKey = typeof key === "string" && key.length >= 1 && [...key].length <= 64;
  if (!(deadline === null || isInt(deadline)) || !(key === null || isKey)) {
    return undefined;
  }
  const isTrace = typeof traceparent === "string" && isTraceparent(traceparent);
  return {
    ...(deadline === null ? {} : { deadline_ms: typed(deadline) }),
    ...(key === null ? {} : { idempotency_key: key as string }),
    ...(isTrace ? { traceparent } : {}),
    ...(credit === null ? {} : { credit: typed(credit) }),
    ...(isResume(resume) ? { resume: { id: resume.id, from: resume.from } } : {}),
  };
}

function isResume(value: unknown): value is Resume {
  if (!isMap(value)) {
    return false;
  }
  const { id, from } = value;
  const isPosition = Number.isSafeInteger(from) && (from as number) >= 0;
  return typeof id === "string" && /^[A-Za-z0-9_-]{1,64}$/.test(id) && isPosition;
}
