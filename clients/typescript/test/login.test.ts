/** Logins by a scheme of the application, with a server in memory and a fake clock. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, describe, test } from "node:test";
import { inspect } from "node:util";
import type { Client } from "../src/client/client.js";
import {
  chooseCredentials,
  LOGIN_HOLDS_MS,
  type LoginParams,
  type LoginSource,
  SchemeLogin,
} from "../src/client/session.js";
import {
  Code,
  ConfigError,
  ConnectionClosed,
  DeadlineExceeded,
  LoginError,
  TokenRevoked,
  Unauthenticated,
} from "../src/errors.js";
import { Failure, FakeServer, opened, STREAMING, settled, tokenNumber, WALL, watch } from "./support/fake.js";

const PASSWORD = { scheme: "password", user: "ada", password: "correct horse" };

let server: FakeServer;
let clients: Client[];
let issued: number;

beforeEach(() => {
  server = new FakeServer();
  clients = [];
  issued = 0;
});

afterEach(async () => {
  for (const client of clients) {
    void client.close();
  }
  for (const client of clients) {
    await server.closed(client);
  }
});

/** Return a new ticket, as an identity provider does. */
function ticket(): Promise<LoginParams> {
  issued += 1;
  return Promise.resolve({ scheme: "ticket", ticket: issued });
}

function clientOf(login: LoginSource, more: Parameters<FakeServer["client"]>[0] = {}): Client {
  const client = server.client({ credentials: new SchemeLogin(login), ...more });
  clients.push(client);
  return client;
}

async function connected(login: LoginSource, more: Parameters<FakeServer["client"]>[0] = {}): Promise<Client> {
  const client = clientOf(login, more);
  await client.open();
  await settled();
  return client;
}

/** Return the tickets of all logins. */
function sent(): unknown[] {
  return server.requests.filter(({ method }) => method === "session.open").map(({ params }) => params["ticket"]);
}

describe("sessions", () => {
  test("fields are sent as given", async () => {
    await connected(PASSWORD);
    assert.deepEqual(server.requests[0]?.params, { ...PASSWORD, client: "test/1" });
  });

  test("plain function returns the fields", async () => {
    await connected(() => PASSWORD);
    assert.equal(server.requests[0]?.params["password"], "correct horse");
  });

  test("revoked session is opened again with new fields, when the application asks", async () => {
    const client = await connected(ticket);
    server.script("echo", new Failure(Code.TOKEN_REVOKED), {});
    await assert.rejects(client.call("echo"), TokenRevoked);
    await assert.rejects(client.call("echo"), TokenRevoked);
    assert.deepEqual(sent(), [1]);
    await client.openSession();
    await client.call("echo");
    assert.deepEqual(sent(), [1, 2]);
  });

  test("expired session is opened again with new fields", async () => {
    const client = await connected(ticket);
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), { ok: true });
    assert.deepEqual(await client.call("echo"), { ok: true });
    assert.deepEqual(sent(), [1, 2]);
  });

  test("refresh needs no login", async () => {
    const refreshable = { refresh_token: tokenNumber(100), refresh_expires_at: WALL + 86_400_000 };
    server.on("session.open", () => opened(1, refreshable));
    server.on("session.refresh", () => opened(2, refreshable));
    const client = await connected(ticket);
    server.script("echo", new Failure(Code.TOKEN_EXPIRED), {});
    await client.call("echo");
    assert.equal(issued, 1);
    assert.ok(server.methods.includes("session.refresh"));
  });

  test("session is kept over a reconnect without another login", async () => {
    const client = await connected(ticket);
    client.cut();
    await settled();
    const call = watch(client.call("echo"));
    await server.clock.advance(1_000);
    assert.ok(call.isDone);
    assert.equal(server.connections.length, 2);
    assert.equal(issued, 1);
  });

  test("login that was not decided is repeated with new fields", async () => {
    server.script("session.open", new Failure(Code.UNAVAILABLE, { retry_after_ms: 10 }), opened(1));
    const opening = watch(connected(ticket));
    await server.clock.advance(1_000);
    assert.ok(opening.isDone);
    assert.deepEqual(sent(), [1, 2]);
  });

  test("refused login is not repeated until the application asks", async () => {
    const client = await connected(ticket, { opensSession: false });
    server.script("session.open", new Failure(Code.UNAUTHENTICATED), opened(1));
    await assert.rejects(client.openSession(), Unauthenticated);
    await assert.rejects(client.call("echo"), Unauthenticated);
    assert.equal(issued, 1);
    await client.openSession();
    assert.equal(issued, 2);
  });

  test("session that belongs to the previous certificate is opened again", async () => {
    const client = await connected(ticket);
    server.script("echo", new Failure(Code.UNAUTHENTICATED, { certificate: true }), {});
    await client.call("echo");
    assert.deepEqual(sent(), [1, 2]);
  });

  test("each user of a connection has a login", async () => {
    const gateway = await connected(PASSWORD, {
      credentials: undefined,
      opensSession: false,
      credentialsOf: ({ login }) => Promise.resolve(new SchemeLogin(login ?? PASSWORD)),
    });
    const ada = await gateway.sessionFor({ login: PASSWORD });
    const bob = await gateway.sessionFor({ login: ticket });
    await Promise.all([ada.call("echo"), bob.call("echo")]);
    assert.deepEqual(sent(), [undefined, 1]);
    assert.equal(server.connections.length, 1);
  });
});

