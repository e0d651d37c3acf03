/** Sessions as seen by their client, and the credentials that open them. */

import { inspect } from "node:util";
import { Code, ConfigError, LoginError, ProtocolError } from "../errors.js";
import { encodeBody, MessageError } from "../wire/body.js";
import { NO_TOKEN, TOKEN_SIZE, type Token, tokenOf, tokenToText } from "../wire/frame.js";
import { isInt, isMap, type Params } from "../wire/message.js";
import { attachMessage, type Channel, openMessage } from "./signing.js";

/** The fraction of a session's lifetime after which it is refreshed, plus jitter of at most a quarter of the rest. */
export const REFRESH_AT = 0.8;

/** How long after its first use a refresh token can be sent again: half of the server's default grace period. */
export const REFRESH_GRACE_MS = 5_000;

/** Signs with the key of a device. */
export interface Signer {
  sign(message: Uint8Array): Uint8Array;
}

/** Credentials that open a session. */
export interface Credentials {
  readonly kind: "api_key" | "ed25519" | "tls" | "login";
  /** Whether they can open a session in place of one that belongs to another certificate. */
  readonly canReopen: boolean;
  /** Return the params of `session.open` on this connection, without `client`. */
  params(channel: Channel): Params;
}

/** A user's name and API key. The key is hidden from inspection. */
export class ApiKey implements Credentials {
  readonly kind = "api_key";
  readonly canReopen = false;
  readonly #key: string;

  constructor(
    readonly user: string,
    key: string,
  ) {
    this.#key = key;
  }

  params(): Params {
    return { scheme: "api_key", user: this.user, key: this.#key };
  }
}

/** The client certificate. If `user` is given, the certificate must be issued to that user. */
export class Certificate implements Credentials {
  readonly kind = "tls";
  readonly canReopen = true;

  constructor(readonly user: string | undefined) {}

  params(): Params {
    return { scheme: "tls", user: this.user };
  }
}

/** An enrolled device, which signs for each connection. */
export class DeviceKey implements Credentials {
  readonly kind = "ed25519";
  readonly canReopen = false;
  readonly #signer: Signer;

  constructor(
    signer: Signer,
    readonly name: string,
  ) {
    this.#signer = signer;
  }

  params(channel: Channel): Params {
    const signature = this.#signer.sign(openMessage(channel, this.name));
    return { scheme: "ed25519", device: this.name, signature };
  }

  /** Return the params of `session.attach`. */
  attachParams(channel: Channel, token: Token): Params {
    return { signature: this.#signer.sign(attachMessage(channel, token)) };
  }
}

/** How long a login that a function has returned can wait for a connection: a ticket may be short-lived. */
export const LOGIN_HOLDS_MS = 10_000;

/** A login by a scheme of the application: the params of `session.open`. */
export type LoginParams = Params & { readonly scheme: string };

/** A login, or a function that returns another one for each session. */
export type LoginSource = LoginParams | (() => LoginParams | Promise<LoginParams>);

/**
 * A login by a scheme of the application, hidden from inspection. A function is called for each `session.open`: `fetch` it first.
 * Throws ConfigError for a login that cannot be sent.
 */
export class SchemeLogin implements Credentials {
  readonly kind = "login";
  readonly canReopen = true;
  readonly #source: LoginSource;
  #fetched: LoginParams | undefined;
  #holdsUntil = Number.NEGATIVE_INFINITY;
  #isFetching = false;

  constructor(source: LoginSource) {
    this.#source = source;
    if (typeof source !== "function") {
      const fault = loginFault(source);
      if (fault !== undefined) {
        throw new ConfigError([`login: ${fault}`]);
      }
      this.#fetched = source;
      this.#holdsUntil = Number.POSITIVE_INFINITY;
    }
  }

  /** Why opening a session takes its time, if this is the reason. */
  get problem(): string | undefined {
    return this.#isFetching ? "the function given as login has not returned" : undefined;
  }

  /** Return whether `params` can be called. A login that waited too long for a connection is discarded. */
  isFetched(now: number): boolean {
    return now < this.#holdsUntil;
  }

