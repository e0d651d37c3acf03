/**
 * The program through which the conformance kit drives this client (clients/conformance/README.md):
 *
 *     zcproto-conformance node clients/typescript/dist/conform.js
 */

import { createInterface } from "node:readline";
import { Conform, type Step } from "./conform/steps.js";

const MAX_LINE = 8 * 1024 * 1024;
const conform = new Conform();

for await (const line of createInterface({ input: process.stdin })) {
  if (line.length > MAX_LINE) {
    throw new Error("a line has more than 8 MiB");
  }
  const step = JSON.parse(line) as Step;
  void conform.run(step).then((answer) => {
    process.stdout.write(`${JSON.stringify({ id: step.id, ...(answer as object) })}\n`);
  });
}
await conform.close();
