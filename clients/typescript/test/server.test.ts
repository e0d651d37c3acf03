/** The client with a real `zcproto serve`. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { connect as connectTcp, createServer, type Socket, type Server as TcpServer } from "node:net";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";
import {
  AlreadyExists,
  CertificateError,
  type Client,
  ConnectionClosed,
  connect,
  DeadlineExceeded,
  Device,
  enroll,
  InvalidArgument,
  ResourceExhausted,
  type ServerEvent,
  TlsError,
  TokenRevoked,
  Unauthenticated,
  Unimplemented,
} from "../src/index.js";
import { PACKAGE, ROOT, Server } from "./support/server.js";

const CONFIG = `
[sessions]
per_user = 1000
`;

let server: Server;
let key: string;
const clients: Client[] = [];
const servers: Server[] = [];

/** Make a server for one test, which is removed after all tests. */
function newServer(config: string): Server {
  const created = new Server(config);
  servers.push(created);
  return created;
}

before(async () => {
  server = newServer(CONFIG);
  key = server.addUser("ada");
  await server.start();
});

after(async () => {
  await Promise.all(clients.map((client) => client.close()));
  await Promise.all(servers.map((each) => each.remove()));
});

async function connected(options: Parameters<Server["connect"]>[0] = {}): Promise<Client> {
  const client = await server.connect({ user: "ada", key, ...options });
  clients.push(client);
  return client;
}

/** Wait for the next event of a name. */
async function nextEvent(client: Client, name: string): Promise<ServerEvent> {
  for await (const event of client.events) {
    if (event.name === name) {
      return event;
    }
  }
  throw new Error("the client was closed");
}

describe("calls", () => {
  test("echo returns values of all types", async () => {
    const client = await connected();
    const params = {
      text: "漢字 😀",
      bytes: new Uint8Array([0, 255]),
      numbers: [0, -1, 2 ** 31, 2 ** 53 - 1, -(2 ** 53) + 1, 2n ** 64n - 1n, -(2n ** 63n), 1.5],
      nothing: null,
      nested: { yes: true, no: [false] },
    };
    assert.deepEqual(await client.call("echo", params), params);
    assert.equal(typeof (await client.call<number>("time")), "number");
    assert.equal(client.welcome?.max_frame, 1_048_576);
  });

  test("more concurrent calls than streams succeed", async () => {
    const client = await connected();
    const numbers = Array.from({ length: 1_000 }, (_, n) => n);
    const results = await Promise.all(numbers.map((n) => client.call<{ n: number }>("echo", { n })));
    assert.deepEqual(
      results.map(({ n }) => n),
      numbers,
    );
  });

  test("first call of half a megabyte succeeds", async () => {
    const client = await connected();
    const text = "x".repeat(500_000);
    assert.equal((await client.call<{ text: string }>("echo", { text })).text.length, text.length);
  });

  test("errors of the server reject the call", async () => {
    const client = await connected();
    await assert.rejects(client.call("no.such.method"), Unimplemented);
    await assert.rejects(client.call("sleep", { minutes: 1 }), InvalidArgument);
    await assert.rejects(client.call("sleep", { ms: 60_000 }, { timeoutMs: 50 }), DeadlineExceeded);
    await assert.rejects(client.call("sleep", { ms: 60_000 }, { signal: AbortSignal.timeout(50) }), {
      name: "TimeoutError",
    });
    assert.deepEqual(await client.call("sleep", { ms: 1 }), {});
  });

  test("repeated call with an idempotency key runs once", async () => {
    const client = await connected();
    const options = { idempotencyKey: "once" };
    const first = await client.call<number>("time", {}, options);
    assert.equal(await client.call("time", {}, options), first);
  });
});

describe("sessions", () => {
  test("session is listed, revoked and opened again", async () => {
    const [first, second] = [await connected({ client: "first/1" }), await connected()];
    const id = first.session?.id;
    const list = await second.call<{ id: string; client: string }[]>("session.list");
    assert.equal(list.find((session) => session.id === id)?.client, "first/1");
    await second.call("session.revoke", { id });
    await nextEvent(first, "session.revoked");
    await assert.rejects(first.call("echo"), TokenRevoked);
    assert.notEqual((await first.openSession()).id, id);
    assert.deepEqual(await first.call("echo", { back: true }), { back: true });
  });

  test("wrong key is refused", async () => {
    await assert.rejects(connected({ key: "wrong" }), Unauthenticated);
  });

  test("public methods need no session", async () => {
    const client = await server.connect();
    const { versions } = await client.call<{ versions: number[] }>("server.info");
    assert.deepEqual(versions, [1]);
    await assert.rejects(client.call("echo"), Unauthenticated);
    await client.close();
  });

  test("session of a device is bound and attached on reconnect", async () => {
    const file = join(server.home, "laptop.key");
    const device = await Device.create(file);
    const options = { caFile: server.caFile, home: join(server.home, "client") };
    const code = server.run("pair", "--user", "ada").trim();
    assert.equal(await enroll(server.address, code, device, "laptop", options), "ada");
    await assert.rejects(enroll(server.address, code, device, "laptop", options), Unauthenticated);
    const again = server.run("pair", "--user", "ada").trim();
    await assert.rejects(enroll(server.address, again, device, "laptop", options), AlreadyExists);
    const client = await connected({ user: undefined, key: undefined, device: file, deviceName: "laptop" });
    assert.equal(client.session?.bound, true);
    const { id } = client.session;
    client.cut();
    await client.call("echo", {}, { idempotencyKey: "after the cut" });
    assert.equal(client.session?.id, id);
  });
});

