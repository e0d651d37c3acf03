/** Pins, addresses, key files, known hosts and options, without a network. */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { inspect } from "node:util";
import { addressText, parseAddress } from "../src/client/address.js";
import { chooseCredentials } from "../src/client/session.js";
import { escapeText } from "../src/client/text.js";
import { checkNode, connect } from "../src/connect.js";
import { Device } from "../src/edge/device.js";
import { KnownHosts, MAX_HOSTS } from "../src/edge/known_hosts.js";
import { certificatePin, keyPin, MAX_PINS, parsePins } from "../src/edge/pins.js";
import { CertificateError, ConfigError, TlsError } from "../src/errors.js";
import { VERSION } from "../src/version.js";
import { WALL } from "./support/fake.js";
import { PACKAGE } from "./support/server.js";

let folder: string;
before(() => {
  folder = mkdtempSync(join(tmpdir(), "zcproto-edge-"));
});
after(() => rmSync(folder, { recursive: true, force: true }));

const PIN = `sha256/${Buffer.alloc(32, 1).toString("base64")}`;

describe("pins", () => {
  test("pins equal those of openssl", () => {
    // openssl req -x509 -newkey ed25519 -nodes -subj /CN=x -days 36500; then
    // openssl x509 -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64
    const certificate = new X509Certificate(readFileSync(join(PACKAGE, "test/support/certificate.pem")));
    const [key, whole] = readFileSync(join(PACKAGE, "test/support/certificate.pins"), "utf8").trim().split("\n");
    assert.equal(keyPin(certificate), `sha256/${key}`);
    assert.equal(certificatePin(certificate), `cert-sha256/${whole}`);
  });

  test("pins are accepted as a list or as a text", () => {
    const other = PIN.replace("sha256", "cert-sha256");
    assert.deepEqual([...parsePins(`${PIN}, ${other}\n`)], [PIN, other]);
    assert.deepEqual([...parsePins([PIN, PIN])], [PIN]);
    assert.deepEqual([...parsePins([])], []);
  });

  for (const malformed of [
    "",
    " ",
    "sha256/",
    PIN.slice(0, -1),
    `${PIN}=`,
    PIN.replace("sha256", "sha1"),
    "AAAA",
    `${PIN}\u0000`,
  ]) {
    test(`${JSON.stringify(malformed)} is refused as malformed`, () => {
      assert.throws(() => parsePins(malformed), { failure: "pin_malformed" });
      assert.throws(() => parsePins([PIN, malformed]), TlsError);
    });
  }

  test("number of pins is limited", () => {
    const many = Array.from({ length: MAX_PINS + 1 }, (_, n) => `sha256/${Buffer.alloc(32, n).toString("base64")}`);
    assert.throws(() => parsePins(many), TlsError);
  });
});

describe("addresses", () => {
  const valid: [string, string][] = [
    ["host", "host:7443"],
    ["Host.Example:1", "host.example:1"],
    ["host.", "host:7443"],
    ["127.0.0.1", "127.0.0.1:7443"],
    ["::1", "[::1]:7443"],
    ["[::1]", "[::1]:7443"],
    ["[::1]:65535", "[::1]:65535"],
    ["b\u00fccher.example", "xn--bcher-kva.example:7443"],
    ["a_b:7", "a_b:7"],
  ];
  for (const [text, shown] of valid) {
    test(`${text} is parsed`, () => assert.equal(addressText(parseAddress(text)), shown));
  }
  for (const text of [
    "",
    ":1",
    "host:",
    "host:0",
    "host:65536",
    "host:1x",
    "[::1",
    "[host]:1",
    "a b",
    "a..b",
    "1.2.3",
    "1::2::3",
    "-\n",
    "a".repeat(300),
  ]) {
    test(`${JSON.stringify(text.slice(0, 20))} is refused`, () => assert.throws(() => parseAddress(text), ConfigError));
  }
});

