/** Calls of the server, sessions of several users, and what survives a reconnect, with a server in memory and a fake clock. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import type { Client } from "../src/client/client.js";
import { DeviceKey } from "../src/client/session.js";
import type { ServerCall } from "../src/client/types.js";
import {
  Cancelled,
  Code,
  ConnectionClosed,
  NotFound,
  PermissionDenied,
  TokenRevoked,
  Unauthenticated,
  Unimplemented,
} from "../src/errors.js";
import { decodeBody } from "../src/wire/body.js";
import { Kind, type Token } from "../src/wire/frame.js";
import {
  Failure,
  FakeServer,
  KEY,
  NO_RESPONSE,
  opened,
  type Request,
  STREAMING,
  settled,
  tokenNumber,
  tokenText,
  WELCOME,
  watch,
} from "./support/fake.js";

let server: FakeServer;
let client: Client;

beforeEach(async () => {
  server = new FakeServer();
  server.welcome = STREAMING;
  client = await server.connect();
});

afterEach(() => server.closed(client));

const PERSON = { user: "bob", key: KEY };

/** Call a method of the client on the newest connection. */
async function call(
  method: string,
  params: object | null = {},
  { stream = 1, token = tokenText(1) }: { stream?: number; token?: Token } = {},
): Promise<void> {
  server.last.send(Kind.CALL, stream, [method, params, { deadline_ms: 5_000 }], { token });
  await settled();
}

function withdraw(stream = 1, token = tokenText(1)): void {
  server.last.send(Kind.WITHDRAW, stream, undefined, { token });
}

/** Return the answers since the last call, each as its number and its value or code. */
function answers(): unknown[] {
  return server.last.take(Kind.RESULT, Kind.FAILURE).map(({ kind, stream, body }) => {
    const value = decodeBody(body);
    return kind === Kind.RESULT ? [stream, value] : [stream, "FAILURE", (value as unknown[])[0]];
  });
}

function registrations(): unknown[] {
  return server.requests
    .filter(({ method }) => method === "session.handle")
    .map(({ params, token }) => [params["methods"], token]);
}

