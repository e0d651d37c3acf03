/** Checks that imports point down, and that only the edge uses network, files and time. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join, normalize } from "node:path";
import { test } from "node:test";
import { PACKAGE } from "./support/server.js";

const SOURCE = join(PACKAGE, "src");

/** The folders and files that each folder or file may import, besides itself. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  "errors.ts": [],
  "version.ts": [],
  wire: ["errors.ts"],
  connection: ["wire", "errors.ts"],
  client: ["connection", "wire", "errors.ts"],
  edge: ["client", "connection", "wire", "errors.ts"],
  "connect.ts": ["edge", "client", "connection", "wire", "errors.ts", "version.ts"],
  "otel.ts": ["client", "errors.ts", "version.ts"],
  "index.ts": ["connect.ts", "edge", "client", "connection", "wire", "errors.ts", "version.ts"],
};

/** Modules without I/O that the layers below the edge may use. */
const MAY_USE: Readonly<Record<string, readonly string[]>> = {
  wire: ["node:buffer", "@msgpack/msgpack"],
  client: ["node:net", "node:url", "node:util"], // net for isIP
};

/** Functions that read the time or set timers. */
const TIME = /\b(Date\.now|performance\.now|setTimeout|setInterval|new Date\(\))/;

function* sources(folder = ""): Generator<string> {
  for (const entry of readdirSync(join(SOURCE, folder), { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      yield* sources(path);
    } else {
      yield path;
    }
  }
}

/** Return the modules that a module imports, types included. */
function importsOf(path: string): string[] {
  const text = readFileSync(join(SOURCE, path), "utf8");
  const relative = [...text.matchAll(/\bfrom "(\.[^"]+)\.js"/g)];
  return relative.map(([, module = ""]) => `${normalize(join(path, "..", module))}.ts`);
}

test("no module imports itself through others", () => {
  const graph = new Map([...sources()].map((path) => [path, importsOf(path)]));
  for (let size = -1; size !== graph.size; ) {
    size = graph.size;
    for (const [path, imports] of graph) {
      if (!imports.some((module) => graph.has(module))) {
        graph.delete(path);
      }
    }
  }
  assert.deepEqual([...graph.keys()], [], "each of these is in a circle, or imports one that is");
});

for (const path of sources()) {
  test(`${path} imports only lower layers and reads no time`, () => {
    const text = readFileSync(join(SOURCE, path), "utf8");
    const [layer = ""] = path.split("/");
    for (const [, module = ""] of text.matchAll(/\bfrom "([^"]+)"/g)) {
      if (module.startsWith(".")) {
        const [target = ""] = normalize(join(path, "..", module.replace(/\.js$/, ".ts"))).split("/");
        assert.ok(target === layer || MAY_IMPORT[layer]?.includes(target), `${path} must not import ${module}`);
      } else if (layer !== "edge" && !layer.endsWith(".ts")) {
        assert.ok(MAY_USE[layer]?.includes(module), `${path} must not use ${module}`);
      }
    }
    if (path !== "client/clock.ts") {
      assert.doesNotMatch(text, TIME, "use the clock that is passed in");
    }
  });
}