describe("devices", () => {
  test("device is created once in a private file and loaded again", async () => {
    const file = join(folder, "device.key");
    const device = await Device.create(file);
    assert.equal(statSync(file).mode & 0o777, 0o600);
    const again = await Device.load(file);
    assert.deepEqual(again.publicKey, device.publicKey);
    assert.deepEqual(again.sign(Buffer.from("x")), device.sign(Buffer.from("x")));
    await assert.rejects(Device.create(file), CertificateError);
    const seed = Buffer.from(readFileSync(file, "utf8").split("\n")[1] ?? "", "base64").subarray(-32);
    assert.doesNotMatch(inspect(device, { depth: 9, showHidden: true }), new RegExp(seed.toString("hex")));
    assert.deepEqual(Device.fromSeed(seed).publicKey, device.publicKey);
  });

  test("unusable key file is refused", async () => {
    const file = join(folder, "open.key");
    await Device.create(file);
    chmodSync(file, 0o644);
    await assert.rejects(Device.load(file), /chmod 600/);
    await assert.rejects(Device.load(folder), CertificateError);
    await assert.rejects(Device.load(join(folder, "none")), /ENOENT/);
    writeFileSync(join(folder, "text.key"), "hello", { mode: 0o600 });
    await assert.rejects(Device.load(join(folder, "text.key")), /not a private key/);
    await assert.rejects(Device.create(join(folder, "no/such")), CertificateError);
    assert.throws(() => Device.fromSeed(Buffer.alloc(31)), RangeError);
  });
});

describe("hosts with an sts policy", () => {
  const year = { max_age: 31_536_000, include_subdomains: true };
  const at = (name: string) => new KnownHosts(join(folder, name, "known_hosts.json"));

  test("policy requires verification until it ends", async () => {
    const known = at("policy");
    await known.require("a.example", WALL);
    await known.learn("a.example", year, WALL);
    assert.equal(statSync(known.path).mode & 0o777, 0o600);
    for (const host of ["a.example", "b.a.example"]) {
      await assert.rejects(known.require(host, WALL), { failure: "sts_policy" });
      await known.require(host, WALL + 31_536_001_000);
    }
    await known.require("example", WALL);
    await known.learn("a.example", { ...year, include_subdomains: false }, WALL);
    await known.require("b.a.example", WALL);
    await known.learn("a.example", { max_age: 0, include_subdomains: false }, WALL);
    await known.require("a.example", WALL);
  });

  test("address has no policy", async () => {
    const known = at("addresses");
    await known.learn("127.0.0.1", year, WALL);
    assert.ok(!existsSync(known.path));
  });

  test("concurrent writes lose nothing and leave no temporary file", async () => {
    const known = at("many");
    await Promise.all(
      Array.from({ length: 30 }, (_, n) => new KnownHosts(known.path).learn(`h${n}.example`, year, WALL)),
    );
    const { hosts } = JSON.parse(readFileSync(known.path, "utf8")) as { hosts: object };
    assert.equal(Object.keys(hosts).length, 30);
    assert.deepEqual(readdirSync(join(folder, "many")), ["known_hosts.json"]);
  });

  test("number of policies is limited, those that end first are dropped", async () => {
    const known = at("bounded");
    await known.learn("first.example", year, WALL);
    const hosts = Object.fromEntries(
      Array.from({ length: MAX_HOSTS }, (_, n) => [
        `h${n}`,
        { until: WALL / 1000 + 10 + n, include_subdomains: false },
      ]),
    );
    writeFileSync(known.path, JSON.stringify({ hosts }));
    await known.learn("new.example", year, WALL);
    const after = (JSON.parse(readFileSync(known.path, "utf8")) as { hosts: Record<string, unknown> }).hosts;
    assert.equal(Object.keys(after).length, MAX_HOSTS);
    assert.ok("new.example" in after && !("h0" in after));
  });

  for (const content of [
    "",
    "{",
    "[]",
    '{"hosts": {"a.example": {"until": "x", "include_subdomains": true}}}',
    '{"hosts": null}',
    '{"hosts": []}',
    '{"hosts": ""}',
    '{"hosts": 5}',
    '{"hosts": {"a.example": {"until": 9007199254740992, "include_subdomains": true}}}',
  ]) {
    test(`invalid file ${JSON.stringify(content)} is not treated as empty`, async () => {
      const known = new KnownHosts(join(folder, "damaged.json"));
      writeFileSync(known.path, content);
      await assert.rejects(known.require("a.example", WALL), { failure: "sts_policy" });
      await assert.rejects(known.learn("a.example", year, WALL), ConfigError);
    });
  }
});