describe("handlers", () => {
  test("call of the server is answered by its handler", async () => {
    const calls: ServerCall[] = [];
    await client.handle("approve", ({ tool }, called) => {
      calls.push(called);
      return tool === "shell";
    });
    assert.deepEqual(registrations(), [[["approve"], tokenText(1)]]);
    assert.equal(server.requests.at(-1)?.params["max"], 32);
    await call("approve", { tool: "shell" });
    await call("approve", null, { stream: 2 });
    assert.deepEqual(answers(), [
      [1, true],
      [2, false],
    ]);
    const [first] = calls;
    assert.deepEqual([first?.method, first?.user, first?.deadlineMs], ["approve", "ada", 5_000]);
    assert.equal(first?.signal.aborted, false);
  });

  test("handler that returns nothing answers nil, and one that fails an error", async () => {
    await client.handle("nothing", () => undefined);
    await client.handle("denied", () => {
      throw new PermissionDenied("no");
    });
    await client.handle("broken", () => Promise.reject(new TypeError("a bug")));
    for (const [index, method] of ["nothing", "denied", "broken", "unknown"].entries()) {
      await call(method, {}, { stream: index + 1 });
    }
    assert.deepEqual(answers(), [
      [1, null],
      [2, "FAILURE", Code.PERMISSION_DENIED],
      [3, "FAILURE", Code.INTERNAL],
      [4, "FAILURE", Code.UNIMPLEMENTED],
    ]);
    assert.equal(server.warnings.length, 1);
    assert.match(server.warnings[0] as string, /TypeError: a bug/);
  });

  test("withdrawn call is aborted and answered once, whatever its handler does", async () => {
    let signal: AbortSignal | undefined;
    let finish: (value: unknown) => void = () => undefined;
    await client.handle("approve", (_params, called) => {
      signal = called.signal;
      return new Promise((resolve) => {
        finish = resolve;
      });
    });
    await call("approve");
    withdraw();
    await settled();
    assert.ok(signal?.reason instanceof Cancelled);
    assert.deepEqual(await later(), [[1, "FAILURE", Code.CANCELLED]]);
    const finishFirst = finish;
    await call("approve"); // the number is free
    finishFirst("late");
    assert.deepEqual(await later(), []);
    finish("second");
    assert.deepEqual(await later(), [[1, "second"]]);
    withdraw();
    assert.deepEqual(await later(), []);
  });

  test("at most `maxCalls` handlers run at once", async () => {
    await client.close();
    client = await server.connect({ maxCalls: 2 });
    const token = tokenText(2);
    const finish: ((value: unknown) => void)[] = [];
    await client.handle("wait", () => new Promise((resolve) => finish.push(resolve)));
    assert.equal(server.requests.at(-1)?.params["max"], 2);
    for (const stream of [1, 2, 3]) {
      await call("wait", {}, { stream, token });
    }
    assert.deepEqual(answers(), [[3, "FAILURE", Code.RESOURCE_EXHAUSTED]]);
    withdraw(1, token);
    await call("wait", {}, { stream: 3, token });
    assert.deepEqual(answers(), [
      [1, "FAILURE", Code.CANCELLED],
      [3, "FAILURE", Code.RESOURCE_EXHAUSTED], // the withdrawn handler still runs
    ]);
    finish[0]?.(null);
    await settled();
    await call("wait", {}, { stream: 3, token });
    assert.deepEqual(answers(), []);
  });

  test("answers wait until the server reads, and take the places of other calls", async () => {
    await client.close();
    client = await server.connect({ maxCalls: 1 });
    const token = tokenText(2);
    await client.handle("a", () => 1);
    server.last.driver.pauseWriting();
    await call("a", {}, { token });
    await call("a", {}, { stream: 2, token });
    assert.deepEqual(answers(), [[2, "FAILURE", Code.RESOURCE_EXHAUSTED]]);
    server.last.driver.resumeWriting();
    assert.deepEqual(await later(), [[1, 1]]);
  });

  test("GOAWAY: calls in flight are answered before the connection closes", async () => {
    let finish: (value: unknown) => void = () => undefined;
    await client.handle("wait", () => new Promise((resolve) => (finish = resolve)));
    const { last } = server;
    await call("wait");
    last.goAway();
    await server.clock.advance(1_000);
    assert.equal(server.connections.length, 2);
    assert.ok(!last.isClosed);
    finish("done");
    await settled();
    assert.deepEqual(
      last.take(Kind.RESULT).map(({ body }) => decodeBody(body)),
      ["done"],
    );
    assert.ok(last.isClosed);
  });

  test("reconnect registers the handlers, which also presents the session", async () => {
    await client.handle("a", () => 1);
    await client.handle("b", () => 2);
    server.last.end();
    await server.clock.advance(1_000);
    assert.equal(server.connections.length, 2);
    assert.deepEqual(registrations().at(-1), [["a", "b"], tokenText(1)]);
    assert.ok(!server.methods.includes("session.info"));
    await call("b");
    assert.deepEqual(answers(), [[1, 2]]);
  });

  test("session of a device registers them before its other requests on a new connection", async () => {
    await client.close();
    server.on("session.open", () => opened(1, { bound: true }));
    client = await server.connect({ credentials: new DeviceKey({ sign: () => new Uint8Array(64) }, "laptop") });
    await client.handle("a", () => 1);
    const attaching: Request[] = [];
    server.on("session.attach", (request) => {
      attaching.push(request);
      return NO_RESPONSE;
    });
    server.last.end();
    await server.clock.advance(1_000);
    const call = client.call("echo");
    await settled();
    assert.equal(server.methods.at(-1), "session.attach");
    attaching[0]?.connection.respond(attaching[0], {});
    await call;
    assert.deepEqual(server.methods.slice(-3), ["session.attach", "session.handle", "echo"]);
  });

  test("lost connection aborts its handlers", async () => {
    let signal: AbortSignal | undefined;
    await client.handle("wait", (_params, called) => {
      signal = called.signal;
      return new Promise(() => undefined);
    });
    await call("wait");
    server.last.end();
    await server.clock.advance(1_000);
    assert.ok(signal?.reason instanceof ConnectionClosed);
  });

  test("handle() waits for a connection, and repeats a lost registration", async () => {
    server.script(
      "session.handle",
      ({ connection }: { connection: { end(): void } }) => {
        connection.end();
        return NO_RESPONSE;
      },
      {},
    );
    const handled = watch(client.handle("a", () => 1));
    await settled();
    assert.ok(!handled.isDone);
    await server.clock.advance(1_000);
    assert.ok(handled.isDone && handled.error === undefined);
    await call("a");
    assert.deepEqual(answers(), [[1, 1]]);
  });

  test("handle() rejects if the server does not call clients, or without a session", async () => {
    await client.close();
    server.welcome = WELCOME;
    client = await server.connect();
    await assert.rejects(
      client.handle("a", () => 1),
      Unimplemented,
    );
    await client.close();
    server.welcome = STREAMING;
    client = await server.connect({ credentials: undefined, opensSession: false });
    server.script("session.handle", new Failure(Code.UNAUTHENTICATED));
    await assert.rejects(
      client.handle("a", () => 1),
      Unauthenticated,
    );
  });

  test("refreshed session keeps its handlers, a new one registers them", async () => {
    await client.close();
    const refreshable = { refresh_token: tokenNumber(99), refresh_expires_at: server.clock.wall() + 86_400_000 };
    server.script("session.open", opened(5, refreshable), opened(7));
    server.script("session.refresh", opened(6));
    client = await server.connect();
    await client.handle("a", () => 1);
    await server.clock.advance(3_100_000);
    assert.ok(server.methods.includes("session.refresh"));
    assert.deepEqual(registrations(), [[["a"], tokenText(5)]]);
    await call("a", {}, { token: tokenText(5) }); // under way during the refresh
    await call("a", {}, { token: tokenText(6) });
    assert.deepEqual(answers(), [
      [1, 1],
      [1, 1],
    ]);
    server.script("echo", new Failure(Code.TOKEN_REVOKED), {});
    await assert.rejects(client.call("echo"), TokenRevoked);
    await client.openSession();
    await settled();
    assert.deepEqual(registrations().at(-1), [["a"], tokenText(7)]);
  });

  test("call with the new token in the read of a refresh reaches its handler", async () => {
    await client.close();
    const refreshable = { refresh_token: tokenNumber(99), refresh_expires_at: server.clock.wall() + 86_400_000 };
    server.script("session.open", opened(5, refreshable));
    server.on("session.refresh", (request) => {
      request.connection.together(() => {
        request.connection.respond(request, opened(6));
        const called = ["a", {}, { deadline_ms: 5_000 }];
        request.connection.send(Kind.CALL, 1, called, { token: tokenText(6) });
      });
      return NO_RESPONSE;
    });
    client = await server.connect();
    await client.handle("a", () => "called");
    server.last.send(Kind.EVENT, 0, ["session.expiring", {}], { token: tokenText(5) });
    await settled();
    assert.deepEqual(await later(), [[1, "called"]]);
  });

  test("session of handlers is shown before its idle timeout, and renewed when it expires", async () => {
    await client.close();
    const idle = { idle_timeout_ms: 600_000 };
    const later = { ...idle, expires_at: server.clock.wall() + 7_200_000 };
    server.script("session.open", opened(5, idle), opened(6, later));
    client = await server.connect();
    await client.handle("a", () => 1);
    await server.clock.advance(3_500_000);
    assert.ok(registrations().length >= 10);
    assert.ok(registrations().length <= 20);
    assert.ok(registrations().every((registration) => (registration as unknown[])[1] === tokenText(5)));
    await server.clock.advance(600_000);
    assert.deepEqual(registrations().at(-1), [["a"], tokenText(6)]);
    await call("a", {}, { token: tokenText(6) });
    assert.deepEqual(answers(), [[1, 1]]);
    const { length } = server.requests;
    server.script("session.handle", new Failure(Code.TOKEN_REVOKED));
    await server.clock.advance(3_600_000);
    assert.ok(server.requests.length <= length + 1);
  });

  test("end of the session aborts its handlers", async () => {
    let signal: AbortSignal | undefined;
    await client.handle("wait", (_params, called) => {
      signal = called.signal;
      return new Promise(() => undefined);
    });
    await call("wait");
    server.on("session.handle", () => NO_RESPONSE);
    server.last.send(Kind.EVENT, 0, ["session.revoked", {}], { token: tokenText(1) });
    await settled();
    assert.ok(signal?.reason instanceof Cancelled);
    assert.deepEqual(answers(), [[1, "FAILURE", Code.CANCELLED]]);
  });

  test("session of a device is attached before its handlers are registered", async () => {
    await client.close();
    server.script("session.open", opened(5, { bound: true }));
    server.script("session.attach", {});
    const device = new DeviceKey({ sign: () => new Uint8Array(64) }, "laptop");
    client = await server.connect({ credentials: device });
    await client.handle("a", () => 1);
    server.last.end();
    await server.clock.advance(1_000);
    assert.deepEqual(server.methods.slice(-2), ["session.attach", "session.handle"]);
  });

  test("calls wait until the server has the handlers on a new connection", async () => {
    await client.close();
    server.script("session.open", opened(5, { bound: true }));
    server.on("session.attach", () => ({}));
    client = await server.connect({ credentials: new DeviceKey({ sign: () => new Uint8Array(64) }, "laptop") });
    await client.handle("a", () => 1);
    server.last.end();
    const calls = [1, 2, 3].map((n) => client.call("echo", { n }));
    await server.clock.advance(1_000);
    assert.deepEqual(server.methods.slice(-5), ["session.attach", "session.handle", "echo", "echo", "echo"]);
    assert.deepEqual(await Promise.all(calls), [{ n: 1 }, { n: 2 }, { n: 3 }]);
    server.on("session.handle", () => new Failure(Code.PERMISSION_DENIED)); // that holds nothing up
    server.last.end();
    const call = watch(client.call("echo"));
    await server.clock.advance(1_000);
    assert.deepEqual(call.value, {});
  });
});