  /** Call the function. Rejects with LoginError. */
  async fetch(now: () => number): Promise<void> {
    let login: LoginParams;
    this.#isFetching = true;
    try {
      login = await (this.#source as () => LoginParams | Promise<LoginParams>)();
    } catch (error) {
      const what = error instanceof Error ? error.name : typeof error;
      throw new LoginError(`login: the function rejected with ${what}; see the cause`, { cause: error });
    } finally {
      this.#isFetching = false;
    }
    const fault = loginFault(login);
    if (fault !== undefined) {
      throw new LoginError(`login: the function returned what cannot be sent: ${fault}`);
    }
    this.#fetched = login;
    this.#holdsUntil = now() + LOGIN_HOLDS_MS;
  }

  params(): Params {
    if (typeof this.#source === "function") {
      this.#holdsUntil = Number.NEGATIVE_INFINITY; // each login is sent once
    }
    return { ...this.#fetched };
  }
}

/** Return why a login cannot be sent, without its values, if it cannot. */
function loginFault(login: unknown): string | undefined {
  if (!isMap(login)) {
    return "give an object with `scheme` and its fields";
  }
  if (typeof login["scheme"] !== "string") {
    return "`scheme` is missing; give the name of the server's scheme";
  }
  if (login["client"] !== undefined) {
    return "`client` is the product and version of the client; give it to connect";
  }
  try {
    encodeBody(login);
  } catch (error) {
    if (error instanceof MessageError) {
      return error.message;
    }
    throw error;
  }
  return undefined;
}

/** Return the text of an API key. Throws ConfigError for another value, such as the path of its file. */
function usableKey(key: unknown): string {
  if (typeof key !== "string") {
    throw new ConfigError(["key: it is a string; read the file of the key as text"]);
  }
  if (/[/\\]|\.(?:key|txt|pem)$/.test(key)) {
    throw new ConfigError(['key: this is the path of a file; give its text, as in readFileSync(path, "utf8")']);
  }
  return key.trim();
}

/**
 * Choose the credentials: the login, the device, the API key, or else the certificate. Returns undefined without credentials.
 * Throws ConfigError for contradictory options.
 */
export function chooseCredentials({
  user,
  key,
  hasCertificate,
  device,
  deviceName,
  login,
}: {
  user?: string | undefined;
  key?: string | undefined;
  hasCertificate: boolean;
  device?: Signer | undefined;
  deviceName?: string | undefined;
  login?: LoginSource | undefined;
}): Credentials | undefined {
  if (login !== undefined) {
    if ([user, key, device, deviceName].some((other) => other !== undefined)) {
      throw new ConfigError(["login: its fields name the user; leave out user, key, device and deviceName"]);
    }
    return new SchemeLogin(login);
  }
  if (device !== undefined && deviceName !== undefined) {
    if (user !== undefined || key !== undefined) {
      throw new ConfigError(["device: the device determines the user; leave out user and key"]);
    }
    return new DeviceKey(device, deviceName);
  }
  if (device !== undefined) {
    throw new ConfigError(["device: deviceName is missing; give the name under which the device was enrolled"]);
  }
  if (deviceName !== undefined) {
    throw new ConfigError(["deviceName: device is missing; give the device or its key file"]);
  }
  if (key !== undefined) {
    if (user === undefined) {
      throw new ConfigError(["key: user is missing; give the user of the key"]);
    }
    return new ApiKey(user, usableKey(key));
  }
  if (hasCertificate) {
    return new Certificate(user);
  }
  if (user !== undefined) {
    throw new ConfigError(["user: credentials are missing; give a key or a certificate"]);
  }
  return undefined;
}

interface OpenResult {
  readonly token: Token;
  readonly id: string;
  readonly user: string;
  readonly expiresAt: number;
  readonly idleTimeoutMs: number;
  readonly refreshToken: Uint8Array | undefined;
  readonly refreshExpiresAt: number | undefined;
  readonly bound: boolean;
}

/**
 * An open session.
 *
 * `id` is public; `expiresAt` and `refreshExpiresAt` are milliseconds since the Unix epoch by the server's clock;
 * `idleTimeoutMs` is 0 without an idle timeout. Its tokens are hidden from inspection and JSON.
 */
export class ClientSession {
  readonly id: string;
  readonly user: string;
  readonly expiresAt: number;
  readonly idleTimeoutMs: number;
  readonly refreshExpiresAt: number | undefined;
  readonly bound: boolean;
  readonly #token: Token;
  readonly #idleMs: number;
  #refreshEndsAt: number;
  readonly #refreshAt: number;
  #refreshToken: Uint8Array | undefined;
  #endsAt: number;
  #usableUntil: number;

  /**
   * Make a session from the result of `session.open` or `session.refresh`. `serverWall` is the server's time, `now` and all
   * times below are monotonic, `jitter` is from 0 to 1. Throws ProtocolError for an invalid result.
   *
   * @internal
   */
  constructor(result: unknown, { serverWall, now, jitter }: { serverWall: number; now: number; jitter: number }) {
    const opened = parseOpenResult(result);
    this.id = opened.id;
    this.user = opened.user;
    this.expiresAt = opened.expiresAt;
    this.idleTimeoutMs = opened.idleTimeoutMs;
    this.refreshExpiresAt = opened.refreshExpiresAt;
    this.bound = opened.bound;
    this.#token = opened.token;
    this.#refreshToken = opened.refreshToken;
    const life = Math.max(0, this.expiresAt - serverWall);
    this.#endsAt = now + life;
    this.#idleMs = this.idleTimeoutMs > 0 ? this.idleTimeoutMs : Number.POSITIVE_INFINITY;
    this.#usableUntil = Math.min(this.#endsAt, now + this.#idleMs);
    this.#refreshEndsAt =
      this.refreshExpiresAt === undefined
        ? Number.POSITIVE_INFINITY
        : now + Math.max(0, this.refreshExpiresAt - serverWall);
    this.#refreshAt = now + life * (REFRESH_AT + ((1 - REFRESH_AT) / 4) * jitter);
  }

  /** The token in base64url without padding, as in HTTP's `Authorization: Bearer`. */
  get token(): string {
    return tokenToText(this.#token);
  }

  /** @internal */
  get tokenBytes(): Token {
    return this.#token;
  }

  /** @internal */
  get refreshTokenBytes(): Uint8Array | undefined {
    return this.#refreshToken;
  }

  /** The time until which the token can be used. @internal */
  get usableUntil(): number {
    return this.#usableUntil;
  }

  /** When to refresh the session. @internal */
  get refreshAt(): number {
    return this.#refreshAt;
  }

  /** Record that the token was used, which restarts the idle timeout. @internal */
  touch(now: number): void {
    this.#usableUntil = Math.min(this.#endsAt, now + this.#idleMs);
  }

  /** Mark the token as expired. @internal */
  expire(): void {
    this.#usableUntil = this.#endsAt = Number.NEGATIVE_INFINITY;
  }

  /** @internal */
  canRefresh(now: number): boolean {
    return this.#refreshToken !== undefined && now < this.#refreshEndsAt;
  }

  /** Limit further uses of the refresh token to the grace, since the response to one sent then was lost. @internal */
  markRefreshLost(sentAt: number): void {
    this.#refreshEndsAt = Math.min(this.#refreshEndsAt, sentAt + REFRESH_GRACE_MS);
  }

  /** Forget a refresh token that may have been used: the server ends a session when one is used twice. @internal */
  dropRefreshToken(): void {
    this.#refreshToken = undefined;
  }

  toJSON(): object {
    const { id, user, expiresAt, idleTimeoutMs, refreshExpiresAt, bound } = this;
    return { id, user, expiresAt, idleTimeoutMs, refreshExpiresAt, bound };
  }

  [inspect.custom](): string {
    return `ClientSession(${inspect(this.toJSON())})`;
  }
}

function parseOpenResult(result: unknown): OpenResult {
  const fields = isMap(result) ? result : {};
  const { token, id, user, bound } = fields;
  const [expiresAt, idleTimeoutMs] = [fields["expires_at"], fields["idle_timeout_ms"]];
  const refreshToken = fields["refresh_token"] ?? undefined;
  const refreshExpiresAt = fields["refresh_expires_at"] ?? undefined;
  if (
    isToken(token) &&
    typeof id === "string" &&
    typeof user === "string" &&
    isInt(expiresAt) &&
    isInt(idleTimeoutMs) &&
    typeof bound === "boolean" &&
    (refreshToken === undefined || isToken(refreshToken)) &&
    (refreshExpiresAt === undefined || isInt(refreshExpiresAt)) &&
    tokenOf(token) !== NO_TOKEN
  ) {
    return {
      token: tokenOf(token),
      id,
      user,
      expiresAt: Number(expiresAt),
      idleTimeoutMs: Number(idleTimeoutMs),
      refreshToken,
      refreshExpiresAt: refreshExpiresAt === undefined ? undefined : Number(refreshExpiresAt),
      bound,
    };
  }
  throw new ProtocolError(Code.PROTOCOL_ERROR, "the server's response to session.open is invalid");
}

function isToken(value: unknown): value is Uint8Array {
  return value instanceof Uint8Array && value.length === TOKEN_SIZE;
}
