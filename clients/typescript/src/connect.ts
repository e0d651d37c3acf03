/** `connect` connects to a server, `enroll` enrolls a device. */

import { randomBytes } from "node:crypto";
import { homedir } from "node:os";
import { join } from "node:path";
import { parseAddress, parseAddresses } from "./client/address.js";
import { Client, type OnConnected } from "./client/client.js";
import { MonotonicClock, systemClock } from "./client/clock.js";
import type { ServerEvent } from "./client/event_stream.js";
import { DEFAULT_MAX_CALLS } from "./client/handlers.js";
import { type Credentials, chooseCredentials, type LoginSource } from "./client/session.js";
import type { ClientSettings, SessionOptions, Tracing } from "./client/types.js";
import { DEFAULT_TIMEOUT_MS } from "./client/user_client.js";
import { Device } from "./edge/device.js";
import { Dialer } from "./edge/dial.js";
import { KnownHosts } from "./edge/known_hosts.js";
import { PositionFile } from "./edge/position_file.js";
import { type Passphrase, Trust } from "./edge/trust.js";
import { ConfigError } from "./errors.js";
import { VERSION } from "./version.js";
import type { Params } from "./wire/message.js";

/** Timeout of one connect attempt to an IP address until WELCOME, and of name resolution. */
export const CONNECT_TIMEOUT_MS = 10_000;

/** How long to wait for a server that is starting. */
export const START_TIMEOUT_MS = 10_000;

/** The oldest version of Node.js that has what this client needs, as in package.json. */
const NODE = [20, 9] as const;

const KNOWN_HOSTS_FILE = "known_hosts.json";
const MAX_WARNED = 64;
const RUN_ID_SIZE = 16;
const MAX_CONNECTIONS = 64;

/** How to reach and verify a server. */
export interface TrustedServerOptions {
  /** PEM file of the trusted CA; without it and `pins`, the CAs that Node trusts. */
  readonly caFile?: string | undefined;
  /**
   * Pins of the server: `sha256/BASE64` of its public key, also of future ones, or `cert-sha256/...` of its certificate, as a
   * list or as a text with commas or white space. With `caFile` or `systemStore` both must match; without them a pin
   * replaces the CA, and validity period and name are still verified.
   */
  readonly pins?: Iterable<string> | string | undefined;
  /** Trust the CAs that Node trusts (see NODE_EXTRA_CA_CERTS and --use-openssl-ca), also with pins. */
  readonly systemStore?: boolean | undefined;
  /** The name to verify in the certificate, instead of the host. */
  readonly serverHostname?: string | undefined;
  /** Default timeout of calls in milliseconds; Infinity for none. 30,000 by default. */
  readonly timeoutMs?: number | undefined;
  /** Timeout of one connect attempt to an IP address until WELCOME, and of name resolution, in milliseconds. 10,000 by default. */
  readonly connectTimeoutMs?: number | undefined;
  /**
   * How long to wait for a server that is starting: while nothing listens at its address, the first attempt is repeated, and
   * a missing `caFile` may still be created. In milliseconds, 10,000 by default; 0 rejects at once.
   */
  readonly startTimeoutMs?: number | undefined;
  /**
   * The order in which several addresses are tried, and those of one name. "random" (the default) spreads clients over the
   * servers; "listed" prefers the first. The last one that worked is always first, those that failed lately are last.
   */
  readonly addressOrder?: "random" | "listed" | undefined;
  /** The folder of the file of hosts with an `sts` policy. ZCPROTO_HOME or ~/.zeroclaw by default. */
  readonly home?: string | undefined;
}

