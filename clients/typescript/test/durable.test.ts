/** Durable streams of the client, with a server in memory and a fake clock; and the file of their positions. */

import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, test } from "node:test";
import type { Client } from "../src/client/client.js";
import type { Positions, Stream } from "../src/client/stream.js";
import { PositionFile } from "../src/edge/position_file.js";
import {
  Cancelled,
  Code,
  ConfigError,
  ConnectionClosed,
  DeadlineExceeded,
  NotFound,
  OutOfRange,
  TokenRevoked,
  Unimplemented,
} from "../src/errors.js";
import { decodeBody } from "../src/wire/body.js";
import { Kind } from "../src/wire/frame.js";
import { FakeServer, type FakeSettings, type Request, STREAMING, settled, watch } from "./support/fake.js";

const DURABLE = { ...STREAMING, streams: { ...STREAMING.streams, durable: true } };
const RECONNECTED_MS = 5_000;

let server: FakeServer;
let client: Client;

beforeEach(async () => {
  server = new FakeServer();
  server.welcome = DURABLE;
  client = await server.connect();
});

afterEach(() => server.closed(client));

async function connectWith(settings: FakeSettings): Promise<void> {
  await client.close();
  client = await server.connect(settings);
}

/** The server's end of one attachment. */
class Attachment {
  /** `[method, params, resume]` of its OPEN. */
  readonly asked: unknown[];

  constructor(readonly open: Request) {
    const [frame] = open.connection.take(Kind.OPEN).filter(({ stream }) => stream === open.stream);
    assert.ok(frame);
    const [method, params, { resume }] = decodeBody(frame.body) as [string, unknown, { resume: unknown }];
    this.asked = [method, params, resume];
  }

  send(kind: Kind, body: unknown, more: { off?: number } = {}): void {
    this.open.connection.send(kind, this.open.stream, body, { token: this.open.token, ...more });
  }

  accept(more: object = {}): void {
    const { id, from } = this.asked[2] as { id: string; from: number };
    this.send(Kind.ACCEPTED, { id, attachment: "a", from, state: "running", first: 0, next: 9, ...more });
  }

  items(...values: unknown[]): void {
    for (const value of values) {
      this.send(Kind.ITEM, value);
    }
  }

  fail(code: Code, details: object): void {
    this.open.connection.fail(this.open, code, details);
  }

  respond(value: unknown): void {
    this.open.connection.respond(this.open, value);
  }

  /** Return the names of frames that the client has sent since, with the third number of CREDIT. */
  received(): unknown[] {
    return this.open.connection
      .take(Kind.END, Kind.CANCEL, Kind.CREDIT)
      .map(({ kind, body }) =>
        kind === Kind.CREDIT ? (decodeBody(body) as number[])[2] : kind === Kind.END ? "END" : "CANCEL",
      );
  }
}

/** Wait for an attachment which has not been seen. */
async function attached(ms = 0): Promise<Attachment> {
  await server.clock.advance(ms);
  await settled();
  const open = server.streams.at(-1);
  assert.ok(open, "no stream was opened");
  return new Attachment(open);
}

async function taking<T>(stream: Stream<T>, count: number): Promise<T[]> {
  const found: T[] = [];
  while (found.length < count) {
    found.push((await stream.next()).value as T);
  }
  return found;
}

