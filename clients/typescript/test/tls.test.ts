/** TLS handshakes and connection ends, with faulty servers of node:tls. */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import {
  type AddressInfo,
  connect as connectTcp,
  createServer as createTcpServer,
  type Server,
  type Socket,
} from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, describe, test } from "node:test";
import { createServer, type TLSSocket, type TlsOptions } from "node:tls";
import { systemClock } from "../src/client/clock.js";
import { type ConnectOptions, connect } from "../src/connect.js";
import { Dialer } from "../src/edge/dial.js";
import { keyPin } from "../src/edge/pins.js";
import { Trust } from "../src/edge/trust.js";
import {
  CannotConnect,
  CertificateError,
  Code,
  ConfigError,
  ConnectionClosed,
  TlsError,
  type TlsFailure,
} from "../src/errors.js";
import { encodeBody } from "../src/wire/body.js";
import { encodeFrame, Kind, NO_TOKEN } from "../src/wire/frame.js";
import { WELCOME } from "./support/fake.js";
import { PACKAGE } from "./support/server.js";

const caFile = join(PACKAGE, "test/support/certificate.pem");
const cert = readFileSync(caFile);
const key = readFileSync(join(PACKAGE, "test/support/key.pem"));
const PIN = keyPin(new X509Certificate(cert));
const OTHER_PIN = `sha256/${Buffer.alloc(32).toString("base64")}`;
const GOOD: TlsOptions = { cert, key, ALPNProtocols: ["zcp/1"] };

let home: string;
const servers: Server[] = [];
const sockets = new Set<Socket>();

before(() => {
  home = mkdtempSync(join(tmpdir(), "zcproto-tls-"));
});

afterEach(async () => {
  for (const socket of sockets) {
    socket.destroy();
  }
  await Promise.all(servers.splice(0).map((server) => new Promise((resolve) => server.close(resolve))));
});

after(() => rmSync(home, { recursive: true, force: true }));

async function listen(server: Server): Promise<string> {
  server.on("connection", (socket: Socket) => {
    sockets.add(socket);
    socket.on("error", () => undefined); // expected: clients close connections
  });
  server.on("tlsClientError", (_error, socket: TLSSocket) => socket.destroy());
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `localhost:${(server.address() as AddressInfo).port}`;
}

function frame(kind: Kind, counter: bigint, body?: unknown, time = Date.now()): Buffer {
  const bytes = body === undefined ? new Uint8Array(0) : encodeBody(body);
  return encodeFrame(kind, 0, BigInt(time), 7n, counter, NO_TOKEN, bytes);
}

/** Start a server that sends WELCOME and then runs a callback. */
function welcoming(then: (socket: TLSSocket) => void, options: TlsOptions = GOOD): Promise<string> {
  return listen(
    createServer(options, (socket) => {
      socket.on("error", () => undefined);
      socket.write(frame(Kind.WELCOME, 0n, WELCOME));
      then(socket);
    }),
  );
}

const open = (address: string, options: ConnectOptions = {}) => connect(address, { caFile, home, ...options });

function isFailure(failure: TlsFailure): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof TlsError, String(error));
    assert.equal(error.failure, failure);
    return true;
  };
}