export interface ConnectOptions extends TrustedServerOptions {
  /** The user of the session; optional with a certificate. Without credentials only public methods work. */
  readonly user?: string | undefined;
  readonly key?: string | undefined;
  /** The device that opens the session, instead of user and key: a Device or its key file. */
  readonly device?: Device | string | undefined;
  /** The name under which the device was enrolled. */
  readonly deviceName?: string | undefined;
  /**
   * A login by a scheme of the server's application, instead of a key or a device: `{ scheme, ...fields }`, or a function that
   * returns or resolves to one for each session that is opened.
   */
  readonly login?: LoginSource | undefined;
  /** PEM file of the client certificate with its issuers, read for each connection. */
  readonly certificate?: string | undefined;
  /** Key file of the certificate, which only its owner can read. By default the key is in the certificate file. */
  readonly keyFile?: string | undefined;
  /** Passphrase of an encrypted key: a text, or a function that returns it. */
  readonly keyPassphrase?: Passphrase | undefined;
  /** False trusts any server. Refused for hosts with an `sts` policy. */
  readonly verify?: boolean | undefined;
  /** False opens no session on connect; call `openSession` later. */
  readonly session?: boolean | undefined;
  /** The client as `product/version`, listed by the server. */
  readonly client?: string | undefined;
  /** Called with each event of the server; without it events are queued in `client.events`. Its errors become warnings. */
  readonly onEvent?: ((event: ServerEvent) => unknown) | undefined;
  /**
   * Called with the client and where it is connected: once it has connected and opened its session, and again after each
   * reconnect. It is not awaited, and its errors become warnings of the process.
   */
  readonly onConnected?: OnConnected | undefined;
  /**
   * Connections to a server at once: 1 (the default) to 64. With more than 1, an extra one is made when calls wait because
   * the server's `max_streams` are in flight on all others, and closed after 30 s without a call.
   */
  readonly maxConnections?: number | undefined;
  /**
   * A file in which the positions of durable streams are kept, for one client at a time. After a restart `client.resume(id)` goes on
   * where the application has stopped. A position is written before the server learns it.
   */
  readonly positionsFile?: string | undefined;
  /** How many calls of the server are handled at once in a session. 16 by default. */
  readonly maxCalls?: number | undefined;
  /** Follows traces through calls, streams and handlers: `openTelemetry()` of `@zcproto/client/otel`. None by default. */
  readonly tracing?: Tracing | undefined;
  /** The largest frame accepted from the server, in bytes. 1 MiB by default. */
  readonly maxFrame?: number | undefined;
}

/**
 * Connect to the server at `host`, `host:port` or `[::1]:port`; the port is 7443 by default. Several addresses, as an array or
 * as one text with commas, are those of servers that share their sessions: the client connects to one of them, and to
 * another as soon as that is lost or goes away.
 *
 *     const client = await connect("host:7443", { user: "ada", key, caFile: "ca.crt" });
 *     console.log(await client.call("echo", { word: "hello" }));
 *     await client.close();
 *
 * Rejects with ConfigError for contradictory options, TlsError for a malformed pin and CertificateError for unusable files.
 * Waits for a server that is starting (`startTimeoutMs`). Any other error of the first attempt is not retried: CannotConnect,
 * TlsError, ConnectionClosed, or a CallError of `session.open`.
 */
export async function connect(address: string | readonly string[], options: ConnectOptions = {}): Promise<Client> {
  checkNode(process.versions.node);
  checkNames(options);
  const client = new Client(await settingsOf(address, options), options.onConnected);
  await client.open();
  return client;
}

/**
 * Enroll a device under a name with a code of `zcproto pair`, and return the user of the device.
 *
 *     const device = await Device.create("laptop.key");
 *     await enroll("host:7443", "7D9K-X2MP", device, "laptop", { caFile: "ca.crt" });
 *
 * From then on `connect(address, { device, deviceName: "laptop" })` opens sessions of that user. Rejects with
 * Unauthenticated for an invalid code, AlreadyExists for a name in use (the code stays valid), and like `connect`.
 */
export async function enroll(
  address: string | readonly string[],
  code: string,
  device: Device,
  name: string,
  options: TrustedServerOptions = {},
): Promise<string> {
  const client = await connect(address, { ...options, session: false });
  try {
    const params: Params = { code, public_key: device.publicKey, name };
    const { user } = await client.call<{ user: string }>("device.enroll", params);
    return user;
  } finally {
    await client.close();
  }
}

