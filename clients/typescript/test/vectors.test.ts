/** All vectors of the specification: whole, byte by byte, cut in two, and with trailing bytes. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { type Outcome, outcomesOf } from "../conform/outcomes.js";
import { type Json, typed, untyped } from "../conform/typed.js";
import { attachMessage, openMessage } from "../src/client/signing.js";
import { ClientConnection } from "../src/connection/connection.js";
import type { ItemStream } from "../src/connection/item_streams.js";
import { Device } from "../src/edge/device.js";
import { Code } from "../src/errors.js";
import { decodeBody, encodeBody } from "../src/wire/body.js";
import {
  acceptedBy,
  encodeFrame,
  HEADER_SIZE,
  Kind,
  NO_TOKEN,
  tokenBytes,
  tokenFromText,
  tokenToText,
} from "../src/wire/frame.js";
import { encodeRequest, isTraceparent, type Meta, type Params } from "../src/wire/message.js";
import { ROOT } from "./support/server.js";
import { FRAME_FILES, type SlowVector, type Vector, vectorFile } from "./support/vectors.js";

const CUT_EVERYWHERE = 700; // bytes; longer ones are cut near field boundaries and at the end

function* cutsOf(data: Buffer): Generator<Buffer[]> {
  yield Array.from(data, (_, at) => data.subarray(at, at + 1));
  const boundaries = new Set([0, 3, 4, 5, 8, 12, 20, 28, 36, 67, 68, 69, data.length - 1, data.length]);
  for (let at = 0; at <= data.length; at++) {
    if (data.length <= CUT_EVERYWHERE || boundaries.has(at)) {
      yield [data.subarray(0, at), data.subarray(at)];
    }
  }
}

/** The outcomes that this client can detect. */
function expected({ receiver, expect }: Vector): Outcome[] {
  if (receiver === "client") {
    return expect.map(simple);
  }
  // Only headers and bodies are checked (spec/vectors/README.md), since a client does not implement a server.
  const outcomes: Outcome[] = [];
  for (const outcome of expect) {
    if (outcome["result"] === "dropped" || !["header", "body", undefined].includes(outcome["stage"] as string)) {
      outcomes.push({}); // detected only by a server
    } else {
      outcomes.push(simple(outcome));
    }
  }
  return outcomes;
}

function simple(outcome: Outcome): Outcome {
  if (outcome["result"] === "error") {
    return { result: "error", code: outcome["code"] as Json, fatal: outcome["fatal"] as Json };
  }
  return outcome["result"] === "dropped" ? { result: "dropped" } : outcome;
}

function check(actual: readonly Outcome[], vector: Vector): void {
  const outcomes = expected(vector);
  const isEndedElsewhere = vector.receiver === "server" && vector.expect.some(({ fatal }) => fatal === true);
  assert.ok(
    isEndedElsewhere ? actual.length >= outcomes.length : actual.length === outcomes.length,
    "number of outcomes",
  );
  for (const [index, outcome] of outcomes.entries()) {
    const found = actual[index] as Outcome;
    if (Object.keys(outcome).length === 0) {
      assert.ok(found);
    } else if (outcome["result"] === "dropped") {
      assert.equal(found["result"], "dropped");
    } else {
      assert.deepEqual(comparable(found), comparable(outcome));
    }
  }
}

/** Normalize NaN and an empty `meta`. */
function comparable(outcome: Outcome): unknown {
  const { message, ...rest } = outcome as { message?: { meta?: object } };
  const { meta, ...fields } = message ?? {};
  const text = JSON.stringify({ ...rest, message: fields, meta: meta ?? {} });
  return JSON.parse(text.replaceAll(/"(7ff8|fff8)0{12}"/g, '"NaN"').replaceAll(/"7ff[89a-f][0-9a-f]{12}"/g, '"NaN"'));
}

for (const file of FRAME_FILES) {
  const { vectors, count } = vectorFile(file);
  describe(`${file}.json`, () => {
    test("has the declared number of vectors", () => assert.equal(vectors.length, count));
    for (const vector of vectors) {
      test(vector.name, () => {
        const data = Buffer.from(vector.bytes, "hex");
        const whole = outcomesOf(vector.receiver, vector.context, [data]);
        check(whole, vector);
        for (const pieces of cutsOf(data)) {
          assert.deepEqual(outcomesOf(vector.receiver, vector.context, pieces), whole);
        }
        const last = whole.at(-1);
        if (last?.["fatal"] === true) {
          const trailing = Buffer.concat([data, Buffer.alloc(100, 0xff)]);
          assert.deepEqual(outcomesOf(vector.receiver, vector.context, [trailing]), whole);
        } else if (last?.["result"] === "frame" && last["kind"] !== "WELCOME") {
          const salt = BigInt(`0x${vector.context.salt ?? "0"}`);
          const ping = encodeFrame(
            Kind.PING,
            0,
            BigInt(vector.context.now),
            salt,
            2n ** 64n - 1n,
            NO_TOKEN,
            Buffer.alloc(0),
          );
          const more = outcomesOf(vector.receiver, vector.context, [data, ping]);
          assert.deepEqual(more.slice(0, whole.length), whole);
        }
      });
    }
  });
}