describe("attachments", () => {
  test("lost connection is resumed behind the items that were taken", async () => {
    const stream = client.stream<string, string>("chat", { n: 3 }, { durable: true });
    const first = watch(taking(stream, 2));
    const one = await attached();
    assert.deepEqual(one.asked, ["chat", { n: 3 }, { id: "run-1", from: 0 }]);
    one.accept();
    one.items("a", "b", "c");
    await settled();
    assert.deepEqual(first.value, ["a", "b"]);
    assert.deepEqual([stream.id, stream.position], ["run-1", 2]);
    one.open.connection.end();
    assert.deepEqual(await taking(stream, 1), ["c"]); // which had arrived
    const next = watch(taking(stream, 1));
    const two = await attached(RECONNECTED_MS);
    assert.deepEqual(two.asked, ["chat", null, { id: "run-1", from: 3 }]);
    two.accept();
    two.items("d");
    two.respond("done");
    await settled();
    assert.deepEqual(next.value, ["d"]);
    assert.deepEqual(await stream.next(), { value: undefined, done: true });
    assert.equal(await stream.result, "done");
  });

  test("first OPEN without ACCEPTED is repeated with its params, for five minutes", async () => {
    const stream = client.stream("chat", { n: 3 }, { durable: true });
    const outcome = watch(stream.next());
    for (let repeated = 0; repeated < 3; repeated++) {
      const one = await attached(repeated === 0 ? 0 : RECONNECTED_MS);
      assert.deepEqual(one.asked, ["chat", { n: 3 }, { id: "run-1", from: 0 }]);
      one.open.connection.end();
    }
    const opened = server.streams.length;
    server.connectErrors = Array.from({ length: 1_000 }, () => new ConnectionClosed("refused"));
    await server.clock.advance(301_000);
    server.connectErrors = [];
    await server.clock.advance(60_000);
    assert.equal(server.streams.length, opened);
    assert.ok(outcome.error instanceof ConnectionClosed);
  });

  for (const details of [
    { reason: "draining", detached: true, retry_after_ms: 100 },
    { reason: "slow", detached: true },
    { reason: "token_rotated", detached: true },
    { reason: "some later reason", detached: true },
  ]) {
    test(`attachment that ended with ${details.reason} is resumed`, async () => {
      const stream = client.stream("chat", {}, { durable: true });
      const taken = watch(taking(stream, 2));
      const one = await attached();
      one.accept();
      one.items(1);
      one.fail(Code.CANCELLED, details);
      const two = await attached(RECONNECTED_MS);
      assert.deepEqual(two.asked, ["chat", null, { id: "run-1", from: 1 }]);
      two.accept();
      two.items(2);
      await settled();
      assert.deepEqual(taken.value, [1, 2]);
      stream.close();
    });
  }

  for (const [code, details, error] of [
    [Code.CANCELLED, { reason: "resumed_elsewhere", detached: true }, Cancelled],
    [Code.CANCELLED, { reason: "abandoned" }, Cancelled],
    [Code.NOT_FOUND, {}, NotFound],
    [Code.OUT_OF_RANGE, { first: 5, next: 9 }, OutOfRange],
    [Code.TOKEN_REVOKED, {}, TokenRevoked],
  ] as const) {
    test(`${error.name} ${JSON.stringify(details)} is raised after the items`, async () => {
      const stream = client.stream("chat", {}, { durable: true });
      const taken = watch(taking(stream, 1));
      const one = await attached();
      one.accept();
      one.items(1);
      one.fail(code, details);
      await settled();
      assert.deepEqual(taken.value, [1]);
      await assert.rejects(stream.next(), error);
      const opened = server.streams.length;
      await server.clock.advance(RECONNECTED_MS);
      assert.equal(server.streams.length, opened);
    });
  }

  for (const loss of ["connection", "UNAVAILABLE"]) {
    test(`OPEN that ended by ${loss} and is carried out later is replaced once`, async () => {
      const stream = client.stream("chat", {}, { durable: true });
      const taken = watch(taking(stream, 2));
      const lost = await attached();
      if (loss === "connection") {
        lost.open.connection.end();
      } else {
        lost.fail(Code.UNAVAILABLE, {});
      }
      for (const item of [1, 2]) {
        const next = await attached(RECONNECTED_MS);
        next.accept();
        next.items(item);
        next.fail(Code.CANCELLED, { reason: "resumed_elsewhere", detached: true });
      }
      await settled();
      assert.deepEqual(taken.value, [1, 2]);
      await assert.rejects(stream.next(), Cancelled);
    });
  }

  test("stale item leaves the attachment and is read on the next one", async () => {
    const stream = client.stream("chat", {}, { durable: true });
    const taken = watch(taking(stream, 1));
    const one = await attached();
    one.accept();
    one.send(Kind.ITEM, 1, { off: -30_001 });
    await settled();
    assert.deepEqual(one.received(), ["END"]);
    const two = await attached(RECONNECTED_MS);
    assert.deepEqual(two.asked, ["chat", null, { id: "run-1", from: 0 }]);
    two.accept();
    two.items(1);
    await settled();
    assert.deepEqual(taken.value, [1]);
    stream.close();
  });

  for (const [name, change] of [
    ["id", { id: "other" }],
    ["position", { from: 1 }],
  ] as const) {
    test(`ACCEPTED of another ${name} ends the connection`, async () => {
      const stream = client.stream("chat", {}, { durable: true });
      void stream.next().catch(() => undefined);
      const one = await attached();
      one.accept(change);
      await settled();
      assert.ok(one.open.connection.isClosed || one.open.connection.isAborted);
      stream.close();
    });
  }

  test("timeout of a resumed stream ends it", async () => {
    const stream = client.resume("run-9", { method: "chat", after: 4, timeoutMs: 1_000 });
    const outcome = watch(stream.next());
    const one = await attached();
    assert.deepEqual(one.asked, ["chat", null, { id: "run-9", from: 4 }]);
    one.accept();
    await server.clock.advance(1_001);
    assert.ok(outcome.error instanceof DeadlineExceeded);
  });
});