test("client certificate opens a session, its key file must be private", async () => {
  const own = newServer('[tls]\nclient_auth = "optional"\n');
  own.addUser("eve");
  await own.start();
  const folder = join(own.home, "handout");
  own.run("cert", "issue-client", "eve", "--out", folder);
  const [certificate, keyFile] = [join(folder, "eve.crt"), join(folder, "eve.key")];
  const client = await own.connect({ certificate, keyFile });
  assert.deepEqual([client.session?.user, client.session?.bound], ["eve", true]);
  client.cut();
  await client.call("echo", {}, { idempotencyKey: "after the cut" });
  await client.close();
  await assert.rejects(own.connect({ certificate, keyFile, user: "ada" }), Unauthenticated);
  chmodSync(keyFile, 0o644);
  await assert.rejects(own.connect({ certificate, keyFile }), CertificateError);
  await own.remove();
});

describe("connections", () => {
  test("reconnect after a cut keeps the session and retries idempotent calls", async () => {
    const client = await connected();
    const id = client.session?.id;
    const lost = client.call("sleep", { ms: 60_000 });
    const retried = client.call("sleep", { ms: 300 }, { idempotencyKey: "retried" });
    await client.call("echo");
    client.cut();
    await assert.rejects(lost, (error) => error instanceof ConnectionClosed && !error.clean);
    assert.deepEqual(await retried, {});
    assert.equal(client.session?.id, id);
  });

  test("connection that ends without close_notify is truncated", async () => {
    const proxy = await TruncatingProxy.to(server.port);
    const client = await connect(`localhost:${proxy.port}`, {
      caFile: server.caFile,
      user: "ada",
      key,
      home: server.home,
    });
    const call = client.call("sleep", { ms: 60_000 });
    await client.call("echo");
    proxy.end();
    await assert.rejects(
      call,
      (error) => error instanceof ConnectionClosed && !error.clean && error.reason === "truncated",
    );
    await client.close();
    await proxy.close();
  });

  test("client reconnects to a restarted server with the same session", async () => {
    const own = newServer(CONFIG);
    const ownKey = own.addUser("eve");
    await own.start();
    const client = await own.connect({ user: "eve", key: ownKey, timeoutMs: 120_000 }); // the server starts slowly on a busy machine
    clients.push(client);
    const id = client.session?.id;
    const sleeping = client.call("sleep", { ms: 500 });
    await client.call("echo"); // ensures that the server has received the previous call
    await own.stop("SIGTERM");
    assert.deepEqual(await sleeping, {}, "call in flight is answered during the drain");
    const waiting = client.call("echo", { after: "restart" });
    await own.start();
    assert.deepEqual(await waiting, { after: "restart" });
    assert.equal(client.session?.id, id);
    await client.close();
    await own.remove();
  });

  test("client of several addresses uses the one that listens", async () => {
    const options = { caFile: server.caFile, user: "ada", key, home: server.home, addressOrder: "listed" } as const;
    const client = await connect(["127.0.0.1:1", `localhost:${server.port}`], options);
    clients.push(client);
    assert.equal(client.endpoint?.host, "localhost");
    assert.deepEqual(await client.call("echo", { x: 1 }), { x: 1 });
  });

  test("session limit is reported", async () => {
    const own = newServer("[sessions]\nper_user = 1\n");
    const ownKey = own.addUser("eve");
    await own.start();
    const first = await own.connect({ user: "eve", key: ownKey });
    await assert.rejects(
      own.connect({ user: "eve", key: ownKey }),
      (error) => error instanceof ResourceExhausted && error.details["limit"] === 1,
    );
    await first.close();
    await (await own.connect({ user: "eve", key: ownKey })).close();
    await own.remove();
  });
});