describe("sessionFor", () => {
  test("users have their own sessions on one connection", async () => {
    const bob = await client.sessionFor(PERSON);
    assert.equal(server.connections.length, 1);
    assert.deepEqual(server.requests.at(-1)?.params, { scheme: "api_key", user: "bob", key: KEY, client: "test/1" });
    await client.call("echo", { of: "ada" });
    await bob.call("echo", { of: "bob" });
    const tokens = server.requests.filter(({ method }) => method === "echo").map(({ token }) => token);
    assert.deepEqual(tokens, [tokenText(1), tokenText(2)]);
    assert.equal(client.session?.id, "s-1");
    assert.equal(bob.session?.id, "s-2");
  });

  test("client without credentials can carry sessions of others", async () => {
    await client.close();
    client = await server.connect({ credentials: undefined, opensSession: false });
    await using bob = await client.sessionFor(PERSON);
    await bob.call("echo");
    assert.equal(server.requests.at(-1)?.token, tokenText(2));
    assert.equal(client.session, undefined);
  });

  test("refused session rejects and leaves the client alone", async () => {
    server.script("session.open", new Failure(Code.UNAUTHENTICATED));
    await assert.rejects(client.sessionFor(PERSON), Unauthenticated);
    assert.deepEqual(await client.call("echo", { a: 1 }), { a: 1 });
  });

  test("each session gets its own events, the client all others", async () => {
    const bob = await client.sessionFor(PERSON);
    const heard: unknown[] = [];
    const carol = await client.sessionFor({ user: "carol", key: KEY, onEvent: ({ data }) => heard.push(data) });
    for (const [token, data] of [
      [tokenText(2), "for bob"],
      [tokenText(3), "for carol"],
      [tokenText(1), "for ada"],
      [tokenText(44), "for the connection"],
    ] as const) {
      server.last.send(Kind.EVENT, 0, ["news", data], { token });
    }
    await settled();
    assert.equal((await bob.events.next()).value?.data, "for bob");
    assert.deepEqual(heard, ["for carol"]);
    assert.equal((await client.events.next()).value?.data, "for ada");
    assert.equal((await client.events.next()).value?.data, "for the connection");
    await carol.close();
  });

  test("call of the server reaches the handler of its session", async () => {
    const bob = await client.sessionFor(PERSON);
    await client.handle("who", () => "ada");
    await bob.handle("who", () => "bob");
    await call("who", {}, { token: tokenText(2) });
    await call("who", {}, { token: tokenText(1) });
    await call("who", {}, { token: tokenText(3) });
    assert.deepEqual(answers(), [
      [1, "bob"],
      [1, "ada"],
      [1, "FAILURE", Code.UNAUTHENTICATED],
    ]);
    await bob.close();
    await call("who", {}, { token: tokenText(2) });
    assert.deepEqual(answers(), [[1, "FAILURE", Code.UNAUTHENTICATED]]);
  });

  test("end of one session does not disturb the others", async () => {
    const bob = await client.sessionFor(PERSON);
    let signal: AbortSignal | undefined;
    await client.handle("wait", (_params, called) => {
      signal = called.signal;
      return new Promise(() => undefined);
    });
    await call("wait");
    let ofBob: AbortSignal | undefined;
    await bob.handle("wait", (_params, called) => {
      ofBob = called.signal;
      return new Promise(() => undefined);
    });
    await call("wait", {}, { stream: 2, token: tokenText(2) });
    const items = watch(client.stream("count").next());
    server.on("echo", ({ token, params }) => (token === tokenText(2) ? new Failure(Code.TOKEN_REVOKED) : params));
    await assert.rejects(bob.call("echo"), TokenRevoked);
    await assert.rejects(bob.call("echo"), TokenRevoked);
    await client.call("echo");
    assert.ok(ofBob?.reason instanceof TokenRevoked);
    assert.equal(signal?.aborted, false);
    assert.ok(!items.isDone);
    await bob.openSession();
    await settled();
    assert.equal(bob.session?.id, "s-3");
  });

  test("closing a session keeps the connection, closing the client closes all sessions", async () => {
    const bob = await client.sessionFor(PERSON);
    await bob.close();
    const closed = server.requests.filter(({ method }) => method === "session.close");
    assert.deepEqual(
      closed.map(({ token }) => token),
      [tokenText(2)],
    );
    await assert.rejects(bob.call("echo"), ConnectionClosed);
    await client.call("echo");
    const carol = await client.sessionFor({ user: "carol", key: KEY });
    await client.close();
    const tokens = server.requests.filter(({ method }) => method === "session.close").map(({ token }) => token);
    assert.deepEqual(tokens, [tokenText(2), tokenText(3), tokenText(1)]);
    assert.deepEqual(await carol.events.next(), { value: undefined, done: true });
  });

  test("reconnect presents each session", async () => {
    const bob = await client.sessionFor(PERSON);
    await bob.handle("who", () => "bob");
    server.last.end();
    await server.clock.advance(1_000);
    const shown = server.requests.slice(-2).map(({ method, token }) => [method, token]);
    assert.deepEqual(shown, [
      ["session.info", tokenText(1)],
      ["session.handle", tokenText(2)],
    ]);
  });

  test("client reconnects for other users after the end of its own session", async () => {
    const bob = await client.sessionFor(PERSON);
    server.on("echo", ({ token, params }) => (token === tokenText(1) ? new Failure(Code.TOKEN_REVOKED) : params));
    await assert.rejects(client.call("echo"), TokenRevoked);
    server.last.end();
    await server.clock.advance(1_000);
    assert.equal(server.connections.length, 2);
    await bob.call("echo");
    await bob.close();
    server.last.end();
    await server.clock.advance(60_000);
    assert.equal(server.connections.length, 2);
  });
});