describe("arrival.json", () => {
  for (const { name, receiver, context, pieces, expect } of vectorFile<SlowVector>("arrival").vectors) {
    test(name, () => {
      const times = pieces.map(({ now }) => now);
      const data = pieces.map(({ bytes }) => Buffer.from(bytes, "hex"));
      const actual = outcomesOf(receiver, { ...context, now: times[0] ?? "" }, data, times);
      check(actual, { name, receiver, context, bytes: "", expect });
    });
  }
});

test("accepted frames are encoded identically", () => {
  let count = 0;
  for (const file of FRAME_FILES) {
    for (const { expect } of vectorFile(file).vectors) {
      for (const { result, kind, stream, timestamp, salt, counter, token, body, length } of expect) {
        if (result === "frame") {
          const frame = encodeFrame(
            Kind[kind as keyof typeof Kind],
            stream as number,
            BigInt(timestamp as string),
            BigInt(`0x${String(salt)}`),
            BigInt(counter as string),
            Buffer.from(token as string, "hex").toString("latin1"),
            Buffer.from(body as string, "hex"),
          );
          assert.equal(frame.length, 4 + (length as number));
          assert.equal(frame.readUInt32BE(0), length);
          assert.equal(frame.subarray(68).toString("hex"), body);
          count += 1;
        }
      }
    }
  }
  assert.ok(count > 100);
});

test("decoded values are encoded identically", () => {
  let count = 0;
  for (const { expect } of vectorFile("bodies").vectors) {
    for (const outcome of expect) {
      const { value } = (outcome["message"] ?? {}) as { value?: Json };
      if (value !== undefined) {
        const again = decodeBody(Buffer.from(encodeBody(untyped(value))));
        assert.equal(JSON.stringify(typed(again)), JSON.stringify(typed(untyped(value)))); // -0 is encoded as 0
        count += 1;
      }
    }
  }
  assert.ok(count > 50);
});

describe("text.json", () => {
  interface TextVector {
    readonly name: string;
    readonly type: "token" | "traceparent";
    readonly text: string;
    readonly expect: { readonly valid: boolean; readonly bytes?: string };
  }
  for (const { name, type, text, expect } of vectorFile<TextVector>("text").vectors) {
    test(name, () => {
      if (type === "traceparent") {
        assert.equal(isTraceparent(text), expect.valid);
        return;
      }
      const token = tokenFromText(text);
      assert.equal(token !== undefined, expect.valid);
      if (token !== undefined) {
        assert.equal(tokenBytes(token).toString("hex"), expect.bytes);
        assert.equal(tokenToText(token), text);
      }
    });
  }
});

describe("signatures.json", () => {
  interface SignatureVector {
    readonly name: string;
    readonly private_key: string;
    readonly public_key: string;
    readonly salt: string;
    readonly leaf: string;
    readonly device?: string;
    readonly token?: string;
    readonly message: string;
    readonly signature: string;
    readonly expect: { readonly valid: boolean };
  }
  for (const vector of vectorFile<SignatureVector>("signatures").vectors) {
    test(vector.name, () => {
      const channel = { salt: BigInt(`0x${vector.salt}`), leaf: Buffer.from(vector.leaf, "hex") };
      const message =
        vector.device === undefined
          ? attachMessage(channel, Buffer.from(vector.token ?? "", "hex").toString("latin1"))
          : openMessage(channel, vector.device);
      assert.equal(message.toString("hex"), vector.message);
      const device = Device.fromSeed(Buffer.from(vector.private_key, "hex"));
      assert.equal(Buffer.from(device.publicKey).toString("hex"), vector.public_key);
      const signature = Buffer.from(device.sign(message)).toString("hex");
      assert.equal(signature === vector.signature, vector.expect.valid);
    });
  }
});

test("tables.json matches the constants", () => {
  interface Tables {
    readonly kinds: Record<string, number>;
    readonly codes: Record<string, number>;
  }
  const tables = vectorFile("tables") as unknown as Tables;
  const streaming = vectorFile("streaming/tables") as unknown as Tables;
  const { ACCEPTED: reserved, ...kinds } = streaming.kinds;
  assert.deepEqual(Kind, { ...tables.kinds, ...kinds });
  assert.ok(!acceptedBy("client", ["streams", "calls"]).kinds.has(reserved as number));
  assert.deepEqual(Code, tables.codes);
});