describe("leaving and cancelling", () => {
  test("leaving the loop sends END and not CANCEL", async () => {
    const stream = client.stream("chat", {}, { durable: true });
    const loop = watch(
      (async () => {
        for await (const _ of stream) {
          break;
        }
      })(),
    );
    const one = await attached();
    one.accept();
    one.items(1, 2);
    await settled();
    assert.ok(loop.isDone);
    assert.ok(one.received().includes("END"));
    assert.deepEqual(server.cancelled, []);
    assert.equal(stream.position, 1);
  });

  test("cancel ends the method of an attached stream, and of another one by its id", async () => {
    const stream = client.stream("chat", {}, { durable: true });
    const next = watch(stream.next());
    const one = await attached();
    one.accept();
    const cancelled = watch(stream.cancel());
    await settled();
    assert.deepEqual(one.received(), ["CANCEL"]);
    one.fail(Code.CANCELLED, { reason: "caller" });
    await settled();
    assert.equal(cancelled.value, true);
    assert.ok(next.error instanceof Cancelled);
    server.on("stream.cancel", ({ params }) => ({ cancelled: params["id"] === "run-7" }));
    assert.equal(await client.resume("run-7").cancel(), true);
    assert.equal(await stream.cancel(), false);
    await assert.rejects(client.stream("chat").cancel(), /not durable/);
  });

  test("resume asks the server for the method", async () => {
    server.on("stream.list", () => [{ id: "run-5", method: "chat" }]);
    const next = watch(client.resume("run-5").next());
    const one = await attached();
    assert.deepEqual(one.asked, ["chat", null, { id: "run-5", from: 0 }]);
    one.accept();
    one.respond("done");
    await settled();
    assert.deepEqual(next.value, { value: undefined, done: true });
    await assert.rejects(client.resume("run-6").next(), NotFound);
    assert.deepEqual(await client.durableStreams(), [{ id: "run-5", method: "chat" }]);
  });

  test("durable stream neither sends items nor reopens, and needs a server that has them", async () => {
    for (const option of [{ items: [1] }, { reopen: () => ({}) }]) {
      assert.throws(() => client.stream("chat", {}, { durable: true, ...option }), ConfigError);
    }
    server.welcome = STREAMING;
    await connectWith({});
    await assert.rejects(client.stream("chat", {}, { durable: true }).next(), Unimplemented);
    assert.equal(client.stream("chat").id, undefined);
  });
});

