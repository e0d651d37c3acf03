/**
 * Bodies: one msgpack value each (zcp1.md, section 12).
 *
 * Rules: exactly one value, str keys, valid UTF-8, no ext types, at most `maxDepth` levels of nesting (the outermost container
 * is level 1), and memory proportional to the bytes present. Invalid input throws MessageError with a fixed phrase, and never
 * any other error.
 *
 * An int is a number where that is exact, otherwise a bigint; a float is a number; bin is a Uint8Array; a map is a plain
 * object. @msgpack/msgpack encodes bodies but does not decode them: it accepts other keys, invalid UTF-8, any depth and any
 * declared array length, and validation before it would traverse each body twice.
 */

import { isUtf8 } from "node:buffer";
import { Encoder } from "@msgpack/msgpack";
import { ZcprotoError } from "../errors.js";

export const MAX_DEPTH = 32;

const INT64_MIN = -(2n ** 63n);
const UINT64_MAX = 2n ** 64n - 1n;
const UINT32 = 2 ** 32;

/** An invalid body, or a value that cannot be sent. The message is a fixed phrase. */
export class MessageError extends ZcprotoError {}

/** Return the phrase of a MessageError. Any other error is a bug and is rethrown. */
export function phraseOf(error: unknown): string {
  if (error instanceof MessageError) {
    return error.message;
  }
  throw error;
}

export interface DecodeOptions {
  readonly maxDepth?: number;
  /** Converts floats, to distinguish them from ints. */
  readonly float?: (value: number) => unknown;
  /** Converts them only in this element of an outermost array. */
  readonly floatIn?: number;
}

/** A float, distinct from an int of the same value. */
export class Float {
  constructor(readonly value: number) {}

  static of(this: void, value: number): Float {
    return new Float(value);
  }
}

/** Decode the value of a body. Throws MessageError. */
export function decodeBody(body: Buffer, { maxDepth = MAX_DEPTH, float, floatIn }: DecodeOptions = {}): unknown {
  if (body.length === 0) {
    throw new MessageError("body is empty");
  }
  const reader = new Reader(body, float);
  const value = floatIn === undefined ? reader.value(maxDepth) : reader.outermost(maxDepth, floatIn);
  if (reader.at !== body.length) {
    throw new MessageError("bytes after the value");
  }
  return value;
}

/**
 * Makes empty objects of 24 bytes instead of 56: an object literal has room for four properties, and one byte of a body is
 * enough for an empty map. The objects have the prototype of all others.
 */
const EmptyMap = function EmptyMap(): void {} as unknown as new () => Record<string, unknown>;
EmptyMap.prototype = Object.prototype;

/** The largest array that is allocated at its size. Arrays that grow have room for 16 more values from the first one. */
const MAX_ALLOCATED = 64;

class Reader {
  at = 0;
  readonly #data: Buffer;
  #float: ((value: number) => unknown) | undefined;

  constructor(data: Buffer, float: ((value: number) => unknown) | undefined) {
    this.#data = data;
    this.#float = float;
  }

  /** Read a value. Of an array, convert floats in one element only. */
  outermost(depth: number, floatIn: number): unknown {
    const float = this.#float;
    this.#float = undefined;
    const size = this.#arraySize();
    if (size === undefined) {
      return this.value(depth);
    }
    this.#enter(size, depth);
    const array: unknown[] = [];
    for (let index = 0; index < size; index++) {
      this.#float = index === floatIn ? float : undefined;
      array.push(this.value(depth - 1));
    }
    return array;
  }

