/** The steps through which the conformance kit drives this client, specified in clients/conformance/README.md. */

import { attachMessage, openMessage } from "../src/client/signing.js";
import {
  CallError,
  CannotConnect,
  CertificateError,
  type Client,
  Code,
  ConfigError,
  ConnectionClosed,
  type Credit,
  connect,
  Device,
  type LoginParams,
  ProtocolError,
  type ServerCall,
  type Stream,
  TlsError,
  type TlsFailure,
  type UserClient,
  VERSION,
} from "../src/index.js";
import { encodeFrame, Kind, type Side, tokenBytes, tokenFromText } from "../src/wire/frame.js";
import { encodeRequest, isTraceparent, type Meta, type Params } from "../src/wire/message.js";
import { type Context, outcomesOf } from "./outcomes.js";
import { type Json, typed, untyped } from "./typed.js";

const KIT = 1;
const NAME = `zcproto-typescript/${VERSION}`;

/** A step of the kit. README.md of the kit lists its fields. */
export type Step = Readonly<Record<string, Json>> & { readonly id: number; readonly step: string };

const CAUSES: Readonly<Partial<Record<TlsFailure, string>>> = {
  certificate_untrusted: "certificate",
  certificate_expired: "certificate",
  certificate_name_mismatch: "certificate",
  certificate_revoked: "certificate",
  pin_mismatch: "pin",
  no_application_protocol: "protocol",
  unsupported_version: "protocol",
  no_shared_parameters: "protocol",
  wrong_parameters: "protocol",
  not_tls: "protocol",
  sts_policy: "policy",
};

interface Call {
  readonly result: Promise<unknown>;
  readonly controller: AbortController;
}

/** The reason with which a call is aborted by `cancel`. */
const CANCELLED = new Error("cancelled");

/** Calls of the server to one client, held until a step answers them. */
class HeldCalls {
  readonly #answers: ((step: Step) => void)[] = []; // by the number of the call
  readonly #seen: Json[] = [];
  readonly #waiters: ((seen: Json) => void)[] = [];

  hold(params: Record<string, unknown>, { method, user }: ServerCall): Promise<unknown> {
    const call = this.#answers.length;
    const answered = new Promise((resolve, reject) => {
      this.#answers.push(({ value, code }) => {
        if (typeof code === "number") {
          reject(CallError.fromWire(code, "failed by the scenario", {}));
        } else {
          resolve(untyped(value ?? null));
        }
      });
    });
    const seen = { call, method, user, params: typed(params) };
    const waiter = this.#waiters.shift();
    if (waiter === undefined) {
      this.#seen.push(seen);
    } else {
      waiter(seen);
    }
    return answered;
  }

  next(): Promise<Json> {
    const seen = this.#seen.shift();
    return seen === undefined ? new Promise((resolve) => this.#waiters.push(resolve)) : Promise.resolve(seen);
  }

  answer(step: Step): null {
    this.#answers[step["call"] as number]?.(step);
    return null;
  }
}

export class Conform {
  readonly #clients = new Map<string, UserClient>();
  readonly #connections = new Map<string, Client>(); // those with a connection of their own
  readonly #calls = new Map<string, Call>();
  readonly #streams = new Map<string, Stream>();
  readonly #held = new Map<string, HeldCalls>();

  /** Run a step and return its answer without the id. */
  async run(step: Step): Promise<Json> {
    const action = this.#action(step);
    if (action === undefined) {
      return { unsupported: `unknown step ${JSON.stringify(step.step)}` };
    }
    try {
      return { ok: (await action) ?? null };
    } catch (error) {
      return { error: describe(error) };
    }
  }