async function settingsOf(address: string | readonly string[], options: ConnectOptions): Promise<ClientSettings> {
  const { timeoutMs = DEFAULT_TIMEOUT_MS, connectTimeoutMs = CONNECT_TIMEOUT_MS, maxFrame = 1_048_576 } = options;
  const { startTimeoutMs = START_TIMEOUT_MS } = options;
  const { session = true, client = `zcproto-typescript/${VERSION}`, maxCalls = DEFAULT_MAX_CALLS } = options;
  const { addressOrder = "random", maxConnections = 1 } = options;
  const addresses = parseAddresses(address);
  if (addressOrder !== "random" && addressOrder !== "listed") {
    throw new ConfigError([`addressOrder: ${addressOrder} is unknown; give "random" or "listed"`]);
  }
  if (!(Number.isInteger(maxConnections) && maxConnections >= 1 && maxConnections <= MAX_CONNECTIONS)) {
    throw new ConfigError([
      `maxConnections: ${maxConnections} is out of range; give an integer from 1 to ${MAX_CONNECTIONS}`,
    ]);
  }
  checkNumbers({ timeoutMs, connectTimeoutMs, maxFrame, maxCalls });
  if (!(startTimeoutMs >= 0)) {
    throw new ConfigError([`startTimeoutMs: ${startTimeoutMs} is not a number of 0 or above`]);
  }
  const trust = new Trust({ ...options, onWarning: warnOnce });
  const credentials = await credentialsOf(options, options.certificate !== undefined);
  const clock = new MonotonicClock(systemClock);
  const home = options.home ?? (process.env["ZCPROTO_HOME"] || join(homedir(), ".zeroclaw"));
  const dialer = new Dialer({
    serverHostname: options.serverHostname === undefined ? undefined : parseAddress(options.serverHostname).host,
    trust,
    knownHosts: new KnownHosts(join(home, KNOWN_HOSTS_FILE)),
    clock,
    systemClock,
    connectTimeoutMs,
    maxFrame,
    toleranceMs: 30_000,
    onWarning: warnOnce,
  });
  return {
    addresses,
    resolve: (...address) => dialer.resolve(...address),
    dial: (...attempt) => dialer.dial(...attempt),
    isRandom: addressOrder === "random",
    maxConnections,
    credentials,
    credentialsOf: requireCredentials,
    opensSession: session && credentials !== undefined,
    timeoutMs,
    startTimeoutMs,
    client,
    maxCalls,
    tracing: options.tracing,
    onEvent: options.onEvent,
    onWarning: warnOnce,
    clock,
    random: Math.random,
    newRunId: () => randomBytes(RUN_ID_SIZE).toString("base64url"),
    positions: options.positionsFile === undefined ? undefined : await PositionFile.load(options.positionsFile),
  };
}

async function credentialsOf(options: SessionOptions, hasCertificate: boolean): Promise<Credentials | undefined> {
  const { user, key, deviceName, login } = options;
  const device = typeof options.device === "string" ? await Device.load(options.device) : options.device;
  return chooseCredentials({ user, key, hasCertificate, device, deviceName, login });
}

/** Return the credentials of another user. The certificate belongs to the connection, so it opens no other session. */
async function requireCredentials(options: SessionOptions): Promise<Credentials> {
  const credentials = await credentialsOf(options, false);
  if (credentials === undefined) {
    throw new ConfigError(["sessionFor: credentials are missing; give user and key, device and deviceName, or login"]);
  }
  return credentials;
}

/** Reject a version of Node.js that is too old. @internal */
export function checkNode(version: string): void {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  if (major < NODE[0] || (major === NODE[0] && minor < NODE[1])) {
    throw new ConfigError([`Node.js ${version} is too old; install ${NODE.join(".")} or later`]);
  }
}

const NAMES: readonly (keyof ConnectOptions)[] = [
  ...(["caFile", "pins", "systemStore", "serverHostname", "timeoutMs", "connectTimeoutMs", "startTimeoutMs"] as const),
  ...(["addressOrder", "home", "user", "key", "device", "deviceName", "login", "certificate", "keyFile"] as const),
  ...(["keyPassphrase", "verify", "session", "client", "onEvent", "onConnected", "maxConnections"] as const),
  ...(["positionsFile", "maxCalls", "tracing", "maxFrame"] as const),
];

/** Reject names that no option has, which programs without types would not notice. */
function checkNames(options: ConnectOptions): void {
  if (typeof options !== "object") {
    throw new ConfigError(['options: give an object; the port is part of the address, as in connect("host:7443")']);
  }
  for (const name of Object.keys(options)) {
    if (!(NAMES as readonly string[]).includes(name)) {
      const plain = (text: string) => text.replaceAll("_", "").toLowerCase();
      const meant = NAMES.find((known) => plain(known) === plain(name) || plain(known) === `${plain(name)}ms`);
      throw new ConfigError([
        `${name}: connect lacks this option; ${meant === undefined ? "see ConnectOptions" : `give ${meant}`}`,
      ]);
    }
  }
}

function checkNumbers(numbers: Record<string, number>): void {
  const faults = Object.entries(numbers)
    .filter(([, value]) => !(value > 0))
    .map(([name, value]) => `${name}: ${value} is not a number above 0`);
  if (faults.length > 0) {
    throw new ConfigError(faults);
  }
}

const warned = new Set<string>();

/** Emit each warning once per process. */
function warnOnce(message: string): void {
  if (!warned.has(message) && warned.size < MAX_WARNED) {
    warned.add(message);
    process.emitWarning(message, "ZcprotoWarning");
  }
}
