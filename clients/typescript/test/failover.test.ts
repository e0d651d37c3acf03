/** A client of several servers: which one it uses, and what becomes of its calls when that is lost or goes away. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import type { Endpoint } from "../src/client/address.js";
import type { Client } from "../src/client/client.js";
import { ATTEMPT_DELAY_MS, HANDSHAKE_DELAY_MS } from "../src/client/endpoints.js";
import { IDLE_AFTER_MS } from "../src/client/extra_connections.js";
import { DeviceKey } from "../src/client/session.js";
import type { ClientSettings } from "../src/client/types.js";
import { CannotConnect, Code, ConnectionClosed, TlsError } from "../src/errors.js";
import { decodeBody } from "../src/wire/body.js";
import { Kind, NO_TOKEN, type Token } from "../src/wire/frame.js";
import {
  Failure,
  type FakeConnection,
  FakeServer,
  type FakeSettings,
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

const A = "192.0.2.1";
const B = "192.0.2.2";
const refused = () => new CannotConnect("refused", { refused: true });

let server: FakeServer;
let client: Client;
/** What the next attempts at an IP address get. */
let faults: Map<string, Error[]>;
/** How long an IP address takes to WELCOME, and whether it has a TCP connection meanwhile. */
let delays: Map<string, { readonly ms: number; readonly listens: boolean }>;
let dialled: string[];

beforeEach(() => {
  server = new FakeServer();
  faults = new Map();
  delays = new Map();
  dialled = [];
});

afterEach(() => server.closed(client));

/** Return the settings of a client that prefers A to B. */
function fleet(more: FakeSettings = {}): FakeSettings {
  return {
    addresses: [
      { host: A, port: 7443 },
      { host: B, port: 7443 },
    ],
    isRandom: false,
    dial: async (listener, endpoint, onReached, signal) => {
      dialled.push(endpoint.ip);
      const delay = delays.get(endpoint.ip);
      if (delay?.listens !== false) {
        onReached();
      }
      if (delay !== undefined) {
        await new Promise<void>((resolve, reject) => {
          const timer = server.clock.after(delay.ms, resolve);
          signal.addEventListener("abort", () => {
            timer.cancel();
            reject(signal.reason as Error);
          });
        });
      }
      const fault = faults.get(endpoint.ip)?.shift();
      if (fault !== undefined) {
        throw fault;
      }
      return await server.dial(listener, endpoint);
    },
    ...more,
  };
}

/** Return the IP addresses that requests of a method came to. */
function where(method = "echo"): string[] {
  const requests = server.requests.filter((request) => request.method === method);
  return requests.map(({ connection }) => connection.driver.endpoint.ip);
}

describe("connecting", () => {
  test("client uses the first address and tries no other", async () => {
    client = await server.connect(fleet());
    await server.clock.advance(1_000_000);
    assert.deepEqual(dialled, [A]);
    assert.deepEqual(client.addresses, [`${A}:7443`, `${B}:7443`]);
    assert.deepEqual(client.endpoint, { host: A, port: 7443, ip: A });
  });

  test("refused address is skipped at once", async () => {
    faults.set(A, [refused()]);
    client = await server.connect(fleet());
    assert.deepEqual(dialled, [A, B]);
  });

  test("address that does not answer is overtaken, a frozen server later", async () => {
    for (const [listens, ms] of [
      [false, ATTEMPT_DELAY_MS],
      [true, HANDSHAKE_DELAY_MS],
    ] as const) {
      delays.set(A, { ms: 10_000, listens });
      client = server.client(fleet());
      const opening = watch(client.open());
      await server.clock.advance(ms - 1);
      assert.ok(!opening.isDone);
      await server.clock.advance(1);
      assert.ok(opening.isDone && opening.error === undefined);
      assert.equal(client.endpoint?.ip, B);
      await server.closed(client);
    }
  });

  test("name that is resolved late does not hold up the others", async () => {
    const resolve = async ({ host }: { host: string }) => {
      if (host === "slow.example") {
        await new Promise<void>((done) => server.clock.after(5_000, done));
      }
      return [host === "slow.example" ? A : B];
    };
    const addresses = ["slow.example", "fast.example"].map((host) => ({ host, port: 7443 }));
    client = server.client(fleet({ addresses: addresses as unknown as ClientSettings["addresses"], resolve }));
    const opening = watch(client.open());
    await server.clock.advance(100);
    assert.ok(opening.isDone && opening.error === undefined);
    assert.deepEqual(client.endpoint, { host: "fast.example", port: 7443, ip: B });
    await server.clock.advance(5_000);
  });

  test("onConnected gets the endpoint", async () => {
    const seen: Endpoint[] = [];
    client = await server.connect(fleet({ onConnected: (_, endpoint) => seen.push(endpoint) }));
    server.last.end(new TlsError("truncated"));
    await settled();
    assert.deepEqual(
      seen.map(({ ip }) => ip),
      [A, B],
    );
  });
});

