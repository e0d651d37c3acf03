/** Streams of the client, with a server in memory and a fake clock. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import type { Client } from "../src/client/client.js";
import {
  Cancelled,
  Code,
  ConfigError,
  ConnectionClosed,
  DataLoss,
  DeadlineExceeded,
  InternalError,
  InvalidArgument,
  NotFound,
  ResourceExhausted,
  StaleTimestamp,
  TlsError,
  TokenRevoked,
  Unimplemented,
} from "../src/errors.js";
import { decodeBody } from "../src/wire/body.js";
import { Kind } from "../src/wire/frame.js";
import {
  Failure,
  type FakeConnection,
  FakeServer,
  opened,
  type Request,
  STREAMING,
  settled,
  tokenText,
  WELCOME,
  watch,
} from "./support/fake.js";
import { countAlive } from "./support/memory.js";

let server: FakeServer;
let client: Client;

beforeEach(async () => {
  server = new FakeServer();
  server.welcome = STREAMING;
  client = await server.connect();
});

afterEach(() => server.closed(client));

/** The server's end of a stream. */
class Far {
  readonly connection: FakeConnection;

  constructor(readonly open: Request) {
    this.connection = open.connection;
  }

  #send(kind: Kind, body?: unknown, more: { off?: number } = {}): void {
    const { stream, token } = this.open;
    this.connection.send(kind, stream, body, { token, ...more });
  }

  item(value: unknown, more: { off?: number } = {}): void {
    this.#send(Kind.ITEM, value, more);
  }

  credit(items: number, bytes = 1_000_000): void {
    this.#send(Kind.CREDIT, [items, bytes]);
  }

  end(result: unknown = null): void {
    this.connection.respond(this.open, result);
  }

  fail(code: Code, details: object = {}): void {
    this.connection.fail(this.open, code, details);
  }

  /** Return what the client has sent since the last call: items, and the names of other frames. */
  received(): unknown[] {
    const names = new Map<Kind, string>([
      [Kind.END, "END"],
      [Kind.CREDIT, "CREDIT"],
      [Kind.CANCEL, "CANCEL"],
    ]);
    return this.connection
      .take(Kind.ITEM, ...names.keys())
      .map(({ kind, body }) => names.get(kind) ?? decodeBody(body));
  }
}

/** Wait for the OPEN of the newest stream. */
async function far(): Promise<Far> {
  await settled();
  const open = server.streams.at(-1);
  assert.ok(open, "no stream was opened");
  return new Far(open);
}

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) {
    found.push(item);
  }
  return found;
}

