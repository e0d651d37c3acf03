/** A clock that tests advance, and a server in memory that they script. */

import assert from "node:assert/strict";
import type { Endpoint } from "../../src/client/address.js";
import { Client, type OnConnected } from "../../src/client/client.js";
import type { Clock, Timer } from "../../src/client/clock.js";
import { ConnectionDriver, type ConnectionListener, type Transport } from "../../src/client/connection_driver.js";
import { ApiKey } from "../../src/client/session.js";
import type { ClientSettings } from "../../src/client/types.js";
import { ClientConnection } from "../../src/connection/connection.js";
import { Code, type TlsError } from "../../src/errors.js";
import { decodeBody, encodeBody } from "../../src/wire/body.js";
import { FrameDecoder } from "../../src/wire/decoder.js";
import { acceptedBy, encodeFrame, type Frame, Kind, NO_TOKEN, type Token } from "../../src/wire/frame.js";
import type { Meta } from "../../src/wire/message.js";

/** Settings of a client of a FakeServer that differ from the usual ones. */
export type FakeSettings = Partial<ClientSettings> & { readonly onConnected?: OnConnected };

/** 2026-01-01T00:00:00Z. */
export const WALL = 1_767_225_600_000;

export class FakeClock implements Clock {
  ms = 0;
  #timers: { readonly at: number; readonly then: () => void }[] = [];

  wall(): number {
    return WALL + Math.floor(this.ms);
  }

  now(): number {
    return this.ms;
  }

  after(ms: number, then: () => void): Timer {
    const entry = { at: this.ms + Math.max(ms, 0), then };
    this.#timers.push(entry);
    return {
      cancel: () => {
        this.#timers = this.#timers.filter((other) => other !== entry);
      },
    };
  }

  /** The number of pending timers. */
  get pendingTimers(): number {
    return this.#timers.length;
  }

  /** Advance the time, running each timer and everything that follows from it. */
  async advance(ms: number): Promise<void> {
    const end = this.ms + ms;
    await settled();
    for (;;) {
      const [next] = this.#timers.filter(({ at }) => at <= end).sort((a, b) => a.at - b.at);
      if (next === undefined) {
        break;
      }
      this.ms = Math.max(this.ms, next.at);
      this.#timers = this.#timers.filter((timer) => timer !== next);
      next.then();
      await settled();
    }
    this.ms = end;
    await settled();
  }
}

/** Wait until all pending callbacks have run. */
export async function settled(): Promise<void> {
  for (let turn = 0; turn < 4; turn++) {
    await new Promise((resolve) => setImmediate(resolve));
  }
}

export interface Request {
  readonly stream: number;
  readonly token: Token;
  readonly method: string;
  readonly params: Readonly<Record<string, unknown>>;
  readonly meta: Meta;
  readonly connection: FakeConnection;
}

export const WELCOME = {
  server: "fake",
  versions: [1],
  max_frame: 1_048_576,
  max_streams: 128,
  idle_timeout_ms: 0,
  tolerance_ms: 30_000,
  sts: { max_age: 0, include_subdomains: false },
};

/** WELCOME of a server with streams and calls. */
export const STREAMING = { ...WELCOME, streams: { max_open: 64, max_item: 65_536 }, calls: { max: 32 } };

export const KEY = "c3RhbmRzIGZvciBhIGtleSBvZiAzMiBieXRlcy4uLi4";

/** Return the bytes of a test token. */
export function tokenNumber(number: number): Uint8Array {
  return new Uint8Array(32).fill(number);
}

export function tokenText(number: number): Token {
  return String.fromCharCode(number).repeat(32);
}

/** Return a result of `session.open`. */
export function opened(number: number, more: object = {}): Record<string, unknown> {
  return {
    token: tokenNumber(number),
    id: `s-${number}`,
    user: "ada",
    expires_at: WALL + 3_600_000,
    idle_timeout_ms: 0,
    refresh_token: null,
    refresh_expires_at: null,
    bound: false,
    ...more,
  };
}

/** The server's end of one connection. */
export class FakeConnection implements Transport {
  readonly leaf = Buffer.alloc(32, 7);
  readonly driver: ConnectionDriver;
  readonly frames: Frame[] = [];
  unsentBytes = 0;
  isClosed = false;
  isAborted = false;
  isReading = true;
  /** Whether it answers nothing, not even PING. */
  isFrozen = false;
  /** Whether `close` of the client ends the connection; otherwise a test calls `end`. */
  endsOnClose = true;
  #counter = -1n;
  #gathered: Buffer[] | undefined;
  readonly #decoder = new FrameDecoder("server", 2 ** 32 - 1);
  readonly #server: FakeServer;
  readonly #salt: bigint;