describe("loss and GOAWAY", () => {
  test("lost connection is replaced by one to another server at once, and kept", async () => {
    client = await server.connect(fleet());
    server.last.end(new TlsError("truncated"));
    assert.deepEqual(await client.call("echo", { x: 1 }), { x: 1 });
    assert.deepEqual(where(), [B]);
    assert.deepEqual(where("session.open"), [A]);
    await server.clock.advance(1_000_000);
    assert.deepEqual(dialled, [A, B]);
  });

  test("idle close reconnects to the same server", async () => {
    client = await server.connect(fleet());
    server.last.end(new TlsError("truncated"));
    await settled();
    server.last.goAway("idle");
    server.last.end();
    await server.clock.advance(1_000);
    await client.call("echo");
    assert.deepEqual(dialled, [A, B, B]);
  });

  test("server that goes away rests as long as it asks, while its answers are awaited", async () => {
    client = await server.connect(fleet());
    const held: Request[] = [];
    server.on("hold", (request) => {
      held.push(request);
      return NO_RESPONSE;
    });
    const call = watch(client.call("hold"));
    await settled();
    server.last.goAway("draining", 20_000);
    await client.call("echo");
    assert.deepEqual(where(), [B]);
    held[0]?.connection.respond(held[0], "done");
    await settled();
    assert.equal(call.value, "done");
    faults.set(B, Array.from({ length: 1_000 }, refused));
    server.last.end(new TlsError("truncated"));
    await server.clock.advance(15_000);
    assert.equal(dialled.filter((ip) => ip === A).length, 1);
    await server.clock.advance(6_000);
    assert.equal(client.endpoint?.ip, A);
  });

  test("call that a draining server refused is sent to another at once", async () => {
    client = await server.connect(fleet());
    server.script("echo", ({ connection }: Request) => {
      connection.goAway("draining", 60_000);
      return new Failure(Code.UNAVAILABLE, { retry_after_ms: 60_000 });
    });
    const call = watch(client.call("echo"));
    await settled();
    server.on("echo", () => "done");
    await server.clock.advance(100);
    assert.equal(call.value, "done");
  });

  test("wrong certificates are reported if all servers have one", async () => {
    client = await server.connect(fleet());
    const wrong = () => [new TlsError("pin_mismatch"), new TlsError("pin_mismatch")];
    faults.set(A, wrong()).set(B, wrong());
    server.last.end(new TlsError("truncated"));
    const call = watch(client.call("echo"));
    await server.clock.advance(1_000);
    assert.ok(call.error instanceof TlsError);
  });
});

describe("calls", () => {
  const cut = ({ connection }: Request) => {
    connection.end(new TlsError("truncated"));
    return NO_RESPONSE;
  };

  test("call that may have run is sent to another server only with a key", async () => {
    client = await server.connect(fleet());
    server.script("echo", cut, "done");
    await assert.rejects(client.call("echo"), ConnectionClosed);
    assert.deepEqual(where(), [A]);
    await server.clock.advance(100);
    server.script("echo", cut, "done");
    const call = watch(client.call("echo", {}, { idempotencyKey: "k-1" }));
    await server.clock.advance(200);
    assert.equal(call.value, "done");
    assert.deepEqual(where(), [A, B, A]);
  });
});