  /** Read the size of an array, or nothing before another value. */
  #arraySize(): number | undefined {
    const first = this.#data[this.at] as number;
    if (first >= 0x90 && first < 0xa0) {
      this.at += 1;
      return first & 0x0f;
    }
    if (first !== 0xdc && first !== 0xdd) {
      return undefined;
    }
    this.at += 1;
    return first === 0xdc ? this.#uint16() : this.#uint32();
  }

  value(depth: number): unknown {
    const first = this.#uint8();
    if (first < 0x80) {
      return first;
    }
    if (first < 0x90) {
      return this.#map(first & 0x0f, depth);
    }
    if (first < 0xa0) {
      return this.#array(first & 0x0f, depth);
    }
    if (first < 0xc0) {
      return this.#str(first & 0x1f);
    }
    if (first >= 0xe0) {
      return first - 0x100;
    }
    switch (first) {
      case 0xc0:
        return null;
      case 0xc2:
        return false;
      case 0xc3:
        return true;
      case 0xc4:
        return this.#bin(this.#uint8());
      case 0xc5:
        return this.#bin(this.#uint16());
      case 0xc6:
        return this.#bin(this.#uint32());
      case 0xca:
        return this.#asFloat(this.#data.readFloatBE(this.#take(4)));
      case 0xcb:
        return this.#asFloat(this.#data.readDoubleBE(this.#take(8)));
      case 0xcc:
        return this.#uint8();
      case 0xcd:
        return this.#uint16();
      case 0xce:
        return this.#uint32();
      case 0xcf:
        return this.#int64(this.#uint32());
      case 0xd0:
        return this.#data.readInt8(this.#take(1));
      case 0xd1:
        return this.#data.readInt16BE(this.#take(2));
      case 0xd2:
        return this.#data.readInt32BE(this.#take(4));
      case 0xd3:
        return this.#int64(this.#data.readInt32BE(this.#take(4)));
      case 0xd9:
        return this.#str(this.#uint8());
      case 0xda:
        return this.#str(this.#uint16());
      case 0xdb:
        return this.#str(this.#uint32());
      case 0xdc:
        return this.#array(this.#uint16(), depth);
      case 0xdd:
        return this.#array(this.#uint32(), depth);
      case 0xde:
        return this.#map(this.#uint16(), depth);
      case 0xdf:
        return this.#map(this.#uint32(), depth);
      default: // 0xc1, which msgpack never uses, and the ext types
        throw new MessageError("body is not one msgpack value of the allowed types");
    }
  }

  /** Consume `size` bytes and return their offset. */
  #take(size: number): number {
    const at = this.at;
    if (size > this.#data.length - at) {
      throw new MessageError("body ends before its value does");
    }
    this.at = at + size;
    return at;
  }

  #uint8(): number {
    return this.#data[this.#take(1)] as number;
  }

  #uint16(): number {
    return this.#data.readUInt16BE(this.#take(2));
  }

  #uint32(): number {
    return this.#data.readUInt32BE(this.#take(4));
  }

  /** Read the lower half of an int64. Return a number if it is exact. */
  #int64(high: number): number | bigint {
    const low = this.#uint32();
    const value = high * UINT32 + low;
    return Number.isSafeInteger(value) ? value : (BigInt(high) << 32n) + BigInt(low);
  }

  #asFloat(value: number): unknown {
    return this.#float === undefined ? value : this.#float(value);
  }

  #bin(size: number): Uint8Array {
    const at = this.#take(size);
    return new Uint8Array(this.#data.subarray(at, at + size)); // a copy, since a view would retain the whole read
  }

  #str(size: number): string {
    const at = this.#take(size);
    const end = at + size;
    const data = this.#data;
    if (size < 24) {
      // Most are short ASCII, which is faster than two calls into the runtime.
      let text = "";
      for (let index = at; index < end; index++) {
        const byte = data[index] as number;
        if (byte >= 0x80) {
          break;
        }
        text += String.fromCharCode(byte);
      }
      if (text.length === size) {
        return text;
      }
    }
    if (!isUtf8(data.subarray(at, end))) {
      throw new MessageError("str is not UTF-8");
    }
    return data.toString("utf8", at, end);
  }

  #array(size: number, depth: number): unknown[] {
    this.#enter(size, depth);
    // A size is a promise until the values are there, so a large array grows with them.
    const array: unknown[] = size <= MAX_ALLOCATED ? new Array(size) : [];
    for (let index = 0; index < size; index++) {
      array[index] = this.value(depth - 1);
    }
    return array;
  }

  #map(size: number, depth: number): Record<string, unknown> {
    this.#enter(2 * size, depth);
    const map: Record<string, unknown> = size === 0 ? new EmptyMap() : {};
    for (let left = size; left > 0; left--) {
      const key = this.#key();
      const value = this.value(depth - 1);
      if (key === "__proto__") {
        Object.defineProperty(map, key, { value, enumerable: true, configurable: true, writable: true });
      } else {
        map[key] = value;
      }
    }
    return map;
  }

  #key(): string {
    const first = this.#uint8();
    if (first >= 0xa0 && first < 0xc0) {
      return this.#str(first & 0x1f);
    }
    switch (first) {
      case 0xd9:
        return this.#str(this.#uint8());
      case 0xda:
        return this.#str(this.#uint16());
      case 0xdb:
        return this.#str(this.#uint32());
      default:
        throw new MessageError("map keys must be str");
    }
  }

  /** Check the size of a container: each of its values needs at least one byte. */
  #enter(values: number, depth: number): void {
    if (depth <= 0) {
      throw new MessageError("nested too deep");
    }
    if (values > this.#data.length - this.at) {
      throw new MessageError("body ends before its value does");
    }
  }
}

