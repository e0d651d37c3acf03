/** `connect`: the way to a server; `enroll`: how a device becomes known to one. */

import { homedir } from "node:os";
import { join } from "node:path";
import { parseAddress } from "./client/address.js";
import { Client, type ClientSettings, DEFAULT_TIMEOUT_MS } from "./client/client.js";
import { SteadyClock, systemClock } from "./client/clock.js";
import type { ServerEvent } from "./client/event_stream.js";
import { chooseCredentials } from "./client/session.js";
import { Device } from "./edge/device.js";
import { Dialer } from "./edge/dial.js";
import { KnownHosts } from "./edge/known_hosts.js";
import { type Passphrase, Trust } from "./edge/trust.js";
import { ConfigError } from "./errors.js";
import { VERSION } from "./version.js";
import type { Params } from "./wire/message.js";

/** For one attempt to connect, from the name to the server's WELCOME. */
export const CONNECT_TIMEOUT_MS = 10_000;

const KNOWN_HOSTS_FILE = "known_hosts.json";
const MAX_WARNED = 64;

/** Which server is believed, and how to find it. */
export interface TrustedServerOptions {
  /** The file of the CA whose certificates are believed; without it and pins, those that Node trusts. */
  readonly caFile?: string | undefined;
  /**
   * `sha256/BASE64` of the server's public key (several: the ones to come), or `cert-sha256/...`, as a list, or as one
   * text between commas or white space. With `caFile` or `systemStore` on top of it, else in its place: then dates and
   * name of the certificate are still checked.
   */
  readonly pins?: Iterable<string> | string | undefined;
  /** Believe the CAs that Node trusts (its own list; see NODE_EXTRA_CA_CERTS and --use-openssl-ca), with pins too. */
  readonly systemStore?: boolean | undefined;
  /** The name that the certificate must be for, if not the host's. */
  readonly serverHostname?: string | undefined;
  /** Milliseconds for a call, unless it says another; Infinity waits for ever. 30,000 by default. */
  readonly timeoutMs?: number | undefined;
  /** Milliseconds for one attempt to connect. 10,000 by default. */
  readonly connectTimeoutMs?: number | undefined;
  /** The folder where hosts with an `sts` policy are remembered; ZCPROTO_HOME, else ~/.zeroclaw, by default. */
  readonly home?: string | undefined;
}

export interface ConnectOptions extends TrustedServerOptions {
  /** Whose session is opened; with a certificate it may be left out. Without credentials only public methods work. */
  readonly user?: string | undefined;
  readonly key?: string | undefined;
  /** Whose key opens the session, in place of user and key: a Device, or the file of its key. */
  readonly device?: Device | string | undefined;
  /** The name under which the device was enrolled. */
  readonly deviceName?: string | undefined;
  /** PEM file of this client's certificate, with its issuers; read again for each connection. */
  readonly certificate?: string | undefined;
  /** Its key, which must be its owner's alone; without it the key is in the same file. */
  readonly keyFile?: string | undefined;
  /** Of an encrypted key: a text, or a function that returns it. */
  readonly keyPassphrase?: Passphrase | undefined;
  /** False believes any server. Refused for hosts that were seen with an `sts` policy. */
  readonly verify?: boolean | undefined;
  /** False opens no session at connecting; `openSession` does later. */
  readonly session?: boolean | undefined;
  /** product/version, as the server lists it. */
  readonly client?: string | undefined;
  /** Called with each event that the server sends; without it they wait in `client.events`. */
  readonly onEvent?: ((event: ServerEvent) => void) | undefined;
  /** The largest frame accepted from the server, in bytes. 1 MiB by default. */
  readonly maxFrame?: number | undefined;
}

/**
 * A client of the server at `host`, `host:port` or `[::1]:port`; the port is 7443 by default.
 *
 *     const client = await connect("host:7443", { user: "ada", key, caFile: "ca.crt" });
 *     console.log(await client.call("echo", { word: "hello" }));
 *     await client.close();
 *
 * Rejects with ConfigError for what cannot be meant, TlsError for a malformed pin, CertificateError for files that cannot
 * be used, and at the first attempt with CannotConnect, TlsError, ConnectionClosed, and the CallErrors of `session.open`.
 */
export async function connect(address: string, options: ConnectOptions = {}): Promise<Client> {
  const client = new Client(await settingsOf(address, options));
  await client.open();
  return client;
}

/**
 * Trade a code of `zcproto pair` for a device that the server knows by `name`; resolves to the user whose device it is.
 *
 *     const device = await Device.create("laptop.key");
 *     await enroll("host:7443", "7D9K-X2MP", device, "laptop", { caFile: "ca.crt" });
 *
 * From then on `connect(address, { device, deviceName: "laptop" })` opens sessions of that user. Rejects with
 * Unauthenticated for a code that is not good, AlreadyExists for a name that is taken (the code stays good), and what
 * connecting rejects with.
 */
export async function enroll(
  address: string,
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

async function settingsOf(address: string, options: ConnectOptions): Promise<ClientSettings> {
  const { device, timeoutMs = DEFAULT_TIMEOUT_MS, connectTimeoutMs = CONNECT_TIMEOUT_MS } = options;
  const { session = true, client = `zcproto-typescript/${VERSION}`, maxFrame = 1_048_576 } = options;
  const parsed = parseAddress(address);
  checkNumbers({ timeoutMs, connectTimeoutMs, maxFrame });
  const trust = new Trust({ ...options, onWarning: warnOnce });
  const credentials = chooseCredentials({
    user: options.user,
    key: options.key,
    hasCertificate: options.certificate !== undefined,
    device: typeof device === "string" ? await Device.load(device) : device,
    deviceName: options.deviceName,
  });
  const clock = new SteadyClock(systemClock);
  const home = options.home ?? (process.env["ZCPROTO_HOME"] || join(homedir(), ".zeroclaw"));
  const dialer = new Dialer({
    address: parsed,
    serverHostname: options.serverHostname === undefined ? parsed.host : parseAddress(options.serverHostname).host,
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
    address: parsed,
    dial: (owner, signal) => dialer.dial(owner, signal),
    credentials,
    opensSession: session && credentials !== undefined,
    timeoutMs,
    client,
    onEvent: options.onEvent,
    clock,
    random: Math.random,
  };
}

function checkNumbers(numbers: Record<string, number>): void {
  const faults = Object.entries(numbers)
    .filter(([, value]) => !(value > 0))
    .map(([name, value]) => `${name}: ${value} is not above 0`);
  if (faults.length > 0) {
    throw new ConfigError(faults);
  }
}

const warned = new Set<string>();

/** Once for each text: a client that is made again and again need not say it each time. */
function warnOnce(message: string): void {
  if (!warned.has(message) && warned.size < MAX_WARNED) {
    warned.add(message);
    process.emitWarning(message, "ZcprotoWarning");
  }
}