  /** Close all clients. */
  async close(): Promise<void> {
    await Promise.all([...this.#clients.values()].map((client) => client.close()));
  }

  #action(step: Step): Promise<Json | undefined> | undefined {
    switch (step.step) {
      case "hello":
        return Promise.resolve({ kit: KIT, client: NAME, features: ["durable"] });
      case "connect":
        return this.#connect(step);
      case "session_for":
        return this.#sessionFor(step);
      case "call":
        return this.#call(step);
      case "expect":
        return this.#callOf(step).result.then(typed);
      case "cancel":
        this.#callOf(step).controller.abort(CANCELLED);
        return Promise.resolve(null);
      case "open":
        return this.#open(step);
      case "next":
        return this.#next(step);
      case "send":
        return this.#streamOf(step)
          .send(untyped(step["value"] ?? null))
          .then(() => null);
      case "finish":
        return this.#streamOf(step)
          .end()
          .then(() => null);
      case "resume":
        return this.#resume(step);
      case "position": {
        const { id, position } = this.#streamOf(step);
        return Promise.resolve({ id: id ?? null, position: position ?? null });
      }
      case "cancel_run":
        return this.#streamOf(step)
          .cancel()
          .then(() => null);
      case "leave":
        this.#streamOf(step).close();
        return Promise.resolve(null);
      case "handle":
        return this.#handle(step);
      case "called":
        return this.#heldOf(step).next();
      case "answer":
        return Promise.resolve(this.#heldOf(step).answer(step));
      case "event":
        return this.#event(step);
      case "session":
        return Promise.resolve(this.#session(step));
      case "open_session":
        return this.#clientOf(step)
          .openSession()
          .then(({ id }) => ({ session: id }));
      case "cut":
        this.#connections.get(step["client"] as string)?.cut();
        return Promise.resolve(null);
      case "close":
        return this.#close(step);
      default:
        return runVectorStep(step);
    }
  }

  #clientOf({ client }: Step): UserClient {
    const found = this.#clients.get(client as string);
    if (found === undefined) {
      throw new Error(`unknown client ${JSON.stringify(client)}`);
    }
    return found;
  }

  #streamOf({ stream }: Step): Stream {
    const found = this.#streams.get(stream as string);
    if (found === undefined) {
      throw new Error(`unknown stream ${JSON.stringify(stream)}`);
    }
    return found;
  }

  #callOf({ call }: Step): Call {
    const found = this.#calls.get(call as string);
    if (found === undefined) {
      throw new Error(`unknown call ${JSON.stringify(call)}`);
    }
    return found;
  }

  async #connect(step: Step): Promise<Json> {
    const text = (name: string) => step[name] as string | undefined;
    const number = (name: string) => step[name] as number | undefined;
    const seed = text("device_key");
    const client = await connect(text("address") ?? "", {
      user: text("user"),
      key: text("key"),
      caFile: text("ca_file"),
      pins: step["pins"] as readonly string[] | undefined,
      verify: step["verify"] as boolean | undefined,
      serverHostname: text("server_name"),
      device: seed === undefined ? undefined : Device.fromSeed(Buffer.from(seed, "hex")),
      deviceName: text("device"),
      login: loginOf(step["login"] as readonly Json[] | undefined),
      client: text("client_name"),
      home: text("home"),
      timeoutMs: number("timeout_ms"),
      maxCalls: number("max_calls"),
      maxConnections: number("max_connections"),
      connectTimeoutMs: number("connect_timeout_ms"),
    });
    this.#clients.set(text("client") ?? "", client);
    this.#connections.set(text("client") ?? "", client);
    return { session: client.session?.id ?? null };
  }

  async #sessionFor(step: Step): Promise<Json> {
    const { of, client, user, key } = step as Record<string, unknown> as Record<string, string>;
    const session = await this.#connections.get(of as string)?.sessionFor({ user, key });
    if (session === undefined) {
      throw new Error(`unknown client ${JSON.stringify(of)}`);
    }
    this.#clients.set(client as string, session);
    return { session: session.session?.id ?? null };
  }

  #call(step: Step): Promise<null> {
    const controller = new AbortController();
    const params = untyped(step["params"] ?? null) as Params | null;
    const result = this.#clientOf(step).call(step["method"] as string, params, {
      timeoutMs: step["timeout_ms"] as number | undefined,
      idempotencyKey: step["idempotency_key"] as string | undefined,
      traceparent: step["traceparent"] as string | undefined,
      signal: controller.signal,
    });
    result.catch(() => undefined); // `expect` reports it
    this.#calls.set(step["call"] as string, { result, controller });
    return Promise.resolve(null);
  }

  #open(step: Step): Promise<null> {
    const params = untyped(step["params"] ?? null) as Params | null;
    const stream = this.#clientOf(step).stream(step["method"] as string, params, {
      window: step["credit"] as Credit | undefined,
      timeoutMs: step["timeout_ms"] as number | undefined,
      durable: step["durable"] as boolean | undefined,
    });
    return this.#opened(step, stream);
  }

  #resume(step: Step): Promise<null> {
    const { run, method, after } = step as Record<string, unknown>;
    const options = { method: method as string, after: after as number };
    return this.#opened(step, this.#clientOf(step).resume(run as string, options));
  }

  #opened(step: Step, stream: Stream): Promise<null> {
    stream.result.catch(() => undefined); // opens it; `next` reports the error
    this.#streams.set(step["stream"] as string, stream);
    return Promise.resolve(null);
  }

  async #next(step: Step): Promise<Json> {
    const stream = this.#streamOf(step);
    const { value, done } = await stream.next();
    return done === true ? { end: typed(await stream.result) } : { item: typed(value) };
  }

  async #handle(step: Step): Promise<null> {
    const held = this.#heldOf(step);
    await this.#clientOf(step).handle(step["method"] as string, (params, call) => held.hold(params, call));
    return null;
  }

  #heldOf({ client }: Step): HeldCalls {
    const held = this.#held.get(client as string) ?? new HeldCalls();
    this.#held.set(client as string, held);
    return held;
  }

  async #event(step: Step): Promise<Json> {
    const { value } = await this.#clientOf(step).events.next();
    if (value === undefined) {
      throw new ConnectionClosed("this client is closed", { clean: true });
    }
    return { name: value.name, data: typed(value.data) };
  }

  #session(step: Step): Json {
    const { session } = this.#clientOf(step);
    return session === undefined ? null : { id: session.id, user: session.user, expires_at: session.expiresAt };
  }

  async #close(step: Step): Promise<null> {
    const name = step["client"] as string;
    const client = this.#clients.get(name); // undefined if its connect step failed
    this.#clients.delete(name);
    await client?.close();
    return null;
  }
}

