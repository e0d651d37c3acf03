/** What the conformance kit, which runs the vectors, cannot see: values that are encoded again, and a whole conversation. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type Json, typed, untyped } from "../conform/typed.js";
import { ClientConnection } from "../src/connection/connection.js";
import type { ItemStream } from "../src/connection/item_streams.js";
import { decodeBody, encodeBody } from "../src/wire/body.js";
import { HEADER_SIZE } from "../src/wire/frame.js";
import type { Meta, Params } from "../src/wire/message.js";
import { vectorFile } from "./support/vectors.js";

interface ConversationFrame {
  readonly from: "client" | "server";
  readonly kind: string;
  readonly bytes: string;
  readonly body: Json;
  readonly now: string;
}

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

test("conversation.json is reproduced byte for byte by the client", () => {
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
