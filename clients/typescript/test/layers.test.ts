/** Imports point one way, and what decides knows neither network, files nor time. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join, normalize } from "node:path";
import { test } from "node:test";
import { PACKAGE } from "./support/server.js";

const SOURCE = join(PACKAGE, "src");

/** Which folder may import which, beside itself. The root holds errors.ts and version.ts, which import nothing. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  "errors.ts": [],
  "version.ts": [],
  wire: ["errors.ts"],
  connection: ["wire", "errors.ts"],
  client: ["connection", "wire", "errors.ts"],
  edge: ["client", "connection", "wire", "errors.ts"],
  "connect.ts": ["edge", "client", "connection", "wire", "errors.ts", "version.ts"],
  "index.ts": ["connect.ts", "edge", "client", "connection", "wire", "errors.ts", "version.ts"],
};

/** Modules of Node and others that compute and do nothing else. */
const MAY_USE: Readonly<Record<string, readonly string[]>> = {
  wire: ["node:buffer", "@msgpack/msgpack"],
  client: ["node:net", "node:url", "node:util"], // net for isIP
};

/** The only file of each that reads time or sets timers. */
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

for (const path of sources()) {
  test(path, () => {
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
      assert.doesNotMatch(text, TIME, "time comes from the clock that is passed in");
    }
    assert.ok(text.split("\n").length < 560, "a file is read from top to bottom");
  });
}