/** Run a step that needs no connection. Return undefined for an unknown step. */
function runVectorStep(step: Step): Promise<Json> | undefined {
  const hex = (name: string) => Buffer.from((step[name] ?? "") as string, "hex");
  switch (step.step) {
    case "tables":
      return Promise.resolve({ kinds: Kind, codes: Code });
    case "decode": {
      const pieces = (step["pieces"] as readonly string[]).map((piece) => Buffer.from(piece, "hex"));
      const context = step["context"] as unknown as Context;
      const times = step["times"] as readonly string[] | undefined;
      return Promise.resolve(outcomesOf(step["receiver"] as Side, context, pieces, times));
    }
    case "encode": {
      const frame = encodeFrame(
        Kind[step["kind"] as keyof typeof Kind],
        step["stream"] as number,
        BigInt(step["timestamp"] as string),
        BigInt(`0x${step["salt"] as string}`),
        BigInt(step["counter"] as string),
        hex("token").toString("latin1"),
        hex("body"),
      );
      return Promise.resolve({ bytes: frame.toString("hex") });
    }
    case "encode_request": {
      const meta = step["meta"] === undefined ? undefined : (untyped(step["meta"]) as Meta);
      const params = untyped(step["params"] ?? null) as Params | null;
      const body = encodeRequest(step["method"] as string, params, meta);
      return Promise.resolve({ body: Buffer.from(body).toString("hex") });
    }
    case "text": {
      const text = step["text"] as string;
      if (step["type"] === "traceparent") {
        return Promise.resolve({ valid: isTraceparent(text) });
      }
      const token = tokenFromText(text);
      return Promise.resolve(
        token === undefined ? { valid: false } : { valid: true, bytes: tokenBytes(token).toString("hex") },
      );
    }
    case "sign": {
      const channel = { salt: BigInt(`0x${step["salt"] as string}`), leaf: hex("leaf") };
      const message =
        step["scheme"] === "attach"
          ? attachMessage(channel, hex("token").toString("latin1"))
          : openMessage(channel, step["device"] as string);
      const signature = Buffer.from(Device.fromSeed(hex("private_key")).sign(message));
      return Promise.resolve({ message: message.toString("hex"), signature: signature.toString("hex") });
    }
    default:
      return undefined;
  }
}

/** Return a function that returns the next login each time. */
function loginOf(logins: readonly Json[] | undefined): (() => LoginParams) | undefined {
  const values = logins?.values();
  return values && (() => untyped(values.next().value as Json) as LoginParams);
}

/** Return an error in the form of the kit. Any other error is a bug of this program and is rethrown. */
function describe(error: unknown): Json {
  if (error === CANCELLED) {
    return { kind: "call", code: Code.CANCELLED, name: "CANCELLED", message: "", details: null };
  }
  if (error instanceof CallError) {
    const { code, codeName: name, message, details } = error;
    return { kind: "call", code, name, message, details: typed(details) };
  }
  if (error instanceof CannotConnect) {
    return { kind: "connect", message: error.message };
  }
  if (error instanceof ConnectionClosed) {
    return { kind: "closed", clean: error.clean, code: error.code ?? null, message: error.message };
  }
  if (error instanceof ProtocolError) {
    return { kind: "closed", clean: false, code: error.code, message: error.message };
  }
  if (error instanceof TlsError) {
    return { kind: "tls", cause: CAUSES[error.failure] ?? "other", message: error.message };
  }
  if (error instanceof ConfigError || error instanceof CertificateError) {
    return { kind: "argument", message: error.message };
  }
  throw error;
}
