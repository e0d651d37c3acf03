/** Calls from a real `zcproto serve` to this client. */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { Cancelled, type Client, InvalidArgument, NotFound, PermissionDenied, type UserClient } from "../src/index.js";
import { Server } from "./support/server.js";

const APP = `
import asyncio

import zcproto
from zcproto import App, Context

app = App()


@app.method("ask")
async def ask(context: Context, method: str, params: dict, timeout: float = 30.0) -> list:
    try:
        return ["answer", await context.client.call(method, params, timeout=timeout)]
    except zcproto.CallError as error:
        return ["error", error.code.name, error.message]
`;

let server: Server;
let key: string;
const clients: Client[] = [];

before(async () => {
  server = new Server("[sessions]\nper_user = 100\n");
  writeFileSync(join(server.home, "asking.py"), APP);
  key = server.addUser("ada");
  await server.start("asking:app");
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

/** Let the server call a method of the client, and return what it got. */
function asked(client: UserClient, method: string, params: object = {}, timeout = 30): Promise<unknown[]> {
  return client.call<unknown[]>("ask", { method, params, timeout });
}

test("server gets the result of a handler", async () => {
  const client = await connected();
  await client.handle("add", ({ a, b }, { user }) => [user, Number(a) + Number(b)]);
  assert.deepEqual(await asked(client, "add", { a: 1, b: 2 }), ["answer", ["ada", 3]]);
  const results = await Promise.all(Array.from({ length: 100 }, (_, n) => asked(client, "add", { a: n, b: n })));
  const tooMany = results.filter(([kind]) => kind === "error");
  assert.ok(tooMany.every(([, code]) => code === "RESOURCE_EXHAUSTED"));
  assert.ok(results.length - tooMany.length >= 16);
});

test("server gets the error of a handler", async () => {
  const client = await connected();
  await client.handle("find", ({ path }) => {
    throw path === undefined ? new InvalidArgument("no path") : new NotFound("no such file");
  });
  assert.deepEqual(await asked(client, "find", { path: "/x" }), ["error", "NOT_FOUND", "no such file"]);
  assert.deepEqual(await asked(client, "find"), ["error", "INVALID_ARGUMENT", "no path"]);
  assert.equal((await asked(client, "unknown"))[1], "UNAVAILABLE");
});

test("handler is aborted when the server stops waiting", async () => {
  const client = await connected();
  const aborted = new Promise((resolve) => {
    void client.handle("wait", (_params, { signal }) => {
      signal.addEventListener("abort", () => resolve(signal.reason));
      return new Promise(() => undefined);
    });
  });
  await client.handle("other", () => null);
  assert.equal((await asked(client, "wait", {}, 0.5))[1], "DEADLINE_EXCEEDED");
  assert.ok((await aborted) instanceof Cancelled);
});

test("handler can call the server", async () => {
  const client = await connected();
  await client.handle("inner", () => 7);
  await client.handle("outer", async () => (await asked(client, "inner"))[1]);
  assert.deepEqual(await asked(client, "outer"), ["answer", 7]);
});

test("handlers survive a reconnect", async () => {
  let count = 0;
  const client = await server.connect({ user: "ada", key, onConnected: () => count++ });
  clients.push(client);
  await client.handle("ping", () => "pong");
  client.cut();
  while (count < 2) {
    await client.call("server.info").catch(() => undefined);
  }
  assert.deepEqual(await asked(client, "ping"), ["answer", "pong"]);
});

test("users of one connection have their own handlers", async () => {
  const other = server.addUser("bob");
  const client = await connected();
  await using bob = await client.sessionFor({ user: "bob", key: other });
  for (const each of [client, bob]) {
    await each.handle("who", (_params, { user }) => user);
  }
  assert.deepEqual(await asked(client, "who"), ["answer", "ada"]);
  assert.deepEqual(await asked(bob, "who"), ["answer", "bob"]);
  await bob.handle("secret", () => {
    throw new PermissionDenied("not for you");
  });
  assert.equal((await asked(client, "secret"))[1], "UNAVAILABLE");
  assert.deepEqual(await asked(bob, "secret"), ["error", "PERMISSION_DENIED", "not for you"]);
});
