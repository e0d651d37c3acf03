/** Loads the vectors of spec/vectors. */

import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Outcome } from "../../conform/outcomes.js";
import { ROOT } from "./server.js";

export interface Vector {
  readonly expect: readonly Outcome[];
}

export interface VectorFile<Kind> {
  readonly count: number;
  readonly vectors: readonly Kind[];
}

export function vectorFile<Kind = Vector>(name: string): VectorFile<Kind> {
  const text = readFileSync(join(ROOT, "spec/vectors", `${name}.json`), "utf8");
  return JSON.parse(text) as VectorFile<Kind>;
}
