/** Frame decoding and bodies, compared with @msgpack/msgpack. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { inspect } from "node:util";
import { decode, encode } from "@msgpack/msgpack";
import { Code, ProtocolError } from "../src/errors.js";
import { decodeBody, encodeBody, Float, MAX_DEPTH, MessageError } from "../src/wire/body.js";
import { FrameDecoder } from "../src/wire/decoder.js";
import { encodeFrame, type Frame, Kind, NO_TOKEN } from "../src/wire/frame.js";
import { decodeError, decodeRequest, encodeRequest } from "../src/wire/message.js";
import { memoryInUse } from "./support/memory.js";

/** Return a reproducible generator of random numbers in [0, 1). */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

function response(stream: number, size: number): Buffer {
  return encodeFrame(Kind.RESPONSE, stream, 1n, 2n, BigInt(stream), NO_TOKEN, Buffer.alloc(size, 0xc0));
}

function decodeAll(decoder: FrameDecoder, pieces: Iterable<Buffer>): Frame[] {
  const frames: Frame[] = [];
  for (const piece of pieces) {
    decoder.feed(piece);
    for (let frame = decoder.next(); frame !== undefined; frame = decoder.next()) {
      frames.push({ ...frame, body: Buffer.from(frame.body) });
    }
  }
  return frames;
}

describe("FrameDecoder", () => {
  const stream = Buffer.concat([response(1, 1), response(2, 0), response(3, 2_000), response(4, 10)]);

  test("frames do not depend on how the bytes are split", () => {
    const whole = decodeAll(new FrameDecoder("client", 16_384), [stream]);
    assert.deepEqual(
      whole.map((frame) => [frame.stream, frame.body.length]),
      [
        [1, 1],
        [2, 0],
        [3, 2_000],
        [4, 10],
      ],
    );
    const single = Array.from(stream, (_, at) => stream.subarray(at, at + 1));
    assert.deepEqual(decodeAll(new FrameDecoder("client", 16_384), single), whole);
    for (let at = 0; at <= stream.length; at++) {
      const pieces = [stream.subarray(0, at), stream.subarray(at)];
      assert.deepEqual(decodeAll(new FrameDecoder("client", 16_384), pieces), whole, `cut at ${at}`);
    }
    const random = seeded(1);
    for (let round = 0; round < 200; round++) {
      const pieces: Buffer[] = [];
      for (let at = 0; at < stream.length; ) {
        const size = 1 + Math.floor(random() * (random() < 0.5 ? 5 : 900));
        pieces.push(stream.subarray(at, at + size));
        at += size;
      }
      assert.deepEqual(decodeAll(new FrameDecoder("client", 16_384), pieces), whole);
    }
  });

  test("announced length allocates no memory", () => {
    const decoder = new FrameDecoder("client", 2 ** 32 - 1);
    const before = process.memoryUsage().arrayBuffers;
    const announced = encodeFrame(Kind.RESPONSE, 1, 1n, 2n, 1n, NO_TOKEN, Buffer.alloc(0));
    announced.writeUInt32BE(2 ** 32 - 1, 0);
    assert.deepEqual(decodeAll(decoder, [announced, Buffer.alloc(100)]), []);
    assert.equal(decoder.buffered, 168);
    assert.ok(process.memoryUsage().arrayBuffers - before < 1_000_000);
  });

  test("frame with an accepted length survives a lower limit", () => {
    const decoder = new FrameDecoder("client", 16_384);
    const frame = response(1, 2_000);
    assert.deepEqual(decodeAll(decoder, [frame.subarray(0, 100)]), []);
    decoder.limit = 100;
    assert.equal(decodeAll(decoder, [frame.subarray(100)]).length, 1);
    assert.throws(() => decodeAll(decoder, [response(2, 2_000)]), { code: Code.FRAME_TOO_LARGE });
  });

  test("invalid header is refused before its body arrives", () => {
    assert.throws(() => decodeAll(new FrameDecoder("client", 100), [Buffer.alloc(4)]), { code: Code.PROTOCOL_ERROR });
    const random = seeded(2);
    for (let round = 0; round < 2_000; round++) {
      const noise = Buffer.from(Array.from({ length: 80 }, () => Math.floor(random() * 256)));
      try {
        decodeAll(new FrameDecoder("client", 16_384), [noise]);
      } catch (error) {
        assert.ok(error instanceof ProtocolError);
      }
    }
  });
});