const MAX_KEPT = 1_048_576; // the encoder retains a buffer of the size of its largest body

// `useBigInt64` encodes bigint as int, and numbers beyond 32 bits as float: `prepared` converts those to bigint.
const newEncoder = () => new Encoder({ useBigInt64: true, maxDepth: MAX_DEPTH + 1 });
let encoder = newEncoder();

/** Encode a value. The result is valid until the next call. Throws MessageError for a value that cannot be sent. */
export function encodeBody(value: unknown): Uint8Array {
  const body = encoder.encodeSharedRef(prepared(value, MAX_DEPTH));
  if (body.length > MAX_KEPT) {
    encoder = newEncoder();
  }
  return body;
}

/**
 * Convert a value for the encoder, without copying where nothing changes.
 *
 * Undefined properties are omitted, as in JSON.stringify.
 */
function prepared(value: unknown, depth: number): unknown {
  switch (typeof value) {
    case "boolean":
      return value;
    case "number":
      return Number.isSafeInteger(value) && (value >= UINT32 || value < -UINT32 / 2) ? BigInt(value) : value;
    case "bigint":
      if (value < INT64_MIN || value > UINT64_MAX) {
        throw new MessageError("value cannot be sent: an int must be from -2^63 to 2^64 - 1");
      }
      return value;
    case "string":
      return checkText(value);
    case "object":
      return value === null || value instanceof Uint8Array ? value : preparedContainer(value, depth);
    default:
      throw new MessageError(`value cannot be sent: ${typeof value}`);
  }
}

function preparedContainer(value: object, depth: number): unknown {
  if (depth <= 0) {
    throw new MessageError("value cannot be sent: nested too deep");
  }
  if (Array.isArray(value)) {
    return preparedArray(value, depth);
  }
  const prototype: unknown = Object.getPrototypeOf(value);
  if (prototype !== Object.prototype && prototype !== null) {
    throw new MessageError(`value cannot be sent: ${value.constructor?.name ?? "an object of a class"}`);
  }
  let copy: Map<string, unknown> | undefined;
  const entries = Object.entries(value);
  for (const [key, before] of entries) {
    checkText(key);
    const after = before === undefined ? undefined : prepared(before, depth - 1);
    if (after !== before || before === undefined || key === "__proto__") {
      copy ??= new Map(entries);
      if (after === undefined) {
        copy.delete(key);
      } else {
        copy.set(key, after);
      }
    }
  }
  return copy === undefined ? value : objectOf(copy);
}

function objectOf(entries: Map<string, unknown>): object {
  return Object.fromEntries(entries); // also makes "__proto__" an own property
}

function preparedArray(value: readonly unknown[], depth: number): unknown {
  let copy: unknown[] | undefined;
  for (let index = 0; index < value.length; index++) {
    const before = value[index];
    const after = prepared(before, depth - 1);
    if (after !== before && !Number.isNaN(before)) {
      copy ??= value.slice();
      copy[index] = after;
    }
  }
  return copy ?? value;
}

function checkText(text: string): string {
  if (!text.isWellFormed()) {
    throw new MessageError("value cannot be sent: a string has a lone surrogate");
  }
  return text;
}