describe("onConnected", () => {
  test("it is called once connected, and after each reconnect when the handlers are registered", async () => {
    await client.close();
    const seen: [Client, number][] = [];
    client = await server.connect({ onConnected: (connected) => seen.push([connected, registrations().length]) });
    assert.equal(seen.length, 1);
    assert.equal(seen[0]?.[0].session?.id, "s-2");
    await client.handle("a", () => 1);
    server.last.end();
    await server.clock.advance(1_000);
    assert.deepEqual(
      seen.map(([connected, count]) => [connected === client, count]),
      [
        [true, 0],
        [true, 2],
      ],
    );
  });

  test("it is not called for a connection that was lost at once", async () => {
    await client.close();
    let count = 0;
    client = await server.connect({ onConnected: () => count++ });
    server.on("session.info", ({ connection }) => {
      connection.end();
      return NO_RESPONSE;
    });
    server.last.end();
    await server.clock.advance(300);
    assert.ok(server.connections.length > 2);
    assert.equal(count, 1);
    server.on("session.info", () => ({}));
    await server.clock.advance(60_000);
    assert.equal(count, 2);
  });
});

describe("functions of the application that fail", () => {
  const faults: Readonly<Record<string, () => unknown>> = {
    "that throws": () => {
      throw new Error("a bug of the application");
    },
    "that rejects": () => Promise.reject(new Error("a bug of the application")),
  };
  for (const [how, fail] of Object.entries(faults)) {
    test(`onConnected ${how} is a warning each time, and the client goes on`, async () => {
      await client.close();
      client = await server.connect({ onConnected: fail });
      server.last.end();
      await server.clock.advance(1_000);
      assert.equal(server.warnings.length, 2);
      assert.match(server.warnings[1] as string, /^onConnected failed: Error: a bug of the application/);
      await client.call("echo");
    });

    test(`onEvent ${how} is a warning, and later events arrive`, async () => {
      await client.close();
      client = await server.connect({ onEvent: fail });
      for (const name of ["one", "two"]) {
        server.last.send(Kind.EVENT, 0, [name, null], { token: tokenText(2) });
      }
      await settled();
      assert.equal(server.warnings.length, 2);
      assert.match(server.warnings[0] as string, /^onEvent failed: Error: a bug of the application/);
    });
  }
});

test("errors of handlers that are CallErrors of this package keep their details", async () => {
  await client.handle("find", () => {
    throw new NotFound("no such file", { path: "/x" });
  });
  await call("find");
  const [frame] = server.last.take(Kind.FAILURE);
  assert.deepEqual(decodeBody(frame?.body as Buffer), [Code.NOT_FOUND, "no such file", { path: "/x" }]);
});

async function later(): Promise<unknown[]> {
  await settled();
  return answers();
}