describe("what was taken", () => {
  test("it is reported within a second, and again on the next attachment", async () => {
    const stream = client.stream("chat", {}, { durable: true });
    const taken = watch(taking(stream, 3));
    const one = await attached();
    one.accept();
    one.items(1, 2);
    await server.clock.advance(1_000);
    assert.deepEqual(one.received(), [2]);
    one.open.connection.end();
    const two = await attached(RECONNECTED_MS);
    two.accept();
    await server.clock.advance(1_000);
    assert.deepEqual(two.received(), [2]);
    two.items(3);
    await settled();
    assert.deepEqual(taken.value, [1, 2, 3]);
    await server.clock.advance(2_000);
    assert.deepEqual(two.received(), [], "the third item is not processed");
    stream.close();
  });

  test("position is written before the server learns it, and again if the disk fails", async () => {
    const kept: [string, number][] = [];
    let isKept: (done: boolean) => void = () => undefined;
    const positions: Positions = {
      position: (id) => (id === "run-8" ? 5 : 0),
      keep: (id, position) => {
        kept.push([id, position]);
        return new Promise((resolve) => {
          isKept = resolve;
        });
      },
    };
    await connectWith({ positions });
    const stream = client.resume("run-8", { method: "chat" });
    void taking(stream, 2).catch(() => undefined);
    const one = await attached();
    assert.deepEqual(one.asked, ["chat", null, { id: "run-8", from: 5 }]);
    one.accept();
    one.items(1);
    await server.clock.advance(50);
    assert.deepEqual(kept, [["run-8", 6]]);
    assert.deepEqual(one.received(), []);
    isKept(false);
    await server.clock.advance(1_000);
    assert.deepEqual([kept.length, one.received()], [2, []]);
    isKept(true);
    await settled();
    assert.deepEqual(one.received(), [6]);
    stream.close();
    isKept(true);
    await settled();
  });
});

describe("file of positions", () => {
  let folder: string;
  let path: string;

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), "zcproto-positions-"));
    path = join(folder, "positions");
  });

  afterEach(() => rm(folder, { recursive: true }));

  test("positions are there after a restart, in a file for its user alone", async () => {
    const file = await PositionFile.load(path);
    assert.equal(file.position("a"), 0);
    assert.deepEqual(await Promise.all([file.keep("a", 3), file.keep("__proto__", 2), file.keep("a", 4)]), [
      true,
      true,
      true,
    ]);
    assert.equal((await stat(path)).mode & 0o777, 0o600);
    const again = await PositionFile.load(path);
    assert.deepEqual([again.position("a"), again.position("__proto__"), again.position("toString")], [4, 2, 0]);
  });

  for (const content of [
    "",
    "{",
    "[]",
    "null",
    '{"streams": 5}',
    '{"streams": {"a": -1, "b": 1.5, "c": "2", "d": null}}',
  ]) {
    test(`damaged file ${JSON.stringify(content)} counts as empty`, async () => {
      await writeFile(path, content);
      const file = await PositionFile.load(path);
      for (const id of ["a", "b", "c", "d"]) {
        assert.equal(file.position(id), 0);
      }
      assert.equal(await file.keep("a", 1), true);
      assert.equal((await PositionFile.load(path)).position("a"), 1);
    });
  }

  test("newest thousand positions are kept", async () => {
    const file = await PositionFile.load(path);
    await Promise.all(Array.from({ length: 1_001 }, (_, number) => file.keep(`run-${number}`, number + 1)));
    const again = await PositionFile.load(path);
    assert.deepEqual([again.position("run-0"), again.position("run-1"), again.position("run-1000")], [0, 2, 1_001]);
  });

  test("write that fails is reported, and done with the next one", async () => {
    const file = await PositionFile.load(join(folder, "missing", "positions"));
    assert.equal(await file.keep("a", 1), false);
    assert.equal(await file.keep("a", 1), false, "it is tried again");
    assert.equal(file.position("a"), 1);
    const other = await PositionFile.load(path);
    assert.equal(await other.keep("a", 1), true);
    const before = await stat(path);
    assert.equal(await other.keep("a", 1), true);
    assert.equal((await stat(path)).ino, before.ino, "nothing has changed");
    assert.match(await readFile(path, "utf8"), /"version":1/);
  });
});