  constructor(server: FakeServer, listener: ConnectionListener, salt: bigint, endpoint: Endpoint) {
    this.#server = server;
    this.#salt = salt;
    this.driver = new ConnectionDriver(listener, server.clock, new ClientConnection(), endpoint);
    this.driver.connectionMade(this);
    this.#decoder.accepted = acceptedBy("server", ["streams", "calls"]);
  }

  /** Take the frames of some kinds that were received so far. */
  take(...kinds: Kind[]): Frame[] {
    const taken = this.frames.filter(({ kind }) => kinds.includes(kind));
    this.frames.splice(0, this.frames.length, ...this.frames.filter((frame) => !taken.includes(frame)));
    return taken;
  }

  /** Send a frame. */
  send(
    kind: Kind,
    stream: number,
    body?: unknown,
    { token = NO_TOKEN, off = 0 }: { token?: Token; off?: number } = {},
  ) {
    const bytes = body === undefined ? Buffer.alloc(0) : Buffer.from(encodeBody(body));
    this.sendBytes(kind, stream, bytes, token, off);
  }

  /** Send a frame with any body. */
  sendBytes(kind: Kind, stream: number, body: Buffer, token: Token, off = 0): void {
    this.#counter += 1n;
    const time = BigInt(this.#server.clock.wall() + this.#server.clockAheadMs + off);
    const frame = encodeFrame(kind, stream, time, this.#salt, this.#counter, token, body);
    if (this.#gathered === undefined) {
      this.driver.dataReceived(frame);
    } else {
      this.#gathered.push(frame);
    }
  }

  /** Send all frames of a step in one read. */
  together(step: () => void): void {
    this.#gathered = [];
    step();
    const data = Buffer.concat(this.#gathered);
    this.#gathered = undefined;
    this.driver.dataReceived(data);
  }

  respond({ stream, token }: Request, value: unknown): void {
    this.send(Kind.RESPONSE, stream, value, { token });
  }

  fail({ stream, token }: Request, code: number, details: object = {}, message = "because"): void {
    this.send(Kind.ERROR, stream, [code, message, details], { token });
  }

  goAway(reason = "draining", retryAfterMs = 0): void {
    this.send(Kind.GOAWAY, 0, { reason, retry_after_ms: retryAfterMs });
  }

  /** End the connection, by close_notify if there is no error. */
  end(error?: TlsError): void {
    if (!this.isClosed) {
      this.isClosed = true;
      this.driver.connectionLost(error);
    }
  }

  write(data: Buffer): void {
    this.unsentBytes += data.length;
    setImmediate(() => {
      this.unsentBytes -= data.length;
    });
    this.#decoder.feed(data);
    for (let frame = this.#decoder.next(); frame !== undefined; frame = this.#decoder.next()) {
      this.frames.push(frame);
      if (frame.kind === Kind.REQUEST || frame.kind === Kind.OPEN) {
        const [method, params, meta = {}] = decodeBody(frame.body) as [
          string,
          Request["params"] | null,
          Meta | undefined,
        ];
        const { stream, token } = frame;
        const request = { stream, token, method, params: params ?? {}, meta, connection: this };
        if (frame.kind === Kind.OPEN) {
          this.#server.streams.push(request);
        } else if (!this.isFrozen) {
          setImmediate(() => this.#server.handle(request));
        }
      } else if (frame.kind === Kind.PING && !this.isFrozen) {
        setImmediate(() => this.send(Kind.PONG, 0));
      } else if (frame.kind === Kind.CANCEL) {
        this.#server.cancelled.push(frame.stream);
      }
    }
  }

  pauseReading(): void {
    this.isReading = false;
  }

  resumeReading(): void {
    this.isReading = true;
  }

  close(): void {
    if (this.endsOnClose) {
      setImmediate(() => this.end());
    }
  }

  abort(): void {
    this.isAborted = true;
    setImmediate(() => this.end());
  }
}

type Handler = (request: Request) => unknown;
/** Returned by a handler that sends no response, or its own. */
export const NO_RESPONSE = Symbol("no response");

export class Failure {
  constructor(
    readonly code: number,
    readonly details: object = {},
  ) {}
}

export class FakeServer {
  readonly clock = new FakeClock();
  readonly requests: Request[] = [];
  /** The OPENs so far, which a test answers. */
  readonly streams: Request[] = [];
  readonly cancelled: number[] = [];
  readonly connections: FakeConnection[] = [];
  /** Warnings of clients. */
  readonly warnings: string[] = [];
  nextRun = 1;
  /** How far the server's clock is ahead of the client's. */
  clockAheadMs = 0;
  /** Errors of the next connect attempts. */
  connectErrors: Error[] = [];
  welcome: object = WELCOME;
  /** Called after WELCOME was sent on a new connection. */
  onConnection: (connection: FakeConnection) => void = () => undefined;
  readonly #handlers = new Map<string, Handler>();
  #opened = 0;

  constructor() {
    this.on("echo", ({ params }) => params);
    this.on("session.open", () => opened(++this.#opened));
    this.on("session.info", () => ({}));
    this.on("session.close", () => ({}));
    this.on("session.handle", () => ({}));
  }

  get last(): FakeConnection {
    return this.connections.at(-1) as FakeConnection;
  }

  /** The methods requested so far. */
  get methods(): string[] {
    return this.requests.map(({ method }) => method);
  }

  on(method: string, handler: Handler): void {
    this.#handlers.set(method, handler);
  }

  /** Give responses in order, and repeat the last one. */
  script(method: string, ...responses: (unknown | Failure)[]): void {
    const left = [...responses];
    this.on(method, (request) => {
      const response = left.length > 1 ? left.shift() : left[0];
      return typeof response === "function" ? (response as Handler)(request) : response;
    });
  }

  handle(request: Request): void {
    this.requests.push(request);
    if (request.connection.isClosed) {
      return;
    }
    const handler = this.#handlers.get(request.method);
    const response = handler === undefined ? new Failure(Code.UNIMPLEMENTED) : handler(request);
    if (response instanceof Failure) {
      request.connection.fail(request, response.code, response.details);
    } else if (response !== NO_RESPONSE) {
      request.connection.respond(request, response);
    }
  }

  readonly dial = async (listener: ConnectionListener, endpoint: Endpoint): Promise<ConnectionDriver> => {
    const error = this.connectErrors.shift();
    if (error !== undefined) {
      throw error;
    }
    const connection = new FakeConnection(this, listener, BigInt(1000 + this.connections.length), endpoint);
    this.connections.push(connection);
    connection.send(Kind.WELCOME, 0, this.welcome);
    this.onConnection(connection);
    await connection.driver.welcomed;
    return connection.driver;
  };

  client({ onConnected, ...more }: FakeSettings = {}): Client {
    const settings: ClientSettings = {
      addresses: [{ host: "fake", port: 7443 }],
      resolve: () => Promise.resolve(["192.0.2.1"]),
      dial: this.dial,
      isRandom: true,
      maxConnections: 1,
      credentials: new ApiKey("ada", KEY),
      opensSession: true,
      startTimeoutMs: 0,
      timeoutMs: 30_000,
      client: "test/1",
      maxCalls: 32,
      tracing: undefined,
      credentialsOf: ({ user = "", key = "" }) => Promise.resolve(new ApiKey(user, key)),
      onEvent: undefined,
      onWarning: (message) => this.warnings.push(message),
      clock: this.clock,
      random: () => 0.5,
      newRunId: () => `run-${this.nextRun++}`,
      positions: undefined,
      ...more,
    };
    return new Client(settings, onConnected);
  }

  /** Return a connected client. */
  async connect(more: FakeSettings = {}): Promise<Client> {
    const client = this.client(more);
    await client.open();
    await settled();
    return client;
  }

  /** Close a client, and check that no timer and no connection is left. */
  async closed(client: Client): Promise<void> {
    const closed = watch(client.close());
    await this.clock.advance(5_000);
    assert.ok(closed.isDone, "close() settles");
    assert.equal(this.clock.pendingTimers, 0, "timers left behind");
    assert.ok(
      this.connections.every(({ isClosed }) => isClosed),
      "connections left behind",
    );
  }
}

/** Record the outcome of a promise without awaiting it. */
export function watch<T>(promise: Promise<T>): { value?: T; error?: unknown; isDone: boolean } {
  const outcome: { value?: T; error?: unknown; isDone: boolean } = { isDone: false };
  promise.then(
    (value) => Object.assign(outcome, { value, isDone: true }),
    (error: unknown) => Object.assign(outcome, { error, isDone: true }),
  );
  return outcome;
}