describe("invalid options", () => {
  const invalid: [string, object][] = [
    ["verify and a CA", { verify: false, caFile: "x" }],
    ["verify and pins", { verify: false, pins: PIN }],
    ["two kinds of CA", { caFile: "x", systemStore: true }],
    ["a key without its user", { key: "k" }],
    ["a user without a key", { user: "u" }],
    ["a device name without a device", { deviceName: "d" }],
    ["a device without its name", { device: Device.fromSeed(Buffer.alloc(32, 1)) }],
    ["a device and a user", { device: Device.fromSeed(Buffer.alloc(32, 1)), deviceName: "d", user: "u" }],
    ["a key file without a certificate", { keyFile: "x" }],
    ["a timeout of 0", { timeoutMs: 0 }],
    ["a timeout that is not a number", { connectTimeoutMs: Number.NaN }],
  ];
  for (const [name, options] of invalid) {
    test(`${name} is refused`, () => assert.rejects(connect("localhost:1", { ...options, home: folder }), ConfigError));
  }

  const cures: [string, unknown, unknown, RegExp][] = [
    ["a port alone", 7443, {}, /the address is a string, such as "host:7443"/],
    ["a port after the host", "localhost", 7443, /the port is part of the address, as in connect\("host:7443"\)/],
    [
      "an option of the client in Python",
      "localhost",
      { ca_file: "ca.crt" },
      /ca_file: connect lacks this option; give caFile/,
    ],
    ["a timeout without its unit", "localhost", { timeout: 5 }, /timeout: connect lacks this option; give timeoutMs/],
    ["an unknown option", "localhost", { colour: "red" }, /colour: connect lacks this option; see ConnectOptions/],
    [
      "a path as key",
      "localhost",
      { user: "ada", key: "ada.key" },
      /path of a file; give its text, as in readFileSync/,
    ],
    [
      "bytes as key",
      "localhost",
      { user: "ada", key: Buffer.from("k") },
      /it is a string; read the file of the key as text/,
    ],
  ];
  for (const [name, address, options, cure] of cures) {
    test(`${name} is refused with its cure`, () =>
      assert.rejects(connect(address as string, options as object), { message: cure }));
  }

  test("an old version of Node.js is refused with the version that is needed", () => {
    for (const version of ["18.20.8", "20.8.1"]) {
      assert.throws(() => checkNode(version), /Node.js [0-9.]+ is too old; install 20.9 or later/);
    }
    checkNode("20.9.0");
    checkNode("22.0.0");
  });

  test("white space around a key is ignored", () => {
    const credentials = chooseCredentials({ hasCertificate: false, user: "u", key: "k\n" });
    assert.deepEqual(credentials, chooseCredentials({ hasCertificate: false, user: "u", key: "k" }));
  });

  test("no credentials and a certificate with a user are valid", () => {
    assert.equal(chooseCredentials({ hasCertificate: false }), undefined);
    assert.deepEqual(chooseCredentials({ hasCertificate: true, user: "u" })?.kind, "tls");
  });
});

test("escapeText escapes unprintable characters and truncates", () => {
  assert.equal(
    escapeText("a\r\n\u001b[31mb\u202e\ud800 \u{e0001}\u00fc"),
    "a\\r\\n\\x1b[31mb\\u202e\\ud800 \\U000e0001\u00fc",
  );
  assert.equal(escapeText("x".repeat(500), 10), `${"x".repeat(10)}...`);
});

test("VERSION equals that of package.json", () => {
  const { version } = JSON.parse(readFileSync(join(PACKAGE, "package.json"), "utf8")) as { version: string };
  assert.equal(VERSION, version);
});
