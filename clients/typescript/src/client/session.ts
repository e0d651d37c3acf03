/** A session as its client knows it, and what opens one. */

import { inspect } from "node:util";
import { Code, ConfigError, ProtocolError } from "../errors.js";
import { NO_TOKEN, TOKEN_SIZE, type Token, tokenOf, tokenToText } from "../wire/frame.js";
import { isInt, isMap, type Params } from "../wire/message.js";
import { attachMessage, type Channel, openMessage } from "./signed.js";

/** The part of a session's life after which it is refreshed ahead of its end, a quarter of the rest later at most. */
export const REFRESH_AT = 0.8;

/** What signs for a device. */
export interface Signer {
  sign(message: Uint8Array): Uint8Array;
}

/** What a client shows to open a session. */
export interface Credentials {
  readonly kind: "api_key" | "ed25519" | "tls";
  /** The params of `session.open` on this connection, but for `client`. */
  params(channel: Channel): Params;
}

/** A user's name and key. The key is in no inspection. */
export class ApiKey implements Credentials {
  readonly kind = "api_key";
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

/** The client certificate that each connection shows. `user` is whom it must name, if that is to be checked. */
export class Certificate implements Credentials {
  readonly kind = "tls";

  constructor(readonly user: string | undefined) {}

  params(): Params {
    return { scheme: "tls", user: this.user };
  }
}

/** A device that was enrolled under a name: it signs for each connection. */
export class DeviceKey implements Credentials {
  readonly kind = "ed25519";
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

  /** The params of `session.attach`. */
  attachParams(channel: Channel, token: Token): Params {
    return { signature: this.#signer.sign(attachMessage(channel, token)) };
  }
}

/**
 * What opens sessions: the device, the key, or without them the certificate; undefined if there is none of them. Throws
 * ConfigError for what does not go together.
 */
export function chooseCredentials({
  user,
  key,
  hasCertificate,
  device,
  deviceName,
}: {
  user?: string | undefined;
  key?: string | undefined;
  hasCertificate: boolean;
  device?: Signer | undefined;
  deviceName?: string | undefined;
}): Credentials | undefined {
  if (device !== undefined && deviceName !== undefined) {
    if (user !== undefined || key !== undefined) {
      throw new ConfigError(["device: it says whose sessions it opens; leave out user and key"]);
    }
    return new DeviceKey(device, deviceName);
  }
  if (device !== undefined) {
    throw new ConfigError(["device: give deviceName, the name under which it was enrolled, too"]);
  }
  if (deviceName !== undefined) {
    throw new ConfigError(["deviceName: give the device, or the file of its key, too"]);
  }
  if (key !== undefined) {
    if (user === undefined) {
      throw new ConfigError(["key: give its user, too"]);
    }
    return new ApiKey(user, key);
  }
  if (hasCertificate) {
    return new Certificate(user);
  }
  if (user !== undefined) {
    throw new ConfigError(["user: give its key, or a certificate"]);
  }
  return undefined;
}

interface Opened {
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
 * `idleTimeoutMs` is 0 if the session does not end for not being used. Its tokens are in no inspection and no JSON.
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
  readonly #refreshEnds: number;
  readonly #refreshAt: number;
  #refreshToken: Uint8Array | undefined;
  #ends: number;
  #goodUntil: number;

  /**
   * From the result of `session.open` or `session.refresh`. `serverWall` is the server's time; `now` is monotonic, as all
   * times below; `jitter` is from 0 to 1. Throws ProtocolError if the result is not as the contract says.
   *
   * @internal
   */
  constructor(result: unknown, { serverWall, now, jitter }: { serverWall: number; now: number; jitter: number }) {
    const opened = readOpened(result);
    this.id = opened.id;
    this.user = opened.user;
    this.expiresAt = opened.expiresAt;
    this.idleTimeoutMs = opened.idleTimeoutMs;
    this.refreshExpiresAt = opened.refreshExpiresAt;
    this.bound = opened.bound;
    this.#token = opened.token;
    this.#refreshToken = opened.refreshToken;
    const life = Math.max(0, this.expiresAt - serverWall);
    this.#ends = now + life;
    this.#idleMs = this.idleTimeoutMs > 0 ? this.idleTimeoutMs : Number.POSITIVE_INFINITY;
    this.#goodUntil = Math.min(this.#ends, now + this.#idleMs);
    this.#refreshEnds =
      this.refreshExpiresAt === undefined
        ? Number.POSITIVE_INFINITY
        : now + Math.max(0, this.refreshExpiresAt - serverWall);
    this.#refreshAt = now + life * (REFRESH_AT + ((1 - REFRESH_AT) / 4) * jitter);
  }

  /** The token as text: base64url without padding, as HTTP's `Authorization: Bearer` takes it. */
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

  /** Calls with the token may be sent before this time. @internal */
  get goodUntil(): number {
    return this.#goodUntil;
  }

  /** When to refresh it ahead of its end. @internal */
  get refreshAt(): number {
    return this.#refreshAt;
  }

  /** The server saw the token just now. @internal */
  used(now: number): void {
    this.#goodUntil = Math.min(this.#ends, now + this.#idleMs);
  }

  /** The server says that it is over. @internal */
  expire(): void {
    this.#goodUntil = this.#ends = Number.NEGATIVE_INFINITY;
  }

  /** @internal */
  canRefresh(now: number): boolean {
    return this.#refreshToken !== undefined && now < this.#refreshEnds;
  }

  /** It may be spent: used a second time, it would end the whole family of tokens. @internal */
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

function readOpened(result: unknown): Opened {
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
  throw new ProtocolError(Code.PROTOCOL_ERROR, "the server's answer to session.open is not as it must be");
}

function isToken(value: unknown): value is Uint8Array {
  return value instanceof Uint8Array && value.length === TOKEN_SIZE;
}
