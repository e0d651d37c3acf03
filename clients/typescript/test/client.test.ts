/** Calls, sessions, retries and reconnects, with a server in memory and a fake clock. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import { inspect } from "node:util";
import type { Client } from "../src/client/client.js";
import { MAX_EVENT_BYTES } from "../src/client/event_stream.js";
import { DeviceKey } from "../src/client/session.js";
import {
  Cancelled,
  CannotConnect,
  Code,
  ConnectionClosed,
  DeadlineExceeded,
  FailedPrecondition,
  InternalError,
  InvalidArgument,
  ResourceExhausted,
  SessionReplaced,
  StaleTimestamp,
  TlsError,
  TokenExpired,
  TokenRevoked,
  Unauthenticated,
  Unavailable,
  UnknownError,
} from "../src/errors.js";
import { Kind, NO_TOKEN } from "../src/wire/frame.js";
import {
  Failure,
  type FakeConnection,
  FakeServer,
  KEY,
  NO_RESPONSE,
  opened,
  STREAMING,
  settled,
  tokenNumber,
  tokenText,
  WALL,
  WELCOME,
  watch,
} from "./support/fake.js";

let server: FakeServer;
let client: Client;

beforeEach(() => {
  server = new FakeServer();
});

afterEach(() => server.closed(client));

describe("calls", () => {
  beforeEach(async () => {
    client = await server.connect();
  });

  test("concurrent calls get their own responses in any order", async () => {
    const responses: (() => void)[] = [];
    server.on("echo", (request) => {
      responses.unshift(() => request.connection.respond(request, request.params));
      return NO_RESPONSE;
    });
    const calls = Array.from({ length: 100 }, (_, n) => client.call("echo", { n }));
    await settled();
    for (const respond of responses) {
      respond();
    }
    assert.deepEqual(
      await Promise.all(calls),
      Array.from({ length: 100 }, (_, n) => ({ n })),
    );
  });

  test("timeout without its unit, or as text, is refused with the cure", () => {
    for (const options of [{ timeout: 5 }, { timeoutMs: "5" }] as object[]) {
      assert.throws(() => client.call("echo", {}, options), /give timeoutMs, a number of milliseconds/);
    }
  });

  test("calls carry the token and the timeout as deadline_ms", async () => {
    await client.call("echo", {}, { timeoutMs: 1_500, traceparent: "00-x" });
    const { token, meta } = server.requests.at(-1) ?? {};
    assert.equal(token, tokenText(1));
    assert.deepEqual(meta, { deadline_ms: 1_500, traceparent: "00-x" });
    await client.call("echo", {}, { timeoutMs: Number.POSITIVE_INFINITY });
    assert.deepEqual(server.requests.at(-1)?.meta, {});
  });

  test("calls wait for a free stream in order", async () => {
    await client.close();
    server.welcome = { ...WELCOME, max_streams: 2 };
    client = await server.connect();
    const order: unknown[] = [];
    server.on("echo", ({ params }) => {
      order.push(params["n"]);
      return params;
    });
    const calls = Array.from({ length: 20 }, (_, n) => client.call("echo", { n }));
    await Promise.all(calls);
    assert.deepEqual(
      order,
      Array.from({ length: 20 }, (_, n) => n),
    );
  });

  test("deadline that the server notices first has the same message", async () => {
    server.on("sleep", () => NO_RESPONSE);
    const call = watch(client.call("sleep", {}, { timeoutMs: 100 }));
    await server.clock.advance(0);
    const sleeping = server.requests.find(({ method }) => method === "sleep");
    assert.ok(sleeping);
    server.last.fail(sleeping, Code.DEADLINE_EXCEEDED, {}, "the deadline has passed");
    await server.clock.advance(0);
    assert.ok(call.error instanceof DeadlineExceeded);
    assert.match(call.error.message, /give it a longer timeoutMs/);
  });

  test("timed out call is cancelled without affecting others", async () => {
    server.on("sleep", () => NO_RESPONSE);
    const slow = watch(client.call("sleep", {}, { timeoutMs: 100 }));
    const other = watch(client.call("sleep", {}, { timeoutMs: 200 }));
    await server.clock.advance(99);
    assert.ok(!slow.isDone);
    await server.clock.advance(1);
    assert.ok(slow.error instanceof DeadlineExceeded);
    assert.ok(!other.isDone);
    const sleeping = server.requests.find(({ method }) => method === "sleep");
    assert.deepEqual(server.cancelled, [sleeping?.stream]);
    assert.ok(sleeping);
    server.last.fail(sleeping, Code.CANCELLED); // its late response is dropped
    assert.deepEqual(await client.call("echo", { still: "here" }), { still: "here" });
    await server.clock.advance(100);
    assert.ok(other.error instanceof DeadlineExceeded);
  });

  test("aborted call rejects with the reason of its signal", async () => {
    server.on("sleep", () => NO_RESPONSE);
    const controller = new AbortController();
    const call = watch(client.call("sleep", {}, { signal: controller.signal }));
    await settled();
    const reason = new Error("aborted by the test");
    controller.abort(reason);
    await settled();
    assert.equal(call.error, reason);
    assert.equal(server.cancelled.length, 1);
    await assert.rejects(client.call("echo", {}, { signal: controller.signal }), reason);
    assert.equal(server.methods.filter((method) => method === "echo").length, 0);
  });

  test("aborted call leaves the queue for a free stream", async () => {
    await client.close();
    server.welcome = { ...WELCOME, max_streams: 1 };
    client = await server.connect();
    server.on("sleep", () => NO_RESPONSE);
    const controller = new AbortController();
    const running = watch(client.call("sleep"));
    const aborted = watch(client.call("echo", {}, { signal: controller.signal }));
    const waiting = watch(client.call("echo"));
    await settled();
    controller.abort();
    await settled();
    assert.ok(aborted.isDone && !waiting.isDone);
    const sleeping = server.requests.find(({ method }) => method === "sleep");
    assert.ok(sleeping);
    server.last.respond(sleeping, {});
    await settled();
    assert.deepEqual(running.value, {});
    assert.deepEqual(waiting.value, {});
  });

  test("invalid params are refused before sending", async () => {
    await assert.rejects(client.call("No Such"), InvalidArgument);
    await assert.rejects(client.call("echo", { date: new Date() }), InvalidArgument);
    await assert.rejects(client.call("echo", { text: "a".repeat(2_000_000) }), InvalidArgument);
  });

  test("large first call is preceded by a small request with the token", async () => {
    const large = { text: "a".repeat(100_000) };
    assert.deepEqual(await client.call("echo", large), large);
  });

  test("unknown code is an UnknownError with the number", async () => {
    server.script("echo", new Failure(200));
    await assert.rejects(client.call("echo"), (error) => error instanceof UnknownError && /200/.test(error.message));
  });
});

describe("retries (zcp1.md, section 11.1)", () => {
  beforeEach(async () => {
    client = await server.connect();
  });

  const attempts = (method = "echo") => server.methods.filter((name) => name === method).length;

  for (const code of [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED]) {
    test(`${code}: retried after retry_after_ms with jitter until the deadline`, async () => {
      const busy = new Failure(code, { retry_after_ms: 1_000 });
      server.script("echo", busy, busy, { done: true });
      const call = watch(client.call("echo"));
      await server.clock.advance(1_049); // 1000 and half of 100
      assert.equal(attempts(), 1);
      await server.clock.advance(1);
      assert.equal(attempts(), 2);
      await server.clock.advance(1_100);
      assert.deepEqual(call.value, { done: true });
    });

    test(`${code}: reported at once if a retry would miss the deadline`, async () => {
      server.script("echo", new Failure(code, { retry_after_ms: 1_000 }));
      const call = watch(client.call("echo", {}, { timeoutMs: 1_000 }));
      await settled();
      assert.ok(call.error instanceof Unavailable || call.error instanceof ResourceExhausted);
      assert.equal(attempts(), 1);
    });
  }

  test("session limit: reported without a retry", async () => {
    server.script("echo", new Failure(Code.RESOURCE_EXHAUSTED, { limit: 5 }));
    await assert.rejects(client.call("echo"), ResourceExhausted);
    assert.equal(attempts(), 1);
  });

  test("STALE_TIMESTAMP: clock corrected, retried once at once", async () => {
    server.script("echo", new Failure(Code.STALE_TIMESTAMP, { server_time: WALL + 100_000 }), { done: true });
    server.clockAheadMs = 100_000;
    assert.deepEqual(await client.call("echo"), { done: true });
    const [, frame] = server.last.frames.filter(({ kind }) => kind === Kind.REQUEST).slice(-2);
    assert.equal(frame?.timestamp, BigInt(WALL + 100_000));
    server.script("echo", new Failure(Code.STALE_TIMESTAMP, { server_time: WALL + 100_000 }));
    await assert.rejects(client.call("echo"), StaleTimestamp);
    assert.equal(attempts(), 4);
  });

  test("TOKEN_EXPIRED without a refresh token: new session, retried once", async () => {
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), { done: true });
    assert.deepEqual(await client.call("echo"), { done: true });
    assert.equal(attempts("session.open"), 2);
    assert.equal(server.requests.at(-1)?.token, tokenText(2));
    server.script("echo", new Failure(Code.TOKEN_EXPIRED));
    await assert.rejects(client.call("echo"), TokenExpired);
  });

  for (const [code, kind] of [
    [Code.TOKEN_REVOKED, TokenRevoked],
    [Code.SESSION_REPLACED, SessionReplaced],
  ] as const) {
    test(`${code}: reported to every call, no reconnect until openSession()`, async () => {
      server.script("echo", new Failure(code));
      await assert.rejects(client.call("echo"), kind);
      await assert.rejects(client.call("echo"), kind);
      assert.equal(attempts(), 1);
      server.last.end();
      await server.clock.advance(60_000);
      assert.equal(server.connections.length, 1, "no reconnect");
      assert.equal(attempts("session.open"), 1);
      server.script("echo", { done: true });
      const session = await client.openSession();
      assert.equal(session.id, "s-2");
      assert.deepEqual(await client.call("echo"), { done: true });
    });
  }

  test("UNAUTHENTICATED: reported, new session only by openSession()", async () => {
    server.script("echo", new Failure(Code.UNAUTHENTICATED));
    await assert.rejects(client.call("echo"), Unauthenticated);
    assert.equal(attempts("session.open"), 1);
    await client.openSession();
    assert.equal(attempts("session.open"), 2);
  });

  for (const code of [
    Code.DEADLINE_EXCEEDED,
    Code.CANCELLED,
    Code.INTERNAL,
    Code.UNKNOWN,
    Code.NOT_FOUND,
    Code.PERMISSION_DENIED,
    Code.ABORTED,
    Code.DATA_LOSS,
  ]) {
    test(`${code}: never retried, with or without an idempotency key`, async () => {
      server.script("echo", new Failure(code, { a: 1 }));
      for (const idempotencyKey of [undefined, "k"]) {
        await assert.rejects(
          client.call("echo", {}, { idempotencyKey }),
          (error: InternalError) => error.code === code && error.details["a"] === 1,
        );
      }
      assert.equal(attempts(), 2);
    });
  }

  test("lost connection: call without idempotency key is not retried", async () => {
    server.on("echo", () => NO_RESPONSE);
    const call = watch(client.call("echo"));
    await settled();
    server.last.end(new TlsError("truncated"));
    await settled();
    assert.ok(call.error instanceof ConnectionClosed && !call.error.clean);
    await server.clock.advance(1_000);
    assert.equal(attempts(), 1);
    assert.equal(server.connections.length, 2);
  });

  test("lost connection: call with idempotency key is retried", async () => {
    server.on("echo", () => NO_RESPONSE);
    const call = watch(client.call("echo", {}, { idempotencyKey: "order-7" }));
    await settled();
    server.on("echo", ({ meta }) => ({ key: meta.idempotency_key }));
    server.last.end(new TlsError("truncated"));
    await server.clock.advance(1_000);
    assert.deepEqual(call.value, { key: "order-7" });
    assert.equal(attempts(), 2);
  });

  test("GOAWAY and clean end without a response: call is retried", async () => {
    server.on("echo", () => NO_RESPONSE);
    const call = watch(client.call("echo"));
    await settled();
    const first = server.last;
    first.goAway("draining", 1_000);
    await server.clock.advance(1_000);
    assert.equal(server.connections.length, 1, "no reconnect before retry_after_ms");
    await server.clock.advance(100);
    assert.equal(server.connections.length, 2);
    assert.ok(!call.isDone, "its response may still arrive");
    server.script("echo", { done: true });
    first.end();
    await server.clock.advance(1_000);
    assert.deepEqual(call.value, { done: true });
  });

  test("GOAWAY and truncation: call is not retried", async () => {
    server.on("echo", () => NO_RESPONSE);
    const call = watch(client.call("echo"));
    await settled();
    server.last.goAway();
    server.connections[0]?.end(new TlsError("truncated"));
    await server.clock.advance(1_000);
    assert.ok(call.error instanceof ConnectionClosed);
  });

  test("GOAWAY: calls in flight finish, new calls use another connection, the old one is closed", async () => {
    server.on("echo", () => NO_RESPONSE);
    const old = watch(client.call("echo", { n: 1 }));
    await settled();
    const request = server.requests.at(-1);
    const first = server.last;
    first.goAway();
    server.script("echo", { new: true });
    const next = watch(client.call("echo"));
    await server.clock.advance(200);
    assert.deepEqual(next.value, { new: true });
    assert.ok(request && !first.isClosed);
    first.respond(request, { old: true });
    await settled();
    assert.deepEqual(old.value, { old: true });
    assert.ok(first.isClosed);
  });
});

describe("connections", () => {
  test("error of the first attempt is reported", async () => {
    server.connectErrors = [new CannotConnect("fake:7443: ECONNREFUSED")];
    client = server.client();
    await assert.rejects(client.open(), CannotConnect);
    await assert.rejects(client.call("echo"), ConnectionClosed);
  });

  test("refused first attempt is repeated until the server listens", async () => {
    const refused = () => new CannotConnect("fake:7443: ECONNREFUSED", { refused: true });
    server.connectErrors = Array.from({ length: 8 }, refused);
    client = server.client({ startTimeoutMs: 10_000 });
    const opening = watch(client.open());
    await server.clock.advance(5_000);
    assert.ok(opening.isDone && opening.error === undefined);
    assert.deepEqual(server.warnings, [
      "fake:7443: nothing listens there yet; waiting up to 10 s for the server to start",
    ]);
    server.last.end(new TlsError("truncated"));
    await server.clock.advance(50); // the delay of the first reconnect
    assert.equal(server.connections.length, 2);
  });

  test("first attempt is repeated after GOAWAY, unless it asks to wait beyond the start timeout", async () => {
    for (const [retryAfterMs, connects] of [
      [1_000, true],
      [4_000, false],
    ] as const) {
      const before = server.connections.length;
      server.onConnection = (connection) => {
        if (server.connections.length === before + 1) {
          connection.goAway("draining", retryAfterMs);
        }
      };
      const opened = server.client({ startTimeoutMs: 3_000 });
      const opening = watch(opened.open());
      await server.clock.advance(900);
      assert.equal(server.connections.length, before + 1);
      await server.clock.advance(300);
      assert.ok(opening.isDone);
      assert.equal(opening.error === undefined, connects);
      assert.equal(server.connections.length, before + (connects ? 2 : 1));
      await opened.close();
    }
    assert.deepEqual(server.warnings, []);
  });

  test("refusal is reported after the start timeout, another error at once", async () => {
    const refused = () => new CannotConnect("fake:7443: ECONNREFUSED", { refused: true });
    server.connectErrors = Array.from({ length: 1_000 }, refused);
    client = server.client({ startTimeoutMs: 3_000 });
    const opening = watch(client.open());
    await server.clock.advance(1_900);
    assert.ok(!opening.isDone);
    await server.clock.advance(1_100);
    assert.ok(opening.error instanceof CannotConnect);
    server.connectErrors = [refused(), new TlsError("disconnected")];
    const second = watch(server.client({ startTimeoutMs: 3_000 }).open());
    await server.clock.advance(100);
    assert.ok(second.error instanceof TlsError);
  });

  test("reconnect backs off with full jitter up to 30 s until a connection has lasted", async () => {
    client = await server.connect();
    server.connectErrors = Array.from({ length: 12 }, () => new CannotConnect("no"));
    const left = () => server.connectErrors.length;
    server.last.end(new TlsError("truncated"));
    const delays: number[] = [];
    for (let count = 12; count >= 0; count--) {
      const began = server.clock.ms;
      const goal = count;
      while (count > 0 ? left() === goal : server.connections.length === 1) {
        await server.clock.advance(25);
      }
      delays.push(server.clock.ms - began);
    }
    assert.deepEqual(delays, [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 15_000, 15_000, 15_000, 15_000]);
    await client.call("echo");
    server.last.end();
    await server.clock.advance(14_999);
    assert.equal(server.connections.length, 2);
    await server.clock.advance(1);
    assert.equal(server.connections.length, 3);
    await server.clock.advance(5_000);
    server.last.end();
    await server.clock.advance(49);
    assert.equal(server.connections.length, 3);
    await server.clock.advance(1);
    assert.equal(server.connections.length, 4);
  });

  test("timed out call reports why the reconnect failed", async () => {
    client = await server.connect();
    server.connectErrors = Array.from({ length: 100 }, () => new CannotConnect("fake:7443: ECONNREFUSED"));
    server.last.end();
    const call = watch(client.call("echo", {}, { timeoutMs: 2_000 }));
    await server.clock.advance(2_000);
    assert.ok(call.error instanceof DeadlineExceeded);
    assert.match(call.error.message, /ECONNREFUSED/);
  });

  test("pin mismatch on reconnect is reported and not retried", async () => {
    client = await server.connect();
    server.connectErrors = [new TlsError("pin_mismatch"), new TlsError("pin_mismatch")];
    server.last.end();
    await server.clock.advance(60_000);
    assert.equal(server.connectErrors.length, 1);
    await assert.rejects(client.call("echo"), (error) => error instanceof TlsError && error.failure === "pin_mismatch");
    assert.deepEqual(await client.call("echo"), {});
  });

  test("connection closed for idleness reconnects with the next call", async () => {
    client = await server.connect();
    server.last.goAway("idle");
    await server.clock.advance(60_000);
    assert.equal(server.connections.length, 1);
    const call = watch(client.call("echo"));
    await server.clock.advance(1_000);
    assert.deepEqual(call.value, {});
  });

  test("reconnect presents the session by a small request", async () => {
    client = await server.connect();
    server.last.end();
    await server.clock.advance(1_000);
    assert.deepEqual(server.methods, ["session.open", "session.info"]);
    assert.equal(server.requests.at(-1)?.token, tokenText(1));
    assert.equal(client.session?.id, "s-1");
  });

  test("connection is aborted after an unanswered PING", async () => {
    server.welcome = { ...WELCOME, idle_timeout_ms: 90_000 };
    client = await server.connect();
    const first = server.last;
    first.isFrozen = true;
    await server.clock.advance(60_000);
    assert.ok(first.isAborted || first.frames.some(({ kind }) => kind === Kind.PING));
    await server.clock.advance(20_000);
    assert.ok(first.isAborted);
    assert.ok(server.connections.length > 1);
  });

  test("fatal ERROR is reported with its code", async () => {
    client = await server.connect();
    server.on("echo", ({ connection }) => {
      connection.send(Kind.ERROR, 0, [Code.REPLAYED, "nonce"]);
      return NO_RESPONSE;
    });
    await assert.rejects(
      client.call("echo"),
      (error) => error instanceof ConnectionClosed && error.code === Code.REPLAYED,
    );
  });

  test("close() ends pending calls and is idempotent", async () => {
    client = await server.connect();
    server.on("sleep", () => NO_RESPONSE);
    const call = watch(client.call("sleep"));
    await settled();
    await Promise.all([client.close(), client.close()]);
    assert.ok(call.error instanceof ConnectionClosed && call.error.clean);
    assert.equal(server.methods.at(-1), "session.close");
    await assert.rejects(client.call("echo"), ConnectionClosed);
  });

  test("close() waits for connections that the server closed before", async () => {
    client = await server.connect();
    const [first] = server.connections as [FakeConnection];
    first.endsOnClose = false;
    first.goAway();
    await server.clock.advance(1_000);
    assert.equal(server.connections.length, 2);
    const closed = watch(client.close());
    await server.clock.advance(1_000);
    assert.ok(server.last.isClosed && !first.isClosed && !closed.isDone);
    first.end();
    await settled();
    assert.ok(closed.isDone && closed.error === undefined);
  });

  test("failed open() waits for its connection to close", async () => {
    server.onConnection = (connection) => {
      connection.endsOnClose = false;
      connection.goAway();
    };
    client = server.client();
    const opened = watch(client.open());
    await settled();
    assert.ok(!opened.isDone, "open() waits for the connection");
    server.last.end();
    await settled();
    assert.ok(opened.error instanceof CannotConnect);
  });

  test("close() does not wait for an unresponsive server", async () => {
    client = await server.connect();
    server.on("session.close", () => NO_RESPONSE);
    const closed = watch(client.close());
    await server.clock.advance(1_999);
    assert.ok(!closed.isDone);
    await server.clock.advance(1);
    assert.ok(closed.isDone);
  });
});

describe("sessions", () => {
  test("session.open has no token but user and key", async () => {
    client = await server.connect();
    const [request] = server.requests;
    assert.equal(request?.token, NO_TOKEN);
    assert.deepEqual(request?.params, { scheme: "api_key", user: "ada", key: KEY, client: "test/1" });
  });

  test("tokens are hidden from inspection and JSON", async () => {
    server.on("session.open", () => opened(5, { refresh_token: tokenNumber(6), refresh_expires_at: WALL + 9e9 }));
    client = await server.connect();
    const shown = [
      inspect(client, { depth: 9 }),
      inspect(client.session, { depth: 9 }),
      JSON.stringify(client.session),
    ];
    for (const text of shown) {
      assert.doesNotMatch(text, /BQUFBQ|\\x05|0505|5, 5, 5|c3RhbmRz/);
    }
    assert.equal(client.session?.token, Buffer.alloc(32, 5).toString("base64url"));
  });

  test("refused session.open is not retried", async () => {
    server.on("session.open", () => new Failure(Code.UNAUTHENTICATED));
    client = server.client();
    await assert.rejects(client.open(), Unauthenticated);
    assert.deepEqual(server.methods, ["session.open"]);
  });

  test("unavailable session.open is retried after retry_after_ms", async () => {
    server.script("session.open", new Failure(Code.UNAVAILABLE, { retry_after_ms: 500 }), opened(1));
    client = server.client();
    const open = watch(client.open());
    await server.clock.advance(600);
    assert.ok(open.isDone && open.error === undefined);
  });

  test("invalid result of session.open is refused", async () => {
    for (const wrong of [{}, { token: "x" }, { token: tokenNumber(0) }, { expires_at: "soon" }, { bound: null }]) {
      server.on("session.open", () => ({ ...opened(1), ...wrong, ...(Object.keys(wrong).length ? {} : { id: 1 }) }));
      client = server.client();
      await assert.rejects(client.open(), /is invalid/);
    }
  });

  const refreshable = { refresh_token: tokenNumber(100), refresh_expires_at: WALL + 86_400_000 };

  test("session is refreshed once at 80 % of its lifetime with jitter, and calls wait", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    const responses: (() => void)[] = [];
    server.on("session.refresh", (request) => {
      responses.push(() => request.connection.respond(request, opened(2, { expires_at: WALL + 7_200_000 })));
      return NO_RESPONSE;
    });
    await server.clock.advance(3_600_000 * 0.82);
    assert.equal(responses.length, 0);
    await server.clock.advance(3_600_000 * 0.006);
    assert.equal(responses.length, 1);
    const { token, params } = server.requests.at(-1) ?? {};
    assert.equal(token, NO_TOKEN);
    assert.deepEqual(params, { refresh_token: tokenNumber(100), client: "test/1" });
    const calls = Array.from({ length: 10 }, () => client.call("echo"));
    await settled();
    assert.equal(server.methods.filter((method) => method === "session.refresh").length, 1);
    assert.ok(!server.methods.includes("echo"));
    responses[0]?.();
    await Promise.all(calls);
    assert.ok(server.requests.slice(-10).every((request) => request.token === tokenText(2)));
  });

  test("concurrent calls with an expired token share one refresh", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.on("session.refresh", () => opened(2));
    server.on("echo", ({ token }) => (token === tokenText(1) ? new Failure(Code.TOKEN_EXPIRED) : {}));
    await Promise.all(Array.from({ length: 20 }, () => client.call("echo")));
    assert.equal(server.methods.filter((method) => method === "session.refresh").length, 1);
  });

  test("expired refresh token causes a new session", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    server.script("session.refresh", new Failure(Code.TOKEN_EXPIRED));
    await client.call("echo");
    assert.deepEqual(server.methods.filter((method) => method.startsWith("session.")).slice(-2), [
      "session.refresh",
      "session.open",
    ]);
  });

  test("TOKEN_REVOKED for a refresh ends the session", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.script("echo", new Failure(Code.TOKEN_EXPIRED));
    server.script("session.refresh", new Failure(Code.TOKEN_REVOKED));
    await assert.rejects(client.call("echo"), TokenRevoked);
    await assert.rejects(client.call("echo"), TokenRevoked);
    assert.equal(server.methods.filter((method) => method === "session.open").length, 1);
  });

  test("lost refresh is retried with the same refresh token", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.script(
      "session.refresh",
      ({ connection }: { connection: FakeServer["last"] }) => {
        connection.end(new TlsError("truncated"));
        return NO_RESPONSE;
      },
      opened(2),
    );
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    const call = watch(client.call("echo"));
    await server.clock.advance(1_000);
    assert.deepEqual(call.value, {});
    const tokens = server.requests.filter(({ method }) => method === "session.refresh").map(({ params }) => params);
    assert.equal(tokens.length, 2);
    assert.deepEqual(tokens[0], tokens[1]);
  });

  test("used refresh token is not sent again after the grace, which its first use began", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.on("session.refresh", ({ connection }) => {
      server.clock.after(3_000, () => connection.end(new TlsError("truncated")));
      return NO_RESPONSE;
    });
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    const call = watch(client.call("echo"));
    for (let second = 0; second < 8; second++) {
      await server.clock.advance(1_000);
    }
    assert.deepEqual(call.value, {});
    const methods = ["session.open", "session.refresh", "session.refresh", "session.open"];
    assert.deepEqual(
      server.methods.filter((method) => method.startsWith("session.")),
      methods,
    );
  });

  test("used refresh token is not sent again after a long reconnect", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.script("session.refresh", ({ connection }: { connection: FakeServer["last"] }) => {
      connection.end(new TlsError("truncated"));
      server.connectErrors = Array.from({ length: 7 }, () => new CannotConnect("fake:7443: ECONNREFUSED"));
      return NO_RESPONSE;
    });
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    const call = watch(client.call("echo"));
    for (let second = 0; second < 20; second++) {
      await server.clock.advance(1_000);
    }
    assert.deepEqual(call.value, {});
    assert.equal(server.methods.filter((method) => method === "session.refresh").length, 1);
    assert.equal(server.methods.filter((method) => method === "session.open").length, 2);
  });

  test("session past its idle timeout is reopened before the next call", async () => {
    server.on("session.open", () => opened(1, { idle_timeout_ms: 60_000 }));
    client = await server.connect();
    await server.clock.advance(50_000);
    await client.call("echo");
    await server.clock.advance(59_000);
    await client.call("echo");
    assert.equal(server.methods.filter((method) => method === "session.open").length, 1);
    await server.clock.advance(60_000);
    await client.call("echo");
    assert.equal(server.methods.filter((method) => method === "session.open").length, 2);
  });

  test("session.expiring causes a refresh, session.revoked a session.info", async () => {
    server.on("session.open", () => opened(1, refreshable));
    client = await server.connect();
    server.on("session.refresh", () => opened(2));
    server.last.send(Kind.EVENT, 0, ["session.expiring", { expires_at: WALL }], { token: tokenText(1) });
    await settled();
    assert.equal(client.session?.id, "s-2");
    server.on("session.info", () => new Failure(Code.SESSION_REPLACED));
    server.last.send(Kind.EVENT, 0, ["session.revoked", { reason: "replaced" }], { token: tokenText(2) });
    await settled();
    await assert.rejects(client.call("echo"), SessionReplaced);
    assert.deepEqual((await client.events.next()).value?.name, "session.expiring");
    assert.deepEqual((await client.events.next()).value, { name: "session.revoked", data: { reason: "replaced" } });
  });

  test("client without credentials sends no token", async () => {
    client = await server.connect({ credentials: undefined, opensSession: false });
    await client.call("echo");
    assert.equal(server.requests.at(-1)?.token, NO_TOKEN);
    await assert.rejects(client.openSession(), Unauthenticated);
  });
});

describe("sessions that the server has lost", () => {
  const unknown = new Failure(Code.UNAUTHENTICATED, { reason: "unknown_token" });
  const refreshable = { refresh_token: tokenNumber(99) };
  let live: number;
  const openings = () => server.methods.filter((method) => method === "session.open").length;

  beforeEach(async () => {
    live = 0;
    const open = () => opened(++live, refreshable);
    server.on("session.open", open);
    server.on("session.refresh", () => new Failure(Code.UNAUTHENTICATED));
    const guarded = ({ token, params }: { token: string; params: object }) =>
      token === tokenText(live) ? params : unknown;
    server.on("echo", guarded as never);
    server.on("session.info", guarded as never);
    server.on("session.handle", guarded as never);
    server.welcome = STREAMING;
    client = await server.connect();
  });

  /** Let the store of the server lose all sessions. */
  const lose = () => {
    live = 77;
  };

  test("concurrent calls share one reopening, after a delay", async () => {
    lose();
    const calls = Array.from({ length: 20 }, () => watch(client.call("echo")));
    await server.clock.advance(49);
    assert.equal(openings(), 1);
    await server.clock.advance(1);
    assert.ok(calls.every(({ isDone, error }) => isDone && error === undefined));
    assert.equal(openings(), 2);
    assert.equal(client.session?.id, "s-78");
    assert.ok(!server.methods.includes("session.refresh"));
  });

  test("delays grow until a session has lasted 5 s", async () => {
    const delays: number[] = [];
    for (const pause of [0, 0, 0, 5_000, 0]) {
      await server.clock.advance(pause);
      const lostAt = server.clock.ms;
      lose();
      const call = watch(client.call("echo", {}, { timeoutMs: 60_000 }));
      while (!call.isDone) {
        await server.clock.advance(10);
      }
      delays.push(server.clock.ms - lostAt);
    }
    assert.deepEqual(delays, [50, 100, 200, 50, 100]);
  });

  test("session is reopened on a new connection without a call, and its handlers are registered", async () => {
    await client.handle("approve", () => true);
    lose();
    server.last.end();
    await server.clock.advance(200);
    assert.equal(openings(), 2);
    assert.equal(server.requests.at(-1)?.method, "session.handle");
    assert.equal(server.requests.at(-1)?.token, tokenText(78));
  });

  test("refresh token that is unknown, too, makes way for session.open when the token has expired", async () => {
    lose();
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    const call = watch(client.call("echo"));
    await server.clock.advance(50);
    assert.deepEqual(call.value, {});
    assert.deepEqual(server.methods.slice(-4), ["echo", "session.refresh", "session.open", "echo"]);
  });

  test("call whose timeout is shorter than the delay says why", async () => {
    lose();
    const call = watch(client.call("echo", {}, { timeoutMs: 20 }));
    await server.clock.advance(20);
    assert.ok(call.error instanceof DeadlineExceeded);
    assert.match(call.error.message, /the server has lost the session/);
  });
});