describe("bodies", () => {
  test("decoded values equal those of the library", () => {
    const random = seeded(3);
    const value = (depth: number): unknown => {
      const kind = Math.floor(random() * (depth > 0 ? 9 : 7));
      switch (kind) {
        case 0:
          return null;
        case 1:
          return random() < 0.5;
        case 2:
          return Math.floor((random() - 0.5) * 10 ** Math.floor(random() * 15));
        case 3:
          return random() * 1e9;
        case 4:
          return "aé漢😀"
            .repeat(Math.floor(random() * 30))
            .slice(0, 2 * Math.floor(random() * 40))
            .toWellFormed();
        case 5:
          return new Uint8Array(Math.floor(random() * 300)).fill(random() * 256);
        case 6:
          return "x".repeat(Math.floor(random() * 70_000 * random() * random()));
        case 7:
          return Array.from({ length: Math.floor(random() * 20) }, () => value(depth - 1));
        default:
          return Object.fromEntries(
            Array.from({ length: Math.floor(random() * 20) }, (_, n) => [`k${n}`, value(depth - 1)]),
          );
      }
    };
    for (let round = 0; round < 500; round++) {
      const original = value(4);
      const bytes = Buffer.from(encode(original));
      assert.deepEqual(decodeBody(bytes), decode(new Uint8Array(bytes)));
      assert.deepEqual(decodeBody(Buffer.from(encodeBody(original))), original);
    }
  });

  test("large ints are exact", () => {
    const edges = [2 ** 31, 2 ** 32, -(2 ** 31), -(2 ** 31) - 1, 2 ** 53 - 1, -(2 ** 53) + 1, 1_767_225_600_000];
    for (const value of [...edges, 2n ** 53n, -(2n ** 53n), 2n ** 63n - 1n, -(2n ** 63n), 2n ** 64n - 1n]) {
      const body = Buffer.from(encodeBody({ a: [value] }));
      assert.deepEqual(decodeBody(body), { a: [value] });
      assert.deepEqual(decodeBody(body, { float: Float.of }), { a: [value] }); // an int, not a float
    }
    assert.throws(() => encodeBody(2n ** 64n), MessageError);
    assert.throws(() => encodeBody(-(2n ** 63n) - 1n), MessageError);
  });

  test("encoded value is not modified", () => {
    const value = { time: 1_767_225_600_000, gone: undefined, list: [1, 1_767_225_600_000] };
    assert.deepEqual(decodeBody(Buffer.from(encodeBody(value))), {
      time: 1_767_225_600_000,
      list: [1, 1_767_225_600_000],
    });
    assert.ok("gone" in value);
  });

  test("__proto__ is an ordinary key", () => {
    const value = JSON.parse('{"__proto__": {"polluted": true}, "a": 1}') as object;
    const again = decodeBody(Buffer.from(encodeBody(value))) as object;
    assert.deepEqual(Object.keys(again), ["__proto__", "a"]);
    assert.equal(Object.getPrototypeOf(again), Object.prototype);
    assert.equal(({} as { polluted?: boolean }).polluted, undefined);
  });

  test("byte order mark is preserved", () => {
    for (const text of ["\ufeffa", `\ufeff${"a".repeat(500)}`]) {
      assert.equal(decodeBody(Buffer.from(encodeBody(text))), text);
    }
  });

  const refused: [string, unknown][] = [
    ["a date", new Date(0)],
    ["a function", () => 0],
    ["a symbol", Symbol("x")],
    ["a Map", new Map()],
    ["a lone surrogate", "\ud800"],
    ["a lone surrogate in a key", { "\udc00": 1 }],
    ["undefined in an array", [undefined]],
  ];
  for (const [name, value] of refused) {
    test(`${name} cannot be sent`, () => assert.throws(() => encodeBody({ value }), MessageError));
  }

  test("nesting is limited in both directions, including cycles", () => {
    const nested = (depth: number) => {
      let value: unknown = 0;
      for (let level = 0; level < depth; level++) {
        value = [value];
      }
      return value;
    };
    assert.deepEqual(decodeBody(Buffer.from(encodeBody(nested(MAX_DEPTH)))), nested(MAX_DEPTH));
    assert.throws(() => encodeBody(nested(MAX_DEPTH + 1)), MessageError);
    assert.throws(() => decodeBody(Buffer.from(encode(nested(MAX_DEPTH + 1)))), MessageError);
    const cycle: unknown[] = [];
    cycle.push(cycle);
    assert.throws(() => encodeBody(cycle), MessageError);
  });

  test("any bytes decode to a value or a MessageError", () => {
    const random = seeded(4);
    for (let round = 0; round < 20_000; round++) {
      const noise = Buffer.from(Array.from({ length: Math.floor(random() * 40) }, () => Math.floor(random() * 256)));
      try {
        decodeBody(noise);
      } catch (error) {
        assert.ok(error instanceof MessageError, String(error));
      }
    }
    const bombs = ["dd7fffffff", "dfffffffff", "ddffffffff", "c6ffffffff", "dbffffffff"].map((hex) =>
      Buffer.from(hex, "hex"),
    );
    for (const bomb of bombs) {
      assert.throws(() => decodeBody(bomb), MessageError);
    }
  });
});

