/** Loads the vectors of spec/vectors. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Context, Outcome } from "../../conform/outcomes.js";
import type { Side } from "../../src/wire/frame.js";
import { ROOT } from "./server.js";

export const FRAME_FILES = [
  "frames",
  "headers",
  "freshness",
  "streams",
  "bodies",
  "bodies-invalid",
  "segments",
  "streaming/items",
  "streaming/calls",
];

export interface Vector {
  readonly name: string;
  readonly receiver: Side;
  readonly bytes: string;
  readonly context: Context;
  readonly expect: readonly Outcome[];
}

/** Bytes that arrive in pieces, each at a time of the receiver's clock. */
export interface SlowVector extends Omit<Vector, "bytes"> {
  readonly pieces: readonly { readonly now: string; readonly bytes: string }[];
}

export interface VectorFile<Kind> {
  readonly count: number;
  readonly vectors: readonly Kind[];
}

export function vectorFile<Kind = Vector>(name: string): VectorFile<Kind> {
  const text = readFileSync(join(ROOT, "spec/vectors", `${name}.json`), "utf8");
  return JSON.parse(text) as VectorFile<Kind>;
}