describe("items of the server", () => {
  test("items are iterated in order, then the result is there", async () => {
    const stream = client.stream<number, { sent: number }>("count", { n: 3 });
    const items = watch(all(stream));
    const { open, item, end } = bound(await far());
    assert.deepEqual([open.method, open.params, open.token], ["count", { n: 3 }, tokenText(1)]);
    assert.deepEqual(open.meta, { credit: [64, 262_144] });
    for (const n of [1, 2, 3]) {
      item(n);
    }
    end({ sent: 3 });
    await settled();
    assert.deepEqual(items.value, [1, 2, 3]);
    assert.deepEqual(await stream.result, { sent: 3 });
    assert.deepEqual(await stream.next(), { value: undefined, done: true });
  });

  test("stream is opened by its first use", async () => {
    const stream = client.stream("count");
    await settled();
    assert.equal(server.streams.length, 0);
    stream.close();
    assert.deepEqual(await all(stream), []);
    await assert.rejects(stream.result, Cancelled);
    assert.equal(server.streams.length, 0);
  });

  test("credit follows what the application takes", async () => {
    const stream = client.stream("count", {}, { window: [4, 100_000] });
    const first = stream.next();
    const { item, end, received } = bound(await far());
    for (const n of [1, 2, 3, 4]) {
      item(n);
    }
    assert.deepEqual(await first, { value: 1, done: false });
    await settled();
    assert.deepEqual(received(), []);
    await stream.next();
    await settled();
    assert.deepEqual(received(), ["CREDIT"]);
    end();
    assert.deepEqual(await all(stream), [3, 4]);
    assert.deepEqual(received(), []);
  });

  test("break out of the loop cancels the stream", async () => {
    const stream = client.stream("count");
    const left = (async () => {
      for await (const item of stream) {
        return item;
      }
      return undefined;
    })();
    const { open, item, end, received } = bound(await far());
    item(1);
    assert.equal(await left, 1);
    await settled();
    assert.deepEqual(received(), ["CANCEL"]);
    await assert.rejects(stream.result, Cancelled);
    item(2);
    end(); // crossed the CANCEL
    assert.deepEqual(await client.call("echo", { a: 1 }), { a: 1 });
    assert.equal(open.connection.isClosed, false);
  });

  test("close() and `await using` cancel the stream once", async () => {
    const stream = client.stream("count");
    const next = watch(stream.next());
    const { received } = bound(await far());
    await stream[Symbol.asyncDispose]();
    stream.close();
    await settled();
    assert.deepEqual(received(), ["CANCEL"]);
    assert.ok(next.error instanceof Cancelled);
    assert.deepEqual(await stream.next(), { value: undefined, done: true });
  });

  test("aborted stream rejects with the reason of its signal", async () => {
    const controller = new AbortController();
    const stream = client.stream("count", {}, { signal: controller.signal });
    const next = watch(stream.next());
    const { received } = bound(await far());
    const reason = new Error("aborted by the test");
    controller.abort(reason);
    await settled();
    assert.equal(next.error, reason);
    await assert.rejects(stream.result, reason);
    assert.deepEqual(received(), ["CANCEL"]);
  });

  test("timeout is sent as deadline_ms and ends the stream", async () => {
    const items = watch(all(client.stream("count", {}, { timeoutMs: 100 })));
    const { open, item, received } = bound(await far());
    assert.equal(open.meta.deadline_ms, 100);
    item(1);
    await server.clock.advance(100);
    assert.ok(items.error instanceof DeadlineExceeded);
    assert.deepEqual(received(), ["CANCEL"]);
  });

  test("item timeout bounds each wait, whatever the credit of the server", async () => {
    const items = watch(all(client.stream("count", {}, { itemTimeoutMs: 100 })));
    const { item, credit, received } = bound(await far());
    await server.clock.advance(99);
    item(1);
    await server.clock.advance(99);
    credit(1);
    assert.ok(!items.isDone);
    await server.clock.advance(1);
    assert.ok(items.error instanceof DeadlineExceeded);
    assert.deepEqual(received(), ["CANCEL"]);
  });

  test("error comes after the items that have arrived", async () => {
    const stream = client.stream("count");
    const first = stream.next();
    const { item, fail } = bound(await far());
    item(1);
    item(2);
    fail(Code.NOT_FOUND);
    assert.equal((await first).value, 1);
    assert.equal((await stream.next()).value, 2);
    await assert.rejects(stream.next(), NotFound);
    await assert.rejects(stream.result, NotFound);
    assert.deepEqual(await stream.next(), { value: undefined, done: true });
  });

  test("invalid item fails the stream, which is cancelled", async () => {
    const stream = client.stream("count");
    const next = watch(stream.next());
    const { open, received } = bound(await far());
    const { driver } = open.connection;
    open.connection.sendBytes(Kind.ITEM, open.stream, Buffer.from("c1", "hex"), open.token);
    await settled();
    assert.ok(next.error instanceof InternalError);
    assert.deepEqual(received(), ["CANCEL"]);
    assert.equal(driver.error, undefined);
  });

  test("stale item fails the stream with DATA_LOSS", async () => {
    const items = watch(all(client.stream("count")));
    const { item, received } = bound(await far());
    item(1);
    item(2, { off: -30_001 });
    await settled();
    assert.ok(items.error instanceof DataLoss);
    assert.deepEqual(received(), ["CANCEL"]);
  });

  test("second caller of next() is refused", async () => {
    const stream = client.stream("count");
    const first = watch(stream.next());
    await assert.rejects(stream.next(), /another caller/);
    const { item } = bound(await far());
    item(1);
    await settled();
    assert.deepEqual(first.value, { value: 1, done: false });
    stream.close();
  });

  test("stream without items has only a result", async () => {
    const stream = client.stream("add", { a: 1, b: 2 });
    const result = watch(stream.result);
    const { end } = bound(await far());
    end(3);
    await settled();
    assert.equal(result.value, 3);
    assert.deepEqual(await all(stream), []);
  });

  test("1,000 items in one read keep their order", async () => {
    const items = watch(all(client.stream("count", {}, { window: [1_000, 1_000_000] })));
    const { open, end } = bound(await far());
    const numbers = Array.from({ length: 1_000 }, (_, n) => n);
    open.connection.together(() => {
      for (const n of numbers) {
        open.connection.send(Kind.ITEM, open.stream, n, { token: open.token });
      }
    });
    end();
    await settled();
    assert.deepEqual(items.value, numbers);
  });
});