describe("server that hangs", () => {
  /** Return the PINGs that a connection has got since the last call. */
  const pings = (connection: FakeConnection | undefined) => connection?.take(Kind.PING).length;
  let frozen: FakeConnection;

  async function connectAndFreeze(more: FakeSettings = {}): Promise<void> {
    client = await server.connect(fleet(more));
    frozen = server.last;
    frozen.isFrozen = true;
  }

  test("its idempotent calls are answered by another address within 8 s, others fail as lost", async () => {
    server.welcome = STREAMING;
    await connectAndFreeze();
    const repeated = watch(client.call("echo", { n: 1 }, { idempotencyKey: "k" }));
    const once = watch(client.call("echo"));
    const stream = watch(client.stream("tokens").next());
    await server.clock.advance(4_999);
    assert.equal(pings(frozen), 0);
    await server.clock.advance(1);
    assert.equal(pings(frozen), 1);
    await server.clock.advance(1_999);
    assert.deepEqual(dialled, [A]);
    await server.clock.advance(101);
    assert.deepEqual(dialled, [A, B]);
    assert.deepEqual(repeated.value, { n: 1 });
    assert.ok(once.error instanceof ConnectionClosed && !once.error.clean);
    assert.ok(stream.error instanceof ConnectionClosed);
    assert.ok(frozen.isAborted);
    assert.equal(client.endpoint?.ip, B);
    assert.deepEqual(where("session.info")[0], B);
    await client.call("echo");
  });

  test("a byte in time keeps its connection", async () => {
    await connectAndFreeze();
    const call = watch(client.call("echo"));
    await server.clock.advance(6_999);
    frozen.send(Kind.EVENT, 0, ["news", 1]);
    await server.clock.advance(4_999);
    assert.equal(pings(frozen), 1);
    await server.clock.advance(1);
    assert.equal(pings(frozen), 1);
    assert.deepEqual(dialled, [A]);
    frozen.isFrozen = false;
    const [request] = frozen.frames.filter(({ kind }) => kind === Kind.REQUEST).slice(-1);
    frozen.send(Kind.RESPONSE, request?.stream ?? 0, {}, { token: tokenText(1) });
    await settled();
    assert.ok(call.isDone);
  });

  test("a byte during the attempt drops the new connection", async () => {
    await connectAndFreeze();
    for (const when of ["dialling", "showing the session"]) {
      delays.set(B, { ms: when === "dialling" ? 1_000 : 0, listens: true });
      server.on("session.info", () => NO_RESPONSE);
      const call = watch(client.call("echo"));
      const { length } = dialled;
      await server.clock.advance(7_500);
      assert.equal(dialled.length, length + 1, when);
      frozen.send(Kind.PONG, 0);
      await settled();
      const [request] = frozen.take(Kind.REQUEST).slice(-1);
      frozen.send(Kind.RESPONSE, request?.stream ?? 0, {}, { token: tokenText(1) });
      await server.clock.advance(1_000);
      assert.ok(call.isDone && call.error === undefined);
      assert.equal(client.endpoint?.ip, A);
      assert.deepEqual(
        server.connections.map(({ isClosed }) => isClosed),
        server.connections.map((connection) => connection !== frozen),
      );
    }
  });

  test("call that times out sends the PING at once, unless a byte has just arrived", async () => {
    await connectAndFreeze();
    await server.clock.advance(10_000);
    const first = watch(client.call("echo", {}, { timeoutMs: 1_500 }));
    await server.clock.advance(999);
    frozen.send(Kind.EVENT, 0, ["news", 1]);
    await server.clock.advance(501);
    assert.ok(first.isDone);
    assert.equal(pings(frozen), 0);
    const second = watch(client.call("echo", {}, { timeoutMs: 500 }));
    await server.clock.advance(500);
    assert.ok(second.isDone);
    assert.equal(pings(frozen), 1);
    const third = watch(client.call("echo", {}, { timeoutMs: 1_000 }));
    await server.clock.advance(1_000);
    assert.ok(third.isDone);
    assert.equal(pings(frozen), 0);
    await server.clock.advance(1_000);
    assert.equal(client.endpoint?.ip, B);
  });

  test("quiet stream is probed and stays, an idle connection is not probed", async () => {
    server.welcome = STREAMING;
    client = await server.connect(fleet());
    await server.clock.advance(600_000);
    assert.equal(pings(server.last), 0);
    const stream = client.stream("tokens");
    const next = watch(stream.next());
    await server.clock.advance(60_000);
    assert.ok((pings(server.last) ?? 0) >= 10);
    assert.ok(!next.isDone);
    assert.deepEqual(dialled, [A]);
    stream.close();
    const [open] = server.streams;
    assert.ok(open);
    server.last.fail(open, Code.CANCELLED);
    await server.clock.advance(10_000);
    pings(server.last);
    await server.clock.advance(600_000);
    assert.equal(pings(server.last), 0);
  });

  test("client with one address stays and sends no PING", async () => {
    await connectAndFreeze({ addresses: [{ host: A, port: 7443 }] });
    const call = watch(client.call("echo", {}, { timeoutMs: 20_000, idempotencyKey: "k" }));
    await server.clock.advance(30_000);
    assert.equal(pings(frozen), 0);
    assert.deepEqual([call.isDone, dialled.length, frozen.isClosed], [true, 1, false]);
  });

  test("another IP address of one name is another address", async () => {
    await connectAndFreeze({
      addresses: [{ host: "both.example", port: 7443 }],
      resolve: () => Promise.resolve([A, B]),
    });
    const call = watch(client.call("echo", {}, { idempotencyKey: "k" }));
    await server.clock.advance(7_200);
    assert.deepEqual(call.value, {});
    assert.deepEqual(dialled, [A, B]);
  });

  test("failed attempt is repeated with backoff, one at a time, and the loss rests the old address", async () => {
    faults.set(B, [refused(), refused(), refused()]);
    await connectAndFreeze();
    const call = watch(client.call("echo", {}, { idempotencyKey: "k" }));
    await server.clock.advance(7_000);
    assert.deepEqual(dialled, [A, B]);
    await server.clock.advance(50 + 100 + 200 + 50);
    assert.deepEqual(dialled, [A, B, B, B, B]);
    assert.deepEqual(call.value, {});
    server.last.end();
    await server.clock.advance(49);
    assert.deepEqual(dialled.at(-1), A); // 50 ms after its loss
  });

  test("server that refuses the session is not moved to", async () => {
    await connectAndFreeze();
    server.on("session.info", () => new Failure(Code.UNAUTHENTICATED, { reason: "unknown_token" }));
    const call = watch(client.call("echo", {}, { timeoutMs: 9_000 }));
    await server.clock.advance(8_000);
    assert.ok(dialled.length > 1);
    assert.equal(client.endpoint?.ip, A);
    assert.ok(!call.isDone && server.last.isClosed);
    assert.equal(server.methods.filter((method) => method === "session.open").length, 1);
    server.on("session.info", () => new Failure(Code.TOKEN_EXPIRED)); // the server knows it
    await server.clock.advance(2_000);
    assert.equal(client.endpoint?.ip, B);
  });

  test("session that is being opened needs no answer to be moved to", async () => {
    client = server.client(fleet());
    server.onConnection = (connection) => {
      connection.isFrozen = connection.driver.endpoint.ip === A;
    };
    const opening = watch(client.open());
    await server.clock.advance(7_100);
    assert.ok(opening.isDone && opening.error === undefined);
    assert.equal(client.endpoint?.ip, B);
  });

  test("handlers are registered at the new server, and those that run are aborted", async () => {
    server.welcome = STREAMING;
    await connectAndFreeze();
    frozen.isFrozen = false;
    let reason: unknown;
    await client.handle("wait", (_params, { signal }) => {
      signal.addEventListener("abort", () => {
        reason = signal.reason;
      });
      return new Promise(() => undefined);
    });
    frozen.send(Kind.CALL, 1, ["wait", {}, { deadline_ms: 60_000 }], { token: tokenText(1) });
    await settled();
    frozen.isFrozen = true;
    const call = watch(client.call("echo", {}, { idempotencyKey: "k" }));
    await server.clock.advance(7_200);
    assert.deepEqual(call.value, {});
    assert.ok(reason instanceof ConnectionClosed);
    assert.deepEqual(where("session.handle"), [A, B]);
  });

  test("its extra connections are left as well, even if only they have calls", async () => {
    const held: Request[] = [];
    server.welcome = { ...WELCOME, max_streams: 2 };
    server.on("hold", (request) => {
      held.push(request);
      return NO_RESPONSE;
    });
    client = await server.connect(fleet({ maxConnections: 2 }));
    const calls = Array.from({ length: 3 }, () => watch(client.call("hold", {}, { timeoutMs: 60_000 })));
    await settled();
    for (const request of held.splice(0, 2)) {
      request.connection.respond(request, {});
    }
    const [main, extra] = server.connections as [FakeConnection, FakeConnection];
    for (const connection of [main, extra]) {
      connection.isFrozen = true;
    }
    await server.clock.advance(8_999); // 5 + 2 s there, then 2 s on the main connection, which is asked
    assert.deepEqual(dialled, [A, A]);
    await server.clock.advance(100);
    assert.deepEqual([main.isAborted, extra.isAborted], [true, true]);
    assert.ok(calls[2]?.error instanceof ConnectionClosed);
    assert.equal(client.endpoint?.ip, B);
  });

  test("connection that drains and hangs is given up once there is another", async () => {
    await connectAndFreeze();
    const call = watch(client.call("echo", {}, { idempotencyKey: "k" }));
    await settled();
    frozen.goAway();
    await server.clock.advance(6_900);
    assert.equal(client.endpoint?.ip, B);
    assert.ok(!call.isDone);
    await server.clock.advance(300);
    assert.deepEqual(call.value, {});
    assert.ok(frozen.isAborted);
  });

  test("close() during the attempt leaves nothing behind", async () => {
    delays.set(B, { ms: 5_000, listens: true });
    await connectAndFreeze();
    const call = watch(client.call("echo"));
    await server.clock.advance(8_000);
    assert.deepEqual(dialled, [A, B]);
    await server.closed(client);
    assert.ok(call.error instanceof ConnectionClosed);
  });
});