describe("handshake", () => {
  const faulty: [string, TlsOptions, TlsFailure][] = [
    ["with TLS 1.2", { ...GOOD, maxVersion: "TLSv1.2" }, "unsupported_version"],
    ["with other suites", { ...GOOD, ciphers: "TLS_AES_128_GCM_SHA256" }, "no_shared_parameters"],
    ["with another group", { ...GOOD, ecdhCurve: "secp256k1" }, "no_shared_parameters"],
    ["without ALPN", { cert, key }, "no_application_protocol"],
    ["with another protocol", { ...GOOD, ALPNProtocols: ["http/1.1"] }, "no_application_protocol"],
    [
      "that requires a certificate",
      { ...GOOD, requestCert: true, rejectUnauthorized: true, ca: cert },
      "certificate_required",
    ],
  ];
  for (const [name, options, failure] of faulty) {
    test(`server ${name} is refused`, async () => {
      const address = await listen(createServer(options));
      await assert.rejects(open(address, { connectTimeoutMs: 5_000 }), isFailure(failure));
    });
  }

  test("server without TLS is refused", async () => {
    const address = await listen(createTcpServer((socket) => socket.write("220 mail.example ESMTP ready\r\n")));
    await assert.rejects(open(address), isFailure("not_tls"));
  });

  test("server that closes the connection is refused", async () => {
    const address = await listen(createTcpServer((socket) => socket.destroy()));
    await assert.rejects(open(address), isFailure("disconnected"));
  });

  test("silent server times out", async () => {
    for (const server of [createTcpServer(() => undefined), createServer(GOOD)]) {
      const address = await listen(server);
      await assert.rejects(open(address, { connectTimeoutMs: 300 }), (error) => error instanceof CannotConnect);
    }
  });

  test("unreachable server is reported", async () => {
    const address = await listen(createTcpServer());
    await new Promise((resolve) => servers.pop()?.close(resolve));
    await assert.rejects(open(address, { startTimeoutMs: 0 }), (error) => {
      assert.ok(error instanceof CannotConnect && error.refused);
      assert.equal(error.message, `${address}: ECONNREFUSED; start the server, or check the host and the port`);
      return true;
    });
    await assert.rejects(open("no-such-host.invalid"), (error) => error instanceof CannotConnect && !error.refused);
    await assert.rejects(open(address, { startTimeoutMs: -1 }), ConfigError);
  });

  test("missing CA is awaited while nothing listens, and named otherwise", async () => {
    const missing = join(home, "no-such-ca.pem");
    const address = await listen(createServer(GOOD));
    await assert.rejects(
      open(address, { caFile: missing }),
      (error) => error instanceof CertificateError && /does not exist; copy the CA of the server/.test(error.message),
    );
    await new Promise((resolve) => servers.pop()?.close(resolve));
    await assert.rejects(
      open(address, { caFile: missing, startTimeoutMs: 0 }),
      (error) => error instanceof CannotConnect && error.message.includes(`and ${missing} does not exist; start`),
    );
  });

  test("expired or not yet valid certificate is refused with pins", async () => {
    const address = await welcoming(() => undefined);
    const [host, port] = address.split(":");
    for (const years of [200, -200]) {
      const wall = () => Date.now() + years * 365 * 86_400_000;
      const dialer = new Dialer({
        serverHostname: "localhost",
        trust: new Trust({ pins: [PIN, OTHER_PIN], onWarning: () => undefined }),
        knownHosts: undefined,
        clock: systemClock,
        systemClock: { ...systemClock, wall },
        connectTimeoutMs: 5_000,
        maxFrame: 1_048_576,
        toleranceMs: 30_000,
        onWarning: () => undefined,
      });
      const ignore = () => undefined;
      const listener = {
        eventReceived: ignore,
        callReceived: ignore,
        callWithdrawn: ignore,
        connectionDraining: ignore,
        connectionEnded: ignore,
        connectionSilent: ignore,
        connectionHeard: ignore,
        connectionFree: ignore,
      };
      const endpoint = { host: "localhost", port: Number(port), ip: host ?? "" };
      await assert.rejects(
        dialer.dial(listener, endpoint, ignore, new AbortController().signal),
        isFailure("certificate_expired"),
      );
    }
  });
});

test("wrong pin, name or CA: nothing is sent after the ClientHello", async () => {
  const sent: Buffer[] = [];
  const [, port] = (await listen(createServer(GOOD))).split(":");
  const address = await listen(
    createTcpServer((near) => {
      const far = connectTcp(Number(port), "127.0.0.1");
      near.on("data", (chunk: Buffer) => {
        sent.push(chunk);
        far.write(chunk);
      });
      far.on("error", () => near.destroy()).pipe(near);
      near.on("close", () => far.destroy());
    }),
  );
  const untrusted: [ConnectOptions, TlsFailure][] = [
    [{ caFile: undefined, pins: [OTHER_PIN] }, "pin_mismatch"],
    [{ pins: [OTHER_PIN] }, "pin_mismatch"],
    [{ serverHostname: "other.example" }, "certificate_name_mismatch"],
    [{ caFile: undefined, pins: [PIN], serverHostname: "127.0.0.2" }, "certificate_name_mismatch"],
    [{ caFile: undefined, systemStore: true }, "certificate_untrusted"],
  ];
  for (const [options, failure] of untrusted) {
    sent.length = 0;
    await assert.rejects(open(address, { ...options, user: "ada", key: "secret" }), isFailure(failure));
    const bytes = Buffer.concat(sent);
    for (let at = 0; at < bytes.length; at += 5 + bytes.readUInt16BE(at + 3)) {
      assert.notEqual(bytes[at], 0x17, "an encrypted record was sent");
    }
    assert.ok(bytes.length > 0);
  }
});