describe("connection lost while the function runs", () => {
  test("login is sent on the next connection", async () => {
    let answer: (login: typeof PASSWORD) => void = () => undefined;
    const client = await connected(() => new Promise((resolve) => (answer = resolve)), {
      opensSession: false,
      timeoutMs: Number.POSITIVE_INFINITY,
    });
    const opening = watch(client.openSession());
    await server.clock.advance(60_000);
    client.cut();
    await server.clock.advance(1_000);
    answer(PASSWORD);
    await settled();
    assert.ok(opening.isDone);
    assert.equal(opening.error, undefined);
    assert.equal(server.connections.length, 2);
  });

  test("login that waited too long for a connection is fetched again", async () => {
    const answers: (() => void)[] = [];
    const gated = async () => {
      await new Promise<void>((resolve) => answers.push(resolve));
      return ticket();
    };
    const client = await connected(gated, { opensSession: false, timeoutMs: Number.POSITIVE_INFINITY });
    server.connectErrors = Array.from({ length: 10 }, () => new ConnectionClosed("refused"));
    const opening = watch(client.openSession());
    await settled();
    client.cut();
    await settled();
    answers.pop()?.();
    await server.clock.advance(LOGIN_HOLDS_MS + 60_000);
    assert.deepEqual(sent(), []);
    answers.pop()?.();
    await settled();
    assert.ok(opening.isDone);
    assert.deepEqual(sent(), [2]);
  });
});

class ProviderDown extends Error {
  override name = "ProviderDown";
}

describe("faults of the function", () => {
  test("its rejection is the cause of a LoginError, and the next call runs it again", async () => {
    const problems: unknown[] = [new ProviderDown("secret reason"), "text", new ConnectionClosed("of another client")];
    const login = () => {
      const problem = problems.shift();
      if (problem !== undefined) {
        throw problem;
      }
      return PASSWORD;
    };
    await assert.rejects(connected(login), (error) => {
      assert.ok(error instanceof LoginError);
      assert.equal(error.message, "login: the function rejected with ProviderDown; see the cause");
      assert.ok(error.cause instanceof ProviderDown);
      return true;
    });
    const client = await connected(login, { opensSession: false });
    await assert.rejects(client.openSession(), /rejected with string/);
    await assert.rejects(client.call("echo"), /rejected with ConnectionClosed/);
    await client.call("echo");
    assert.equal(client.session?.user, "ada");
  });

  test("it is repeated with growing delays while there are handlers", async () => {
    server.welcome = STREAMING;
    let asked = 0;
    const times: number[] = [];
    const login = () => {
      asked += 1;
      times.push(server.clock.now());
      if (asked > 1) {
        throw new ProviderDown();
      }
      return PASSWORD;
    };
    server.on("session.open", () => opened(1, { expires_at: WALL + 5_000 }));
    const client = await connected(login);
    await client.handle("ask", () => Promise.resolve(null));
    await server.clock.advance(100_000);
    const delays = times.slice(2).map((time, index) => time - (times[index + 1] as number));
    assert.deepEqual(delays, [2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
  });

  test("slow function is named at the timeout", async () => {
    const opening = watch(connected(() => new Promise<never>(() => undefined), { timeoutMs: 5_000 }));
    await server.clock.advance(5_000);
    assert.ok(opening.error instanceof DeadlineExceeded);
    assert.match(opening.error.message, /no session \(the function given as login has not returned\)/);
  });

  test("client can be closed while the function runs", async () => {
    const client = await connected(() => new Promise<never>(() => undefined), { opensSession: false });
    const opening = watch(client.openSession());
    await settled();
    await client.close();
    await settled();
    assert.ok(opening.error instanceof ConnectionClosed);
  });

  for (const [login, expected] of [
    [undefined, /give an object/],
    ["secret", /give an object/],
    [{}, /`scheme` is missing/],
    [{ scheme: 1 }, /`scheme` is missing/],
    [{ scheme: "own", client: "shop/2.1" }, /`client` is the product/],
    [{ scheme: "own", secret: () => "secret" }, /cannot be sent: function/],
  ] as const) {
    test(`unusable login is refused: ${inspect(login)}`, async () => {
      const source = login as unknown as LoginSource;
      await assert.rejects(
        connected(() => source as never),
        (error) => {
          assert.ok(error instanceof LoginError);
          assert.match(error.message, expected);
          return true;
        },
      );
      if (login !== undefined) {
        assert.throws(() => new SchemeLogin(source), ConfigError);
      }
    });
  }
});

describe("options", () => {
  test("login excludes other credentials", () => {
    for (const other of [{ user: "ada" }, { key: "k" }, { deviceName: "laptop" }]) {
      assert.throws(() => chooseCredentials({ login: PASSWORD, hasCertificate: true, ...other }), /leave out user/);
    }
    assert.ok(chooseCredentials({ login: PASSWORD, hasCertificate: true }) instanceof SchemeLogin);
  });

  test("login is hidden from inspection", () => {
    const client = clientOf(PASSWORD);
    const seen = inspect([client, new SchemeLogin(PASSWORD), JSON.stringify(client)], { depth: 20, showHidden: true });
    assert.ok(!seen.includes("correct horse"));
  });
});
