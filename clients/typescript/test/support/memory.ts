/** Measures what the process keeps in memory. */

import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

/** Collect garbage, and return how many bytes remain. */
export function memoryInUse(): number {
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}

/** Return how many of these objects are still in memory. */
export async function countAlive(references: readonly WeakRef<object>[]): Promise<number> {
  await new Promise((resolve) => setImmediate(resolve)); // an object that was looked at stays until the end of the turn
  collect();
  return references.filter((reference) => reference.deref() !== undefined).length;
}