describe("trust", () => {
  const pins = () => server.run("cert", "pins", "--plain").trim().split("\n");

  test("pins are checked alone, with a backup, and with a CA", async () => {
    const backup = `sha256/${Buffer.alloc(32).toString("base64")}`;
    for (const options of [{ pins: pins() }, { pins: [...pins(), backup] }, { pins: pins(), caFile: server.caFile }]) {
      const client = await connected(options);
      assert.deepEqual(await client.call("echo", { a: 1 }), { a: 1 });
    }
    for (const options of [{ pins: [backup] }, { pins: [backup], caFile: server.caFile }]) {
      await assert.rejects(
        connected(options),
        (error) => error instanceof TlsError && error.failure === "pin_mismatch",
      );
    }
  });

  test("name is verified with a CA and with pins", async () => {
    for (const options of [{ pins: pins() }, { caFile: server.caFile }]) {
      await assert.rejects(
        connected({ ...options, serverHostname: "other.example" }),
        (error) => error instanceof TlsError && error.failure === "certificate_name_mismatch",
      );
    }
  });

  test("certificate of another CA is refused", async () => {
    await assert.rejects(
      connected({ caFile: join(PACKAGE, "test/support/certificate.pem") }),
      (error) => error instanceof TlsError && error.failure === "certificate_untrusted",
    );
    await assert.rejects(connected({ caFile: undefined, systemStore: true }), TlsError);
  });

  test("verify: false is refused for a host with an sts policy", async () => {
    const home = join(server.home, "another");
    const unverified = await connected({ verify: false, home });
    await unverified.call("echo");
    await connected({ home, caFile: server.caFile });
    await assert.rejects(
      connected({ verify: false, home }),
      (error) => error instanceof TlsError && error.failure === "sts_policy",
    );
    await assert.rejects(
      connected({ verify: false, home, serverHostname: "other.example" }),
      (error) => error instanceof TlsError && error.failure === "sts_policy",
    );
  });
});

describe("programs of the README run as pasted", () => {
  const file = (text: string, name: string) =>
    new RegExp(`\`${name}\`:\\n\\n\`{3}\\w+\\n([^]+?)\`{3}`).exec(text)?.[1] ?? "";
  const readme = readFileSync(join(PACKAGE, "README.md"), "utf8");

  async function run(name: string, own: Server, ownKey: string): Promise<string> {
    const program = file(readme, name);
    assert.ok(program.trim().split("\n").length <= 12);
    const folder = mkdtempSync(join(PACKAGE, "dist/readme-")); // inside the package, which can import itself by name
    const source = program.replaceAll("localhost:7443", own.address);
    assert.notEqual(source, program);
    writeFileSync(join(folder, name), source);
    writeFileSync(join(folder, "ada.key"), ownKey, { mode: 0o600 });
    const env = { ...process.env, ZCPROTO_HOME: own.home };
    const { stdout } = await promisify(execFile)(process.execPath, [name], { cwd: folder, env });
    rmSync(folder, { recursive: true });
    return stdout;
  }

  test("ask.mjs", async () => {
    assert.match(await run("ask.mjs", server, key), /hello/);
  });

  for (const [name, guide, app, output] of [
    ["listen.mjs", "streams", "talk", "to\nbe\nor\nnot\n{ words: 4 }\n"],
    ["enter.mjs", "authentication", "accounts", "ada\n"],
    ["desk.mjs", "calls", "agent", "ran ls\nnot approved; ask the person at the client\n"],
  ] as const) {
    test(name, async () => {
      const own = newServer("");
      const text = readFileSync(join(ROOT, `docs/${guide}.md`), "utf8");
      writeFileSync(join(own.home, `${app}.py`), file(text, `${app}.py`));
      const ownKey = own.addUser("ada");
      await own.start(`${app}:app`);
      assert.equal(await run(name, own, ownKey), output);
    });
  }
});

test("log of the server has no key and no token", () => {
  assert.ok(!server.log.includes(key));
  for (const client of clients) {
    if (client.session !== undefined) {
      assert.ok(!server.log.includes(client.session.token));
    }
  }
});

/** A TCP proxy that can end connections without close_notify. */
class TruncatingProxy {
  readonly #sockets = new Set<Socket>();

  private constructor(readonly server: TcpServer) {}

  static async to(port: number): Promise<TruncatingProxy> {
    const proxy = new TruncatingProxy(createServer());
    proxy.server.on("connection", (near) => {
      const far = connectTcp(port, "localhost");
      proxy.#sockets.add(near);
      near.on("error", () => far.destroy());
      far.on("error", () => near.destroy());
      near.pipe(far);
      far.pipe(near);
    });
    await new Promise<void>((resolve) => proxy.server.listen(0, "localhost", resolve));
    return proxy;
  }

  get port(): number {
    return (this.server.address() as AddressInfo).port;
  }

  end(): void {
    for (const socket of this.#sockets) {
      socket.end();
    }
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) {
      socket.destroy();
    }
    await new Promise((resolve) => this.server.close(resolve));
  }
}
