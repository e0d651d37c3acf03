/** Encodes and decodes the bodies of each kind (zcp1.md, sections 6, 18 and 19). Functions throw MessageError. */

import { decodeBody, encodeBody, Float, MAX_DEPTH, MessageError } from "./body.js";

/** A map with keys of text: an object of any type, interfaces included, but no list and no bytes. */
export type Params = Readonly<Record<string, unknown>> | (object & { readonly [Symbol.iterator]?: never });

/** How many items and bytes a peer is allowed to send: totals since OPEN. */
export type Credit = readonly [items: number, bytes: number];

/** Which run a durable stream reads, and from which position (zcp1.md, section 20.1). */
export interface Resume {
  readonly id: string;
  readonly from: number;
}

/** The map of ACCEPTED; there may be more keys. */
export interface AcceptedRun extends Resume {
  readonly attachment: string;
  readonly state: string;
  readonly first: number;
  readonly next: number;
}

/** The metadata of a request. */
export interface Meta {
  credit?: Credit;
  items?: true;
  resume?: Resume;
  deadline_ms?: number;
  idempotency_key?: string;
  traceparent?: string;
}

export interface RequestMessage {
  readonly method: string;
  readonly params: Record<string, unknown>;
  readonly meta: Meta;
}

export interface ErrorMessage {
  readonly code: number;
  readonly message: string;
  readonly details: Record<string, unknown>;
}

const METHOD = /^[a-z0-9_.]{1,128}$/;
const MAX_IDEMPOTENCY_KEY = 64;
const TRACEPARENT = /^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$/;
const MAX_KNOWN_METHODS = 1024;
const knownMethods = new Set<string>();

/** Encode the body of a REQUEST or OPEN. The result is valid until the next call. */
export function encodeRequest(method: string, params: Params | null, meta?: Meta): Uint8Array {
  if (!knownMethods.has(method)) {
    checkMethod(method);
  }
  if (params !== null && (typeof params !== "object" || Array.isArray(params) || params instanceof Uint8Array)) {
    throw new MessageError("params must be an object");
  }
  if (meta === undefined) {
    return encodeBody([method, params]);
  }
  const key = meta.idempotency_key;
  if (key !== undefined && !(key.length >= 1 && [...key].length <= MAX_IDEMPOTENCY_KEY)) {
    throw new MessageError("an idempotency key must have 1 to 64 characters");
  }
  return encodeBody([method, params, meta]);
}

function checkMethod(method: string): void {
  if (!METHOD.test(method)) {
    throw new MessageError("a method name must have 1 to 128 characters of a-z 0-9 _ .");
  }
  if (knownMethods.size < MAX_KNOWN_METHODS) {
    knownMethods.add(method);
  }
}

/**
 * Decode `[method, params]` or `[method, params, meta]`. The meta of the result has only valid `deadline_ms` and
 * `traceparent`.
 */
export function decodeRequest(body: Buffer, maxDepth = MAX_DEPTH): RequestMessage {
  const value = decodeBody(body, { maxDepth, float: Float.of, floatIn: 2 });
  if (!Array.isArray(value) || value.length < 2 || value.length > 3) {
    throw new MessageError("request must be [method, params] or [method, params, meta]");
  }
  const [method, params, meta = {}] = value as unknown[];
  if (typeof method !== "string" || !METHOD.test(method)) {
    throw new MessageError("request has an invalid method name");
  }
  if (params !== null && !isMap(params)) {
    throw new MessageError("params must be a map");
  }
  if (!isMap(meta)) {
    throw new MessageError("meta must be a map");
  }
  const { deadline_ms: deadline = null, traceparent } = meta;
  if (deadline !== null && !isInt(deadline)) {
    throw new MessageError("deadline_ms must be an int");
  }
  return {
    method,
    params: params ?? {},
    meta: {
      ...(deadline === null ? {} : { deadline_ms: Number(deadline) }),
      ...(typeof traceparent === "string" && isTraceparent(traceparent) ? { traceparent } : {}),
    },
  };
}

/** Decode `[items, bytes]` or, of a durable stream, `[items, bytes, taken]`. */
export function decodeCredit(body: Buffer): readonly number[] {
  const value = decodeBody(body, { float: Float.of });
  if (!Array.isArray(value) || value.length < 2 || value.length > 3 || !value.every(isPosition)) {
    throw new MessageError("credit must be [items, bytes] or [items, bytes, taken]");
  }
  return value;
}

/** Decode the map of ACCEPTED. */
export function decodeAccepted(body: Buffer, maxDepth = MAX_DEPTH): AcceptedRun {
  const run = decodeMap(body, maxDepth, "apart");
  const { id, attachment, state, first, from, next } = run;
  if (![id, attachment, state].every((text) => typeof text === "string")) {
    throw new MessageError("id, attachment and state must be str");
  }
  if (!(isPosition(first) && isPosition(from) && isPosition(next) && first <= from && from <= next)) {
    throw new MessageError("first, from and next must be positions in this order");
  }
  return run as unknown as AcceptedRun;
}

function isPosition(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** Decode `[code, message]` or `[code, message, details]`. */
export function decodeError(body: Buffer, maxDepth = MAX_DEPTH): ErrorMessage {
  const value = decodeBody(body, { maxDepth, float: Float.of, floatIn: 0 });
  if (!Array.isArray(value) || value.length < 2 || value.length > 3) {
    throw new MessageError("error must be [code, message] or [code, message, details]");
  }
  const [code, message, details = null] = value as unknown[];
  if (!isInt(code) || typeof message !== "string") {
    throw new MessageError("error must carry an int code and a str message");
  }
  if (details !== null && !isMap(details)) {
    throw new MessageError("error details must be a map");
  }
  return { code: Number(code), message, details: details ?? {} };
}

/** Decode `[name, data]`. */
export function decodeEvent(body: Buffer, maxDepth = MAX_DEPTH): { name: string; data: unknown } {
  const value = decodeBody(body, { maxDepth });
  if (!Array.isArray(value) || value.length !== 2 || typeof value[0] !== "string") {
    throw new MessageError("event must be [name, data]");
  }
  return { name: value[0], data: value[1] };
}

/** Decode the map of WELCOME or GOAWAY. With `floats` apart, a number in it is an int. */
export function decodeMap(body: Buffer, maxDepth = MAX_DEPTH, floats?: "apart"): Record<string, unknown> {
  const value = decodeBody(body, floats === undefined ? { maxDepth } : { maxDepth, float: Float.of });
  if (!isMap(value)) {
    throw new MessageError("body must be a map");
  }
  return value;
}

/** Return whether a decoded value is an int. Floats without a fraction count, unless they were decoded as Float. */
export function isInt(value: unknown): value is number | bigint {
  return typeof value === "bigint" || Number.isInteger(value);
}

/** Return whether a decoded value is a map. */
export function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Uint8Array);
}

/** Return whether a text is a valid `traceparent` of W3C Trace Context. */
export function isTraceparent(text: string): boolean {
  const found = TRACEPARENT.exec(text);
  return found !== null && found[1] !== "ff" && !/^0+$/.test(found[2] as string) && !/^0+$/.test(found[3] as string);
}