describe("hostile servers", () => {
  const expired = [
    { expires_at: WALL - 86_400_000 },
    { expires_at: WALL - 86_400_000, refresh_token: tokenNumber(99) },
  ];
  for (const more of expired) {
    test(`sessions with ${Object.keys(more)} that have expired already are renewed with backoff`, async () => {
      const times: number[] = [];
      const open = () => {
        times.push(server.clock.ms);
        return opened(times.length, more);
      };
      server.on("session.open", open);
      server.on("session.refresh", open);
      client = server.client({ timeoutMs: 60_000 });
      const opening = watch(client.open());
      await server.clock.advance(60_000);
      assert.ok(opening.error instanceof DeadlineExceeded && /expired sessions/.test(opening.error.message));
      assert.ok(times.length >= 3 && times.length <= 12, `${times.length} requests`);
      assert.ok(times.slice(1).every((time, n) => time - (times[n] as number) >= 1_000));
    });
  }

  test("flood of session.expiring is answered once a second, session.revoked is checked once", async () => {
    let count = 1;
    server.on("session.open", () => opened(1, { refresh_token: tokenNumber(99) }));
    server.on("session.refresh", () => opened(++count, { refresh_token: tokenNumber(99) }));
    client = await server.connect();
    for (let n = 0; n < 100; n++) {
      server.last.send(Kind.EVENT, 0, ["session.expiring", {}], { token: tokenText(count) });
      await settled();
    }
    assert.equal(count, 2);
    await server.clock.advance(1_000);
    assert.equal(count, 3);
    for (let n = 0; n < 100; n++) {
      server.last.send(Kind.EVENT, 0, ["session.revoked", {}], { token: tokenText(count) });
      await settled();
    }
    assert.equal(server.methods.filter((method) => method === "session.info").length, 1);
  });

  test("PING flood of a server that reads nothing is answered once", async () => {
    client = await server.connect();
    const sent = server.last.frames.length;
    server.last.driver.pauseWriting();
    for (let n = 0; n < 1_000; n++) {
      server.last.send(Kind.PING, 0);
    }
    await settled();
    assert.equal(server.last.frames.length, sent);
    server.last.driver.resumeWriting();
    await settled();
    assert.equal(server.last.frames.length, sent + 1);
  });

  test("reading pauses during a flood", async () => {
    client = await server.connect();
    const body = new Uint8Array(1_000_000);
    for (let n = 0; n < 20; n++) {
      server.last.send(Kind.EVENT, 0, ["a", body]);
    }
    assert.ok(!server.last.isReading);
    await server.clock.advance(4_000);
    assert.ok(server.last.isReading);
  });

  test("message of an error is escaped and truncated", async () => {
    client = await server.connect();
    server.on("echo", (request) => {
      server.last.fail(request, Code.INVALID_ARGUMENT, {}, `a\u001b[31m\nb\u202e${"c".repeat(10_000)}`);
      return NO_RESPONSE;
    });
    await assert.rejects(client.call("echo"), ({ message }: Error) => {
      assert.ok(message.startsWith("a\\x1b[31m\\nb\\u202eccc"), message.slice(0, 40));
      return message.length < 1_050;
    });
  });

  test("error with a bigint in its details has a JSON form", async () => {
    client = await server.connect();
    server.script(
      "echo",
      new Failure(Code.INVALID_ARGUMENT, { big: 2n ** 63n, list: [1n, { deep: -(2n ** 62n) }], n: null }),
    );
    await assert.rejects(client.call("echo"), (error) => {
      assert.deepEqual(JSON.parse(JSON.stringify(error)), {
        name: "InvalidArgument",
        code: 3,
        codeName: "INVALID_ARGUMENT",
        message: "because",
        details: { big: "9223372036854775808", list: [1, { deep: "-4611686018427387904" }], n: null },
      });
      return true;
    });
  });
});