test("conversation.json is reproduced byte for byte by the client", () => {
  interface ConversationFrame {
    readonly from: "client" | "server";
    readonly kind: string;
    readonly bytes: string;
    readonly body: Json;
    readonly now: string;
  }
  const connection = new ClientConnection();
  const { vectors, count } = vectorFile<ConversationFrame>("conversation");
  assert.equal(vectors.length, count);
  const sentStreams: number[] = [];
  for (const { from, kind, bytes, body, now } of vectors) {
    const data = Buffer.from(bytes, "hex");
    const timestamp = data.readBigUInt64BE(12);
    const token = data.toString("latin1", 36, 68);
    if (from === "server") {
      const events = connection.receiveData(data, BigInt(now), 0);
      assert.ok(events.every((event) => event.type !== "ended"));
      continue;
    }
    const wall = timestamp - connection.clockOffset;
    if (kind === "REQUEST") {
      const [method, params, meta] = untyped(body) as [string, Params | null, Meta | undefined];
      sentStreams.push(connection.request(method, params, token, meta, wall));
    } else if (kind === "CANCEL") {
      connection.cancel(data.readUInt32BE(8), wall);
    } else {
      connection.ping(wall);
    }
    assert.equal(connection.dataToSend()?.toString("hex"), bytes, kind);
  }
  assert.deepEqual(sentStreams, [1, 2, 3, 4]);
  assert.equal(connection.inFlight, 0);
});

test("streaming/conversation.json is reproduced byte for byte by the client, apart from its window", () => {
  interface ConversationFrame {
    readonly from: "client" | "server";
    readonly kind: string;
    readonly bytes: string;
    readonly body: Json;
    readonly now: string;
  }
  const connection = new ClientConnection();
  let stream: ItemStream | undefined;
  for (const { from, kind, bytes, body, now } of vectorFile<ConversationFrame>("streaming/conversation").vectors) {
    const data = Buffer.from(bytes, "hex");
    const token = data.toString("latin1", 36, 68);
    const wall = data.readBigUInt64BE(12) - connection.clockOffset;
    const value = untyped(body);
    if (from === "server") {
      const [event] = connection.receiveData(data, BigInt(now), 0);
      const types: Record<string, string> = { WELCOME: "welcomed", RESPONSE: "response", ITEM: "item", CALL: "call" };
      assert.equal(event?.type, types[kind]);
      continue;
    }
    if (kind === "REQUEST") {
      const [, { methods, max }] = value as [string, { methods: string[]; max: number }];
      connection.handle(token, methods, max, wall);
    } else if (kind === "OPEN") {
      const [method, params, { credit }] = value as [string, Params, { credit: [number, number] }];
      stream = connection.openStream(method, params, token, { window: credit }, wall);
    } else if (kind === "CREDIT" && stream !== undefined) {
      assert.equal(stream.takeItem(32), "Hel");
      assert.equal(connection.streams.takeItem(stream, wall), "lo");
    } else {
      connection.calls.answer(data.readUInt32BE(8), value, wall);
    }
    const sent = connection.dataToSend()?.toString("hex") ?? "";
    const size = kind === "CREDIT" ? 2 * HEADER_SIZE : Number.POSITIVE_INFINITY;
    assert.equal(sent.slice(0, size), bytes.slice(0, size), kind);
  }
  assert.equal(connection.inFlight, 0);
});

test("requests of the vectors are encoded identically", () => {
  let count = 0;
  for (const { expect, receiver } of FRAME_FILES.flatMap((file) => vectorFile(file).vectors)) {
    for (const { message } of expect) {
      const { method, params, meta } = (message ?? {}) as {
        method?: string;
        params?: Json;
        meta?: Record<string, Json>;
      };
      if (receiver === "server" && method !== undefined && params !== undefined) {
        const plain = Object.fromEntries(
          Object.entries(meta ?? {}).map(([key, value]) => [key, untyped(value)]),
        ) as Meta;
        const body = encodeRequest(method, untyped(params) as Params, meta === undefined ? undefined : plain);
        const [, sent] = decodeBody(Buffer.from(body)) as [string, unknown];
        assert.deepEqual(typed(sent), typed(untyped(params)));
        count += 1;
      }
    }
  }
  assert.ok(count > 20);
});

test("every file of vectors is tested", () => {
  const files = readdirSync(join(ROOT, "spec/vectors"), { recursive: true, encoding: "utf8" }).filter((name) =>
    name.endsWith(".json"),
  );
  const tests = ["vectors.test.ts", "retry.test.ts"];
  const source = tests.map((name) => readFileSync(join(ROOT, "clients/typescript/test", name), "utf8")).join("");
  for (const name of files.map((file) => file.replace(".json", "")).filter((file) => file !== "schema")) {
    assert.ok(FRAME_FILES.includes(name) || source.includes(`"${name}"`), `${name}.json is not tested`);
  }
});
