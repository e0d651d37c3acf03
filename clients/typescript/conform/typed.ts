/** The typed JSON of the test vectors. */

import { Float } from "../src/wire/body.js";
import { isMap } from "../src/wire/message.js";

export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/** Encode a value as typed JSON. A float without a fraction must be a Float, or it is encoded as an int. */
export function typed(value: unknown): Json {
  if (value === null || typeof value === "boolean" || typeof value === "string") {
    return value;
  }
  if (typeof value === "bigint") {
    return Number.isSafeInteger(Number(value)) ? Number(value) : { int: value.toString() };
  }
  if (typeof value === "number") {
    return Number.isInteger(value) ? value : float(value);
  }
  if (value instanceof Float) {
    return float(value.value);
  }
  if (value instanceof Uint8Array) {
    return { bin: Buffer.from(value).toString("hex") };
  }
  if (Array.isArray(value)) {
    return value.map(typed);
  }
  if (isMap(value)) {
    return { map: Object.fromEntries(Object.entries(value).map(([key, item]) => [key, typed(item)])) };
  }
  throw new TypeError(`not a value of msgpack: ${typeof value}`);
}

function float(value: number): Json {
  const bits = Buffer.alloc(8);
  bits.writeDoubleBE(value);
  return { float64: bits.toString("hex") };
}

/** Decode a value from typed JSON. */
export function untyped(json: Json): unknown {
  if (json === null || typeof json !== "object") {
    return json;
  }
  if (Array.isArray(json)) {
    return (json as readonly Json[]).map(untyped);
  }
  const { int, float64, bin, map } = json as { readonly [key: string]: Json };
  if (typeof int === "string") {
    return BigInt(int);
  }
  if (typeof float64 === "string") {
    return Buffer.from(float64, "hex").readDoubleBE();
  }
  if (typeof bin === "string") {
    return new Uint8Array(Buffer.from(bin, "hex"));
  }
  return Object.fromEntries(Object.entries(map as object).map(([key, item]) => [key, untyped(item as Json)]));
}