describe("bound sessions", () => {
  const signer = { sign: (message: Uint8Array) => new Uint8Array(64).fill(message.length) };

  beforeEach(async () => {
    server.on("session.open", () => opened(1, { bound: true }));
    server.on("session.attach", () => ({}));
    client = await server.connect({ credentials: new DeviceKey(signer, "laptop") });
  });

  test("session.open is signed over salt, leaf and name", () => {
    const { scheme, device, signature } = server.requests[0]?.params ?? {};
    assert.deepEqual([scheme, device], ["ed25519", "laptop"]);
    assert.deepEqual(signature, new Uint8Array(64).fill(11 + 8 + 32 + 6));
  });

  test("session is attached on reconnect", async () => {
    server.last.end();
    await server.clock.advance(1_000);
    assert.equal(server.methods.at(-1), "session.attach");
    assert.deepEqual(server.requests.at(-1)?.params, { signature: new Uint8Array(64).fill(13 + 8 + 32 + 32) });
    assert.equal(server.requests.at(-1)?.token, tokenText(1));
    await client.call("echo");
  });

  test("concurrent refused calls share one session.attach and are retried once", async () => {
    const refused = new Failure(Code.UNAUTHENTICATED, { attach: true });
    let isAttached = false;
    server.on("session.attach", () => {
      isAttached = true;
      return {};
    });
    server.on("echo", () => (isAttached ? {} : refused));
    await Promise.all(Array.from({ length: 10 }, () => client.call("echo")));
    assert.equal(server.methods.filter((method) => method === "session.attach").length, 1);
    server.on("echo", () => refused);
    await assert.rejects(client.call("echo"), Unauthenticated);
  });

  test("refused session.attach is reported", async () => {
    server.on("session.attach", () => new Failure(Code.FAILED_PRECONDITION));
    server.on("echo", () => new Failure(Code.UNAUTHENTICATED, { attach: true }));
    await assert.rejects(client.call("echo"), FailedPrecondition);
  });
});