describe("items of the application", () => {
  test("an item is taken from the application only with credit", async () => {
    let taken = 0;
    const items = (async function* () {
      for (const word of ["a", "b", "c"]) {
        taken += 1;
        yield await Promise.resolve(word);
      }
    })();
    const result = watch(client.stream("upload", {}, { items }).result);
    const { credit, end, received } = bound(await far());
    assert.equal(taken, 0);
    credit(2);
    await settled();
    assert.equal(taken, 2);
    assert.deepEqual(received(), ["a", "b"]);
    credit(4);
    await settled();
    assert.deepEqual(received(), ["c", "END"]);
    end(3);
    await settled();
    assert.equal(result.value, 3);
  });

  test("any iterable can be sent, and END needs no more credit", async () => {
    const result = watch(client.stream("upload", {}, { items: [1, 2] }).result);
    const { credit, end, received } = bound(await far());
    credit(3);
    await settled();
    assert.deepEqual(received(), [1, 2, "END"]);
    end();
    await settled();
    assert.ok(result.isDone);
  });

  test("items that were sent are not kept in memory until the stream ends", async () => {
    const sent: WeakRef<object>[] = [];
    const items = (async function* () {
      for (let n = 0; n < 100; n++) {
        const item = { n };
        sent.push(new WeakRef(item));
        yield await Promise.resolve(item);
      }
      await new Promise(() => undefined);
    })();
    const stream = client.stream("upload", {}, { items });
    void stream.result.catch(() => undefined);
    const { credit, received } = bound(await far());
    credit(1_000);
    await settled();
    assert.equal(received().length, 100);
    const alive = await countAlive(sent);
    assert.ok(alive <= 3, `${alive} of 100 items are in memory`);
    stream.close();
  });

  test("failing source cancels the stream with its error", async () => {
    const fault = new Error("the disk is gone");
    const items = (function* () {
      yield 1;
      throw fault;
    })();
    const result = watch(client.stream("upload", {}, { items }).result);
    const { credit, received } = bound(await far());
    credit(9);
    await settled();
    assert.deepEqual(received(), [1, "CANCEL"]);
    assert.equal(result.error, fault);
  });

  test("source is closed when the stream ends before it", async () => {
    for (const isWaiting of [false, true]) {
      let isClosed = false;
      const items: AsyncIterable<number> = {
        [Symbol.asyncIterator]: () => ({
          next: () => (isWaiting ? new Promise(() => undefined) : Promise.resolve({ value: 1, done: false })),
          return: () => {
            isClosed = true;
            return Promise.resolve({ value: undefined, done: true });
          },
        }),
      };
      const result = watch(client.stream("upload", {}, { items }).result);
      const { credit, end } = bound(await far());
      credit(1);
      await settled();
      end("enough");
      await settled();
      assert.equal(result.value, "enough");
      assert.ok(isClosed);
    }
  });

  test("send() waits for credit, items and END keep their order", async () => {
    const stream = client.stream<string>("chat");
    const sent = ["a", "b"].map((word) => watch(stream.send(word)));
    const ended = watch(stream.end());
    const { item, credit, end, received } = bound(await far());
    assert.ok(sent.every(({ isDone }) => !isDone));
    credit(1);
    await settled();
    assert.deepEqual(
      sent.map(({ isDone }) => isDone),
      [true, false],
    );
    credit(2);
    await settled();
    assert.ok(ended.isDone);
    assert.deepEqual(received(), ["a", "b", "END"]);
    await assert.rejects(stream.send("c"), /no more items/);
    item("reply");
    end();
    assert.deepEqual(await all(stream), ["reply"]);
  });

  test("items are sent only while the transport takes them", async () => {
    const { last } = server;
    const stream = client.stream("upload", {}, { items: [1, 2, 3] });
    void stream.result;
    const { credit, received } = bound(await far());
    last.unsentBytes = 65_536;
    credit(9);
    await settled();
    assert.deepEqual(received(), []);
    last.unsentBytes = 0;
    last.driver.resumeWriting();
    await settled();
    assert.deepEqual(received(), [1, 2, 3, "END"]);
    stream.close();
  });

  test("item that cannot be sent is refused and the stream continues", async () => {
    const stream = client.stream("chat");
    const bad = watch(stream.send(() => 0));
    const large = watch(stream.send(new Uint8Array(65_536)));
    const good = watch(stream.send("good"));
    const { credit, received } = bound(await far());
    credit(9);
    await settled();
    assert.ok(bad.error instanceof InvalidArgument && large.error instanceof InvalidArgument);
    assert.ok(good.isDone);
    assert.deepEqual(received(), ["good"]);
    stream.close();
  });

  test("send() after the end of the stream rejects", async () => {
    const ended = client.stream("chat");
    const waiting = watch(ended.send(1));
    bound(await far()).end();
    await settled();
    assert.ok(waiting.error instanceof Cancelled);
    const failed = client.stream("chat");
    const waitingToo = watch(failed.send(1));
    bound(await far()).fail(Code.NOT_FOUND);
    await settled();
    assert.ok(waitingToo.error instanceof NotFound);
    await assert.rejects(client.stream("upload", {}, { items: [] }).send(1), /no more items/);
  });
});