describe("memory of hostile bodies", () => {
  const SIZE = 200_000;
  /** The bytes of a value, and how many bytes of memory it may take for each of them. */
  const cases = {
    "empty maps": ["80", 48],
    "maps of one": ["81a0c0", 48],
    "nested maps": [`${"81a0".repeat(29)}80`, 48],
    "empty arrays": ["90", 56],
    "arrays of one": ["91c0", 56],
    "nested arrays": [`${"91".repeat(29)}90`, 72],
    "arrays of many": [`dc0042${"c0".repeat(66)}`, 48],
    "empty byte strings": ["c400", 110],
    "empty strings": ["a0", 24],
  } as const;
  for (const [name, [hex, most]] of Object.entries(cases)) {
    test(`${name} take memory in proportion`, () => {
      const unit = Buffer.from(hex, "hex");
      const count = Math.floor(SIZE / unit.length);
      const head = Buffer.from([0xdd, 0, 0, 0, 0]);
      head.writeUInt32BE(count, 1);
      const body = Buffer.concat([head, ...Array.from({ length: count }, () => unit)]);
      decodeBody(body);
      const before = memoryInUse();
      const value = decodeBody(body) as unknown[];
      const used = (memoryInUse() - before) / body.length;
      assert.equal(value.length, count);
      assert.ok(used <= most, `${used.toFixed(1)} bytes of memory for each byte`);
    });
  }

  test("empty map is an ordinary object", () => {
    const map = decodeBody(Buffer.from("80", "hex")) as Record<string, unknown>;
    assert.deepStrictEqual(map, {});
    assert.equal(inspect(map), "{}");
    map["key"] = 1;
    assert.deepStrictEqual([map, structuredClone(map), JSON.stringify(map)], [{ key: 1 }, { key: 1 }, '{"key":1}']);
    assert.deepEqual(Object.keys(Object.prototype), []);
  });

  test("bodies of ERROR and CALL are decoded once", (context) => {
    const floatOf = context.mock.method(Float, "of");
    const details = { list: Array.from({ length: 9 }, (_, n) => n + 0.5) };
    assert.deepEqual(decodeError(Buffer.from(encodeBody([3, "no", details]))).details, details);
    assert.deepEqual(decodeRequest(Buffer.from(encodeBody(["m", details, { deadline_ms: 5 }]))).params, details);
    assert.equal(floatOf.mock.callCount(), 0);
  });
});

test("invalid requests are refused", () => {
  for (const method of ["", "No", "a b", "a".repeat(129)]) {
    assert.throws(() => encodeRequest(method, null), MessageError);
  }
  assert.throws(() => encodeRequest("echo", [] as unknown as Record<string, unknown>), MessageError);
  for (const idempotency_key of ["", "k".repeat(65)]) {
    assert.throws(() => encodeRequest("echo", null, { idempotency_key }), MessageError);
  }
  assert.doesNotThrow(() => encodeRequest("echo", null, { idempotency_key: "😀".repeat(64) }));
});

test("ERROR with a float as code is refused", () => {
  assert.throws(() => decodeError(Buffer.from("93cb402a000000000000a178c0", "hex")), MessageError);
});