describe("events", () => {
  test("large events are limited by bytes", async () => {
    client = await server.connect();
    for (let n = 0; n < 10; n++) {
      server.last.send(Kind.EVENT, 0, ["n", [n, new Uint8Array(MAX_EVENT_BYTES / 8)]]);
    }
    await settled();
    assert.equal(client.events.dropped, 3);
    server.last.send(Kind.EVENT, 0, ["small", null]);
    await settled();
    assert.equal(client.events.dropped, 3);
    const { value } = await client.events.next();
    assert.ok(Array.isArray(value?.data) && value.data[0] === 3);
  });

  test("onEvent gets all events, including unknown ones", async () => {
    const names: string[] = [];
    client = await server.connect({ onEvent: ({ name }) => names.push(name) });
    server.last.send(Kind.EVENT, 0, ["weather.changed", [1]]);
    server.last.send(Kind.EVENT, 0, ["pins.next", { pins: [], from: 1 }]);
    await settled();
    assert.deepEqual(names, ["weather.changed", "pins.next"]);
  });

  test("event read together with the answer to session.close is dropped", async () => {
    const names: string[] = [];
    client = await server.connect({ onEvent: ({ name }) => names.push(name) });
    server.on("session.close", (request) => {
      server.last.together(() => {
        server.last.respond(request, {});
        server.last.send(Kind.EVENT, 0, ["pins.next", { pins: [], from: 1 }]);
      });
      return NO_RESPONSE;
    });
    await client.close();
    await settled();
    assert.deepEqual(names, []);
  });

  test("event stream keeps 1,000 events and ends with the client", async () => {
    client = await server.connect();
    for (let n = 0; n < 1_005; n++) {
      server.last.send(Kind.EVENT, 0, ["n", n]);
    }
    await settled();
    assert.equal(client.events.dropped, 5);
    assert.deepEqual((await client.events.next()).value?.data, 5);
    await client.close();
    let count = 0;
    for await (const _event of client.events) {
      count += 1;
    }
    assert.equal(count, 999);
  });
});

test("error has the name of its code", async () => {
  client = await server.connect();
  server.script("echo", new Failure(Code.CANCELLED));
  await assert.rejects(client.call("echo"), (error) => {
    assert.ok(error instanceof Cancelled);
    assert.deepEqual([error.name, error.code, error.codeName], ["Cancelled", 1, "CANCELLED"]);
    return true;
  });
  assert.ok(new InternalError() instanceof Error);
});
