/** Time that is turned by hand, and a server in memory that says what a test wants. */

import type { ClientSettings } from "../../src/client/client.js";
import { Client } from "../../src/client/client.js";
import type { Clock, Timer } from "../../src/client/clock.js";
import { Link, type Owner, type Transport } from "../../src/client/link.js";
import { ApiKey } from "../../src/client/session.js";
import { ClientConnection } from "../../src/connection/connection.js";
import { Code, type TlsError } from "../../src/errors.js";
import { decodeBody, encodeBody } from "../../src/wire/body.js";
import { FrameDecoder } from "../../src/wire/decoder.js";
import { encodeFrame, type Frame, Kind, NO_TOKEN, type Token } from "../../src/wire/frame.js";
import type { Meta, Params } from "../../src/wire/message.js";

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

  /** How many timers wait. */
  get waiting(): number {
    return this.#timers.length;
  }

  /** Let time go by, timer by timer, with all that follows from each. */
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

/** All that can run now has run. */
export async function settled(): Promise<void> {
  for (let turn = 0; turn < 4; turn++) {
    await new Promise((resolve) => setImmediate(resolve));
  }
}

export interface Request {
  readonly stream: number;
  readonly token: Token;
  readonly method: string;
  readonly params: Params;
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

export const KEY = "c3RhbmRzIGZvciBhIGtleSBvZiAzMiBieXRlcy4uLi4";

/** Bytes of which tokens are made in tests. */
export function tokenNumber(number: number): Uint8Array {
  return new Uint8Array(32).fill(number);
}

export function tokenText(number: number): Token {
  return String.fromCharCode(number).repeat(32);
}

/** The result of `session.open`. */
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

/** One connection, from the server's end. */
export class FakeConnection implements Transport {
  readonly leaf = Buffer.alloc(32, 7);
  readonly link: Link;
  readonly frames: Frame[] = [];
  isClosed = false;
  isAborted = false;
  /** Whether the end of the connection takes what it is told to: else it ends by `lose`. */
  endsAtOnce = true;
  #counter = -1n;
  readonly #decoder = new FrameDecoder("server", 2 ** 32 - 1);
  readonly #server: FakeServer;
  readonly #salt: bigint;

  constructor(server: FakeServer, owner: Owner, salt: bigint) {
    this.#server = server;
    this.#salt = salt;
    this.link = new Link(owner, server.clock, new ClientConnection());
    this.link.connectionMade(this);
  }