describe("extra connections", () => {
  const held: Request[] = [];
  const respondAll = () => {
    for (const request of held.splice(0)) {
      request.connection.respond(request, request.params);
    }
  };

  beforeEach(() => {
    held.length = 0;
    server.welcome = { ...WELCOME, max_streams: 2 };
    server.on("hold", (request) => {
      held.push(request);
      return NO_RESPONSE;
    });
  });

  test("one is made when max_streams are in flight, to the same server, up to the limit", async () => {
    client = await server.connect(fleet({ maxConnections: 3 }));
    const calls = Array.from({ length: 9 }, (_, n) => client.call("hold", { n }));
    await server.clock.advance(1);
    assert.deepEqual(dialled, [A, A, A]);
    assert.equal(held.length, 6);
    respondAll();
    await settled();
    respondAll();
    await settled();
    assert.deepEqual(
      await Promise.all(calls),
      Array.from({ length: 9 }, (_, n) => ({ n })),
    );
    const [, extra] = server.connections;
    assert.equal(extra?.frames.find(({ kind }) => kind === Kind.REQUEST)?.token, tokenText(1));
  });

  test("one takes calls once the sessions were shown there, and another waits as its GOAWAY asks", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    const shown: Request[] = [];
    server.on("session.info", (request) => {
      shown.push(request);
      return NO_RESPONSE;
    });
    const calls = Array.from({ length: 3 }, () => client.call("hold"));
    await settled();
    assert.deepEqual([held.length, shown.length], [2, 1]);
    shown[0]?.connection.respond(shown[0], {});
    await settled();
    assert.equal(held.length, 3);
    server.last.goAway("draining", 3_000);
    calls.push(client.call("hold"));
    await server.clock.advance(2_900);
    calls.push(client.call("hold"));
    await settled();
    assert.equal(dialled.length, 2);
    await server.clock.advance(200);
    server.on("session.info", () => ({}));
    calls.push(client.call("hold"));
    await settled();
    assert.equal(dialled.length, 3);
    while (held.length > 0) {
      respondAll();
      await settled();
    }
    await Promise.all(calls);
  });

  test("one that hangs is lost alone if the main connection answers", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    const calls = Array.from({ length: 3 }, () => watch(client.call("hold", {}, { timeoutMs: 60_000 })));
    await settled();
    server.last.isFrozen = true;
    await server.clock.advance(9_100); // 5 + 2 s there; the main connection is asked at once
    assert.ok(server.last.isAborted);
    assert.deepEqual(
      calls.map(({ error }) => error instanceof ConnectionClosed),
      [false, false, true],
    );
    assert.equal(client.endpoint?.ip, A);
    respondAll();
    await settled();
  });

  test("calls wait without one by default", async () => {
    client = await server.connect(fleet());
    const calls = Array.from({ length: 3 }, () => watch(client.call("hold")));
    await server.clock.advance(1_000);
    assert.deepEqual([held.length, dialled.length], [2, 1]);
    respondAll();
    await settled();
    respondAll();
    await settled();
    assert.ok(calls.every(({ isDone }) => isDone));
  });

  test("it is closed when it was idle", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    const calls = Array.from({ length: 3 }, () => client.call("hold", {}, { timeoutMs: Number.POSITIVE_INFINITY }));
    await settled();
    await server.clock.advance(3 * IDLE_AFTER_MS);
    assert.ok(!server.last.isClosed);
    respondAll();
    await Promise.all(calls);
    await server.clock.advance(2 * IDLE_AFTER_MS);
    assert.deepEqual(
      server.connections.map(({ isClosed }) => isClosed),
      [false, true],
    );
  });

  test("failed attempt fails no call, and is repeated later", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    faults.set(A, [refused()]);
    const calls = Array.from({ length: 3 }, () => client.call("hold"));
    await settled();
    assert.equal(dialled.length, 2);
    await server.clock.advance(100);
    const another = client.call("hold");
    await settled();
    assert.equal(dialled.length, 3);
    respondAll();
    await settled();
    respondAll();
    await Promise.all([...calls, another]);
  });

  test("loss of the main connection wakes the calls that wait", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    const calls = Array.from({ length: 4 }, () => watch(client.call("hold")));
    await settled();
    const waiting = client.call("echo", { x: 1 });
    await settled();
    server.connections[0]?.end(new TlsError("truncated"));
    assert.deepEqual(await waiting, { x: 1 });
    assert.equal(client.endpoint?.ip, B);
    assert.equal(calls.filter(({ error }) => error instanceof ConnectionClosed).length, 2);
    respondAll();
    await settled();
  });

  test("events of a session come once", async () => {
    const names: string[] = [];
    client = await server.connect(fleet({ maxConnections: 2, onEvent: ({ name }) => names.push(name) }));
    const calls = Array.from({ length: 3 }, () => client.call("hold"));
    await settled();
    for (const connection of server.connections) {
      connection.send(Kind.EVENT, 0, ["session.expiring", { expires_at: 1 }], { token: tokenText(1) });
      connection.send(Kind.EVENT, 0, ["pins.next", { pins: [], from: 1 }]);
      connection.send(Kind.EVENT, 0, ["news", 1], { token: tokenText(1) });
    }
    await settled();
    assert.deepEqual(names.sort(), ["news", "news", "pins.next", "session.expiring"]);
    respondAll();
    await Promise.all(calls);
  });

  describe("of a session that is refreshed, or that has handlers", () => {
    const refreshable = { refresh_token: tokenNumber(99) };
    /** Return the methods and tokens of a connection's requests so far, and forget them. */
    const requested = (number: number) => {
      const connection = server.connections[number];
      const found = server.requests.filter((request) => request.connection === connection);
      server.requests.splice(0, server.requests.length, ...server.requests.filter((each) => !found.includes(each)));
      return found.map(({ method, token }) => [method, token]);
    };
    const refreshed = ["session.info", tokenText(2)];

    beforeEach(() => {
      server.welcome = { ...STREAMING, max_streams: 2 };
      server.on("session.open", () => opened(1, refreshable));
      server.on("session.refresh", () => opened(2, refreshable));
    });

    /** Connect, with an extra connection on which a call is in flight. */
    async function connectTwice(more: FakeSettings = {}): Promise<Promise<unknown>[]> {
      client = await server.connect(fleet({ maxConnections: 2, ...more }));
      await client.handle("approve", ({ where }) => where);
      const calls = Array.from({ length: 3 }, () => client.call("hold"));
      await settled();
      assert.equal(server.connections.length, 2);
      requested(0);
      requested(1);
      return calls;
    }

    /** Refresh the session on the main connection, whose calls are answered so that it has room. */
    async function refresh(): Promise<void> {
      for (const request of held.splice(0, 2)) {
        request.connection.respond(request, {});
      }
      server.connections[0]?.send(Kind.EVENT, 0, ["session.expiring", {}], { token: tokenText(1) });
      await settled();
      assert.deepEqual(requested(0), [["session.refresh", NO_TOKEN]]);
    }

    test("new token is shown on each other connection at once", async () => {
      const calls = await connectTwice();
      await refresh();
      assert.deepEqual(requested(1), [refreshed]);
      respondAll();
      await Promise.all(calls);
    });

    test("new token is shown while the server drains, and while max_streams are in flight", async () => {
      const calls = [...(await connectTwice()), client.call("hold")];
      await settled();
      const [, full] = server.connections;
      assert.equal(held.filter(({ connection }) => connection === full).length, 2);
      requested(1);
      await refresh();
      assert.deepEqual(requested(1), [refreshed]);
      full?.goAway();
      server.on("session.refresh", () => opened(3, refreshable));
      await server.clock.advance(1_000);
      server.connections[0]?.send(Kind.EVENT, 0, ["session.expiring", {}], { token: tokenText(2) });
      await settled();
      assert.deepEqual(requested(1), [["session.info", tokenText(3)]]);
      respondAll();
      await Promise.all(calls);
    });

    test("session is refreshed where there is room", async () => {
      const calls = await connectTwice();
      server.connections[0]?.send(Kind.EVENT, 0, ["session.expiring", {}], { token: tokenText(1) });
      await settled();
      assert.deepEqual(requested(1), [["session.refresh", NO_TOKEN]]);
      assert.deepEqual(requested(0), [refreshed]);
      respondAll();
      await Promise.all(calls);
    });

    test("failed request for that fails nothing", async () => {
      const calls = await connectTwice();
      server.on("session.info", () => new Failure(Code.TOKEN_REVOKED));
      await refresh();
      assert.deepEqual(await client.call("echo", { a: 1 }), { a: 1 });
      respondAll();
      await Promise.all(calls);
    });

    test("handlers are registered on an extra connection before its first request, and after a refresh still", async () => {
      const answered = async (connection: FakeConnection | undefined, token: Token) => {
        connection?.send(Kind.CALL, 1, ["approve", { where: "here" }, { deadline_ms: 1_000 }], { token });
        await settled();
        return connection?.take(Kind.RESULT).map(({ body }) => decodeBody(body));
      };
      client = await server.connect(fleet({ maxConnections: 2 }));
      await client.handle("approve", ({ where }) => where);
      const registering: Request[] = [];
      server.on("session.handle", (request) => {
        registering.push(request);
        return NO_RESPONSE;
      });
      const calls = Array.from({ length: 3 }, () => client.call("hold"));
      await settled();
      const [, extra] = server.connections;
      assert.deepEqual(
        extra?.frames.filter(({ kind }) => kind === Kind.REQUEST).map(({ body }) => decodeBody(body)),
        [["session.handle", { methods: ["approve"], max: 32 }]],
      );
      for (const request of registering.splice(0)) {
        request.connection.respond(request, {});
      }
      await settled();
      assert.equal(held.filter(({ connection }) => connection === extra).length, 1);
      assert.deepEqual(await answered(extra, tokenText(1)), ["here"]);
      requested(0);
      await refresh();
      assert.deepEqual(await answered(extra, tokenText(2)), ["here"]);
      respondAll();
      await Promise.all(calls);
    });

    test("handler that is added later is registered on all connections", async () => {
      const calls = await connectTwice();
      server.requests.length = 0;
      for (const request of held.splice(0, 2)) {
        request.connection.respond(request, {});
      }
      await settled();
      await client.handle("ask", () => 1);
      const methods = server.requests.map(({ method, params, connection }) => [method, params["methods"], connection]);
      const expected = server.connections.map((each) => ["session.handle", ["approve", "ask"], each]);
      assert.deepEqual(new Set(methods), new Set(expected));
      respondAll();
      await Promise.all(calls);
    });

    test("session of a device proves its key once on each connection", async () => {
      const signer = { sign: () => new Uint8Array(64) };
      server.on("session.open", () => opened(1, { ...refreshable, bound: true }));
      server.on("session.refresh", () => opened(2, { ...refreshable, bound: true }));
      server.on("session.attach", () => ({}));
      client = await server.connect(fleet({ maxConnections: 2, credentials: new DeviceKey(signer, "laptop") }));
      const calls = Array.from({ length: 3 }, () => client.call("hold"));
      await settled();
      assert.deepEqual(requested(1), [
        ["session.attach", tokenText(1)],
        ["hold", tokenText(1)],
      ]);
      requested(0);
      await refresh();
      assert.deepEqual(requested(1), [refreshed]);
      respondAll();
      await Promise.all(calls);
    });
  });

  test("aborted call leaves the queue", async () => {
    client = await server.connect(fleet({ maxConnections: 2 }));
    const calls = Array.from({ length: 4 }, () => client.call("hold"));
    await settled();
    const controller = new AbortController();
    const aborted = watch(client.call("echo", {}, { signal: controller.signal }));
    const waiting = client.call("echo", { x: 1 });
    await settled();
    controller.abort(new Error("aborted by the test"));
    await settled();
    assert.match(String(aborted.error), /aborted by the test/);
    respondAll();
    assert.deepEqual(await waiting, { x: 1 });
    await Promise.all(calls);
  });
});
