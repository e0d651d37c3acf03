/** Streams with a real `zcproto serve`. */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import {
  Cancelled,
  type Client,
  FailedPrecondition,
  InvalidArgument,
  NotFound,
  ResourceExhausted,
  Unimplemented,
} from "../src/index.js";
import { Server } from "./support/server.js";

const APP = `
import asyncio
from collections.abc import AsyncIterator

import zcproto
from zcproto import App, Ended, Items

app = App()
closed = 0


@app.method("count")
async def count(n: int, size: int = 0) -> AsyncIterator[list | Ended[dict]]:
    global closed
    try:
        for number in range(n):
            yield [number, bytes(size)]
        yield Ended({"sent": n})
    finally:
        closed += 1


@app.method("forever")
async def forever() -> AsyncIterator[int]:
    global closed
    try:
        while True:
            yield 1
            await asyncio.sleep(0.001)
    finally:
        closed += 1


@app.method("fail")
async def fail() -> AsyncIterator[int]:
    for number in range(3):
        yield number
    raise zcproto.NotFound("no such thing")


@app.method("total")
async def total(numbers: Items[int], most: int = 2**40) -> int:
    result = 0
    async for number in numbers:
        result += number
        if result >= most:
            break
    return result


@app.method("chat")
async def chat(said: Items[str]) -> AsyncIterator[str]:
    async for text in said:
        yield text.upper()


@app.method("closed")
def closed_count() -> int:
    return closed
`;

let server: Server;
let key: string;
const clients: Client[] = [];

before(async () => {
  server = new Server("[sessions]\nper_user = 100\n[streams]\nmax_open = 8\n");
  writeFileSync(join(server.home, "counting.py"), APP);
  key = server.addUser("ada");
  await server.start("counting:app");
});

after(async () => {
  await Promise.all(clients.map((client) => client.close()));
  await server.remove();
});

async function connected(): Promise<Client> {
  const client = await server.connect({ user: "ada", key });
  clients.push(client);
  return client;
}

/** Wait until that many streams have ended on the server since a count. */
async function closedSince(client: Client, before: number, count: number): Promise<void> {
  while ((await client.call<number>("closed")) < before + count) {
    // Each call is a turn of the server.
  }
}

test("items arrive in order, then the result", async () => {
  const client = await connected();
  const stream = client.stream<[number, Uint8Array]>("count", { n: 2_000 }, { window: [7, 1_000] });
  const numbers: number[] = [];
  for await (const [number] of stream) {
    numbers.push(number);
  }
  assert.deepEqual(
    numbers,
    Array.from({ length: 2_000 }, (_, n) => n),
  );
  assert.deepEqual(await stream.result, { sent: 2_000 });
});

test("large items pass a small window", async () => {
  const client = await connected();
  let count = 0;
  for await (const [number, data] of client.stream<[number, Uint8Array]>(
    "count",
    { n: 50, size: 60_000 },
    { window: [10, 1] },
  )) {
    assert.equal(number, count++);
    assert.equal(data.length, 60_000);
  }
  assert.equal(count, 50);
});

test("leaving early cancels the method", async () => {
  const client = await connected();
  const before = await client.call<number>("closed");
  let seen = 0;
  for await (const _ of client.stream("forever")) {
    if (++seen === 3) {
      break;
    }
  }
  await closedSince(client, before, 1);
});

test("error of the method comes after its items", async () => {
  const client = await connected();
  const items: unknown[] = [];
  await assert.rejects(async () => {
    for await (const item of client.stream("fail")) {
      items.push(item);
    }
  }, NotFound);
  assert.deepEqual(items, [0, 1, 2]);
});

test("streams run beside each other and beside calls", async () => {
  const client = await connected();
  const unread = client.stream("count", { n: 1_000_000 });
  await unread.next();
  const sums = await Promise.all(
    Array.from({ length: 7 }, async (_, index) => {
      let count = 0;
      for await (const _item of client.stream("count", { n: 100 * index })) {
        count += 1;
      }
      return count;
    }),
  );
  assert.deepEqual(sums, [0, 100, 200, 300, 400, 500, 600]);
  assert.equal(typeof (await client.call<number>("closed")), "number");
  unread.close();
});

test("max_open is reported, and calls continue", async () => {
  const client = await connected();
  const before = await client.call<number>("closed");
  const streams = Array.from({ length: 8 }, () => client.stream("forever"));
  await Promise.all(streams.map((stream) => stream.next()));
  await assert.rejects(client.stream("forever").next(), ResourceExhausted);
  await client.call("closed");
  for (const stream of streams) {
    stream.close();
  }
  await closedSince(client, before, 8);
});

test("unary method cannot be opened, a stream cannot be called", async () => {
  const client = await connected();
  await assert.rejects(client.stream("closed").next(), FailedPrecondition);
  await assert.rejects(client.call("fail"), FailedPrecondition);
  await assert.rejects(client.stream("no.such.method").next(), Unimplemented);
});

test("method takes the items of the client", async () => {
  const client = await connected();
  const numbers = Array.from({ length: 1_000 }, (_, n) => n);
  assert.equal(await client.stream("total", {}, { items: numbers }).result, 499_500);
  assert.equal(await client.stream("total", {}, { items: [] }).result, 0);
});

test("method that ends early closes the source", async () => {
  const client = await connected();
  let isClosed = false;
  const items = (function* () {
    try {
      for (;;) {
        yield 1;
      }
    } finally {
      isClosed = true;
    }
  })();
  assert.equal(await client.stream("total", { most: 100 }, { items }).result, 100);
  assert.equal(await client.stream("total", { most: 1 }, { items: [5] }).result, 5);
  assert.ok(isClosed);
});

test("items of both sides alternate", async () => {
  const client = await connected();
  const stream = client.stream<string>("chat");
  for (const text of ["a", "b", "c"]) {
    await stream.send(text);
    assert.deepEqual(await stream.next(), { value: text.toUpperCase(), done: false });
  }
  await stream.end();
  assert.equal((await stream.next()).done, true);
  assert.equal(await stream.result, null);
});

test("item of another type is an InvalidArgument with its number", async () => {
  const client = await connected();
  await assert.rejects(
    client.stream("total", {}, { items: [1, "two", 3] }).result,
    (error) => error instanceof InvalidArgument && error.details["item"] === 1,
  );
});

test("items for a method that takes none are refused", async () => {
  const client = await connected();
  await assert.rejects(
    client.stream("forever", {}, { items: [1] }).next(),
    /this method takes no items; leave them out/,
  );
});

test("revoked session ends its streams, those of another user continue", async () => {
  const other = server.addUser("bob");
  const client = await connected();
  await using bob = await client.sessionFor({ user: "bob", key: other });
  const ofBob = bob.stream("forever");
  const ofAda = client.stream("forever");
  await Promise.all([ofBob.next(), ofAda.next()]);
  server.run("session", "revoke", "--user", "bob");
  await assert.rejects(
    async () => {
      while (!(await ofBob.next()).done) {
        // until the session ends
      }
    },
    (error) => error instanceof Cancelled && error.details["reason"] === "token_revoked",
  );
  assert.equal((await ofAda.next()).done, false);
  ofAda.close();
});