test("address as name and backup pins are trusted", async () => {
  const address = await welcoming(() => undefined);
  for (const options of [{ pins: [OTHER_PIN, PIN] }, { caFile: undefined, pins: [OTHER_PIN, PIN] }]) {
    await (await open(address, options)).close();
  }
  await (await open(address.replace("localhost", "127.0.0.1"))).close();
});

describe("end of a connection", () => {
  const lost = (then: (socket: TLSSocket) => void) => async (): Promise<ConnectionClosed> => {
    const address = await welcoming((socket) => socket.once("data", () => then(socket)));
    const client = await open(address);
    try {
      await client.call("server.info");
    } catch (error) {
      assert.ok(error instanceof ConnectionClosed, String(error));
      return error;
    } finally {
      await client.close();
    }
    throw new Error("the call succeeded");
  };
  /** The TCP socket of a TLS connection at the server. */
  const below = (socket: TLSSocket): Socket => {
    const [tcp] = [...sockets].filter(({ remotePort }) => remotePort === socket.remotePort);
    assert.ok(tcp);
    return tcp;
  };

  test("close_notify is a clean end", async () => {
    const error = await lost((socket) => socket.end())();
    assert.ok(error.clean);
  });

  test("end of TCP without close_notify is a truncation", async () => {
    const error = await lost((socket) => below(socket).end())();
    assert.deepEqual([error.clean, error.reason], [false, "truncated"]);
  });

  test("reset is not a clean end", async () => {
    const error = await lost((socket) => below(socket).resetAndDestroy())();
    assert.ok(!error.clean);
  });

  const faults: [string, Buffer, Code][] = [
    ["a frame of another connection", Buffer.from(frame(Kind.PING, 1n)).fill(9, 20, 28), Code.REPLAYED],
    ["a counter that does not increase", frame(Kind.PING, 0n), Code.REPLAYED],
    ["a second WELCOME", frame(Kind.WELCOME, 1n, WELCOME), Code.PROTOCOL_ERROR],
    ["a length above the limit", Buffer.from("7fffffff01030000", "hex"), Code.FRAME_TOO_LARGE],
    ["noise", Buffer.alloc(100, 0xff), Code.FRAME_TOO_LARGE],
    ["an ERROR on stream 0", frame(Kind.ERROR, 1n, [Code.FRAME_TOO_LARGE, "too large"]), Code.FRAME_TOO_LARGE],
  ];
  for (const [name, bytes, code] of faults) {
    test(`${name} ends the connection with its code and close_notify`, async () => {
      let closeNotify: Promise<boolean> = Promise.resolve(false);
      const error = await lost((socket) => {
        closeNotify = new Promise((resolve) => socket.once("end", () => resolve(true)));
        socket.write(bytes);
      })();
      assert.equal(error.code, code);
      assert.ok(await closeNotify);
    });
  }

  test("data after the end is discarded up to a limit", async () => {
    let written = 0;
    const began = Date.now();
    const error = await lost((socket) => {
      socket.write(Buffer.alloc(100, 0xff));
      const flood = () => {
        while (!socket.destroyed && socket.write(Buffer.alloc(65_536))) {
          written += 65_536;
        }
      };
      socket.on("drain", flood);
      flood();
    })();
    assert.equal(error.code, Code.FRAME_TOO_LARGE);
    assert.ok(Date.now() - began < 10_000);
    assert.ok(written < 64 * 1_048_576);
  });
});