describe("retries", () => {
  test("server without streams gets nothing", async () => {
    await client.close();
    server.welcome = WELCOME;
    client = await server.connect();
    await assert.rejects(client.stream("count").next(), Unimplemented);
    assert.equal(server.streams.length, 0);
  });

  test("max_open is reported and not retried", async () => {
    await client.close();
    server.welcome = { ...STREAMING, streams: { max_open: 1, max_item: 1_000 } };
    client = await server.connect();
    const first = client.stream("count");
    void first.result;
    await settled();
    await assert.rejects(client.stream("count").next(), ResourceExhausted);
    first.close();
  });

  test("stream that certainly did not run is opened again", async () => {
    const items = watch(all(client.stream("count")));
    bound(await far()).fail(Code.UNAVAILABLE, { retry_after_ms: 1_000 });
    await server.clock.advance(1_100);
    assert.equal(server.streams.length, 2);
    bound(await far()).fail(Code.STALE_TIMESTAMP, { server_time: server.clock.wall() });
    await settled();
    assert.equal(server.streams.length, 3);
    const { item, end } = bound(await far());
    item(1);
    end();
    await settled();
    assert.deepEqual(items.value, [1]);
  });

  test("stale OPEN is opened again once", async () => {
    const items = watch(all(client.stream("count")));
    for (let n = 0; n < 2; n++) {
      bound(await far()).fail(Code.STALE_TIMESTAMP);
    }
    await settled();
    assert.ok(items.error instanceof StaleTimestamp);
    assert.equal(server.streams.length, 2);
  });

  test("stream that has begun is never opened again", async () => {
    for (const begin of [(one: Far) => one.item(1), (one: Far) => one.credit(1)]) {
      const before = server.streams.length;
      const items = watch(all(client.stream("count")));
      const one = await far();
      begin(one);
      one.fail(Code.UNAVAILABLE);
      await server.clock.advance(60_000);
      assert.ok(items.error !== undefined);
      assert.equal(server.streams.length, before + 1);
    }
  });

  test("END before the first CREDIT is sent again with the new OPEN", async () => {
    const stream = client.stream("upload");
    const result = watch(stream.result);
    await stream.end();
    const first = bound(await far());
    assert.deepEqual(first.received(), ["END"]);
    first.fail(Code.STALE_TIMESTAMP);
    const second = bound(await far());
    assert.deepEqual(second.received(), ["END"]);
    second.end(0);
    await settled();
    assert.equal(result.value, 0);
  });

  test("lost connection: items that have arrived, then ConnectionClosed", async () => {
    for (const error of [undefined, new TlsError("truncated")]) {
      const opens = server.streams.length;
      const stream = client.stream("count");
      const first = stream.next();
      const { open, item } = bound(await far());
      item(1);
      item(2);
      open.connection.end(error);
      assert.equal((await first).value, 1);
      assert.equal((await stream.next()).value, 2);
      await assert.rejects(
        stream.next(),
        (lost) => lost instanceof ConnectionClosed && lost.clean === (error === undefined),
      );
      await server.clock.advance(60_000);
      assert.equal(server.streams.length, opens + 1);
    }
  });

  test("GOAWAY and clean end before the first item: the stream is opened again", async () => {
    const stream = client.stream("count");
    const items = watch(all(stream));
    const { open } = bound(await far());
    assert.equal(stream.draining, false);
    open.connection.goAway();
    await settled();
    assert.equal(stream.draining, true);
    open.connection.end();
    await server.clock.advance(1_000);
    assert.equal(server.streams.length, 2);
    const second = bound(await far());
    second.item("again");
    second.end();
    await settled();
    assert.deepEqual(items.value, ["again"]);
  });

  test("GOAWAY after an item: the stream continues and is not opened again", async () => {
    const items = watch(all(client.stream("count")));
    const { open, item, end } = bound(await far());
    item(1);
    open.connection.goAway();
    item(2);
    end();
    await settled();
    assert.deepEqual(items.value, [1, 2]);
    assert.ok(open.connection.isClosed);
  });

  test("TOKEN_REVOKED for a stream ends the session", async () => {
    const items = watch(all(client.stream("count")));
    bound(await far()).fail(Code.TOKEN_REVOKED);
    await settled();
    assert.ok(items.error instanceof TokenRevoked);
    await assert.rejects(client.call("echo"), TokenRevoked);
  });

  describe("with reopen", () => {
    const reopen = ({ id }: { id: number }) => ({ after: id });

    test("lost stream continues after the last item that the application took", async () => {
      const stream = client.stream<{ id: number }>("jobs", { of: "ada", after: 0 }, { reopen });
      const first = stream.next();
      const one = bound(await far());
      for (const id of [1, 2, 3]) {
        one.item({ id });
      }
      await first;
      one.open.connection.end();
      await server.clock.advance(5_000);
      assert.equal(server.streams.length, 1); // two items wait
      await stream.next();
      await stream.next();
      const fourth = stream.next();
      await server.clock.advance(5_000);
      const two = bound(await far());
      assert.deepEqual(two.open.params, { of: "ada", after: 3 });
      two.item({ id: 4 });
      two.end("done");
      assert.deepEqual((await fourth).value, { id: 4 });
      assert.deepEqual(await all(stream), []);
      assert.equal(await stream.result, "done");
    });

    test("stream is opened again after an interruption, with growing delays without an item", async () => {
      const items = watch(all(client.stream<{ id: number }>("jobs", {}, { reopen })));
      const interruptions: [Code, object][] = [
        [Code.CANCELLED, { reason: "draining", retry_after_ms: 1_000 }],
        [Code.CANCELLED, { reason: "stale" }],
      ];
      for (const [code, details] of interruptions) {
        const one = bound(await far());
        one.credit(1);
        one.fail(code, details);
        await settled();
        assert.ok(!items.isDone);
        await server.clock.advance(2_000);
      }
      for (const kind of [Kind.ITEM, Kind.RESPONSE]) {
        const { open } = bound(await far());
        open.connection.send(kind, open.stream, { id: 1 }, { token: open.token, off: -30_001 });
        await settled();
        assert.ok(!items.isDone);
        await server.clock.advance(2_000);
      }
      const last = bound(await far());
      assert.equal(server.streams.length, 5);
      assert.deepEqual(last.open.params, {});
      last.end();
      await settled();
      assert.deepEqual(items.value, []);
    });

    test("other errors, a closed client and close() end it", async () => {
      for (const [code, details] of [
        [Code.NOT_FOUND, {}],
        [Code.CANCELLED, { reason: "token_revoked" }],
        [Code.CANCELLED, { reason: "slow" }],
        [Code.DATA_LOSS, {}],
      ] as const) {
        const items = watch(all(client.stream<{ id: number }>("jobs", {}, { reopen })));
        const one = bound(await far());
        one.item({ id: 1 });
        one.fail(code, details);
        await settled();
        assert.ok(items.error !== undefined);
      }
      const stream = client.stream<{ id: number }>("jobs", {}, { reopen });
      void stream.next();
      const one = bound(await far());
      one.item({ id: 1 });
      one.item({ id: 2 });
      await settled();
      one.fail(Code.CANCELLED, { reason: "stale" });
      await settled();
      stream.close();
      const before = server.streams.length;
      await server.clock.advance(5_000);
      assert.equal(server.streams.length, before);
      await assert.rejects(stream.result, Cancelled);
    });

    test("it cannot send items", async () => {
      assert.throws(() => client.stream("jobs", {}, { window: [1, 0] }), /window: give \[items, bytes\], both above 0/);
      assert.throws(() => client.stream<{ id: number }>("jobs", {}, { reopen, items: [] }), ConfigError);
      await assert.rejects(client.stream<{ id: number }>("jobs", {}, { reopen }).send(1), /no more items/);
    });
  });

  test("large first OPEN is preceded by a small request with the token", async () => {
    client.cut();
    server.script("session.info", new Failure(Code.UNAVAILABLE), {});
    await server.clock.advance(1_000);
    const stream = client.stream("count", { text: "x".repeat(20_000) });
    void stream.result;
    await far();
    assert.equal(server.methods.at(-1), "session.info");
    stream.close();
  });

  test("items keep the session in use", async () => {
    await client.close();
    server.script("session.open", opened(5, { idle_timeout_ms: 60_000 }), opened(6));
    client = await server.connect();
    const stream = client.stream("count");
    void stream.result.catch(() => undefined);
    const { item } = bound(await far());
    for (let n = 0; n < 3; n++) {
      await server.clock.advance(50_000);
      item(n);
      await stream.next();
    }
    await client.call("echo");
    assert.equal(server.requests.at(-1)?.token, tokenText(5));
    stream.close();
  });
});

/** Return the methods of a Far, for destructuring. */
function bound(one: Far) {
  return {
    open: one.open,
    item: one.item.bind(one),
    credit: one.credit.bind(one),
    end: one.end.bind(one),
    fail: one.fail.bind(one),
    received: one.received.bind(one),
  };
}