  /** Say something as it is. */
  say(kind: Kind, stream: number, body?: unknown, { token = NO_TOKEN, off = 0 }: { token?: Token; off?: number } = {}) {
    this.#counter += 1n;
    const bytes = body === undefined ? Buffer.alloc(0) : Buffer.from(encodeBody(body));
    const time = BigInt(this.#server.clock.wall() + this.#server.ahead + off);
    this.link.dataReceived(encodeFrame(kind, stream, time, this.#salt, this.#counter, token, bytes));
  }

  answer({ stream, token }: Request, value: unknown): void {
    this.say(Kind.RESPONSE, stream, value, { token });
  }

  fail({ stream, token }: Request, code: number, details: object = {}): void {
    this.say(Kind.ERROR, stream, [code, "because", details], { token });
  }

  goAway(reason = "draining", retryAfterMs = 0): void {
    this.say(Kind.GOAWAY, 0, { reason, retry_after_ms: retryAfterMs });
  }

  /** The server ends, by a close_notify if there is no error. */
  lose(error?: TlsError): void {
    if (!this.isClosed) {
      this.isClosed = true;
      this.link.connectionLost(error);
    }
  }

  write(data: Buffer): void {
    this.#decoder.feed(data);
    for (let frame = this.#decoder.next(); frame !== undefined; frame = this.#decoder.next()) {
      this.frames.push(frame);
      if (frame.kind === Kind.REQUEST) {
        const [method, params, meta = {}] = decodeBody(frame.body) as [string, Params | null, Meta | undefined];
        const { stream, token } = frame;
        const request = { stream, token, method, params: params ?? {}, meta, connection: this };
        setImmediate(() => this.#server.handle(request));
      } else if (frame.kind === Kind.CANCEL) {
        this.#server.cancelled.push(frame.stream);
      }
    }
  }

  close(): void {
    if (this.endsAtOnce) {
      setImmediate(() => this.lose());
    }
  }

  abort(): void {
    this.isAborted = true;
    setImmediate(() => this.lose());
  }
}

type Handler = (request: Request) => unknown;
/** A handler's way to answer not at all, or in its own way. */
export const NOTHING = Symbol("nothing");

export class Failure {
  constructor(
    readonly code: number,
    readonly details: object = {},
  ) {}
}

export class FakeServer {
  readonly clock = new FakeClock();
  readonly requests: Request[] = [];
  readonly cancelled: number[] = [];
  readonly connections: FakeConnection[] = [];
  /** What the server's clock is ahead of the client's. */
  ahead = 0;
  /** What the next attempts to connect fail with. */
  refusals: Error[] = [];
  welcome: object = WELCOME;
  /** Called before WELCOME is said on a new connection. */
  onConnection: (connection: FakeConnection) => void = () => undefined;
  readonly #handlers = new Map<string, Handler>();
  #opened = 0;

  constructor() {
    this.on("echo", ({ params }) => params);
    this.on("session.open", () => opened(++this.#opened));
    this.on("session.info", () => ({}));
    this.on("session.close", () => ({}));
  }

  get last(): FakeConnection {
    return this.connections.at(-1) as FakeConnection;
  }

  /** The methods asked for so far. */
  get methods(): string[] {
    return this.requests.map(({ method }) => method);
  }

  on(method: string, handler: Handler): void {
    this.#handlers.set(method, handler);
  }

  /** Answers in their order, the last one again and again. */
  script(method: string, ...answers: (unknown | Failure)[]): void {
    const left = [...answers];
    this.on(method, (request) => {
      const answer = left.length > 1 ? left.shift() : left[0];
      return typeof answer === "function" ? (answer as Handler)(request) : answer;
    });
  }

  handle(request: Request): void {
    this.requests.push(request);
    if (request.connection.isClosed) {
      return;
    }
    const handler = this.#handlers.get(request.method);
    const answer = handler === undefined ? new Failure(Code.UNIMPLEMENTED) : handler(request);
    if (answer instanceof Failure) {
      request.connection.fail(request, answer.code, answer.details);
    } else if (answer !== NOTHING) {
      request.connection.answer(request, answer);
    }
  }

  readonly dial = async (owner: Owner): Promise<Link> => {
    const refusal = this.refusals.shift();
    if (refusal !== undefined) {
      throw refusal;
    }
    const connection = new FakeConnection(this, owner, BigInt(1000 + this.connections.length));
    this.connections.push(connection);
    connection.say(Kind.WELCOME, 0, this.welcome);
    this.onConnection(connection);
    await connection.link.welcomed;
    return connection.link;
  };

  client(more: Partial<ClientSettings> = {}): Client {
    return new Client({
      address: { host: "fake", port: 7443 },
      dial: this.dial,
      credentials: new ApiKey("ada", KEY),
      opensSession: true,
      timeoutMs: 30_000,
      client: "test/1",
      onEvent: undefined,
      clock: this.clock,
      random: () => 0.5,
      ...more,
    });
  }

  /** A client that has connected. */
  async connect(more: Partial<ClientSettings> = {}): Promise<Client> {
    const client = this.client(more);
    await client.open();
    await settled();
    return client;
  }
}

/** How a promise ends, without waiting for it: to be looked at after time went by. */
export function watch<T>(promise: Promise<T>): { value?: T; error?: unknown; isDone: boolean } {
  const seen: { value?: T; error?: unknown; isDone: boolean } = { isDone: false };
  promise.then(
    (value) => Object.assign(seen, { value, isDone: true }),
    (error: unknown) => Object.assign(seen, { error, isDone: true }),
  );
  return seen;
}
