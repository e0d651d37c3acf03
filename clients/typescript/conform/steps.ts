/** The steps by which the conformance kit drives this client: clients/conformance/README.md, one by one. */

import { attachMessage, openMessage } from "../src/client/signed.js";
import {
  CallError,
  CannotConnect,
  CertificateError,
  type Client,
  Code,
  ConfigError,
  ConnectionClosed,
  connect,
  Device,
  ProtocolError,
  TlsError,
  type TlsFailure,
  VERSION,
} from "../src/index.js";
import { encodeFrame, Kind, type Side, tokenBytes, tokenFromText } from "../src/wire/frame.js";
import { encodeRequest, isTraceparent, type Meta, type Params } from "../src/wire/message.js";
import { type Context, outcomesOf } from "./outcomes.js";
import { type Json, typed, untyped } from "./typed.js";

const KIT = 1;
const NAME = `zcproto-typescript/${VERSION}`;

/** A line of the kit. Which fields a step has is said in the kit's page. */
export type Step = Readonly<Record<string, Json>> & { readonly id: number; readonly step: string };

const CAUSES: Readonly<Partial<Record<TlsFailure, string>>> = {
  certificate_untrusted: "certificate",
  certificate_expired: "certificate",
  certificate_name_mismatch: "certificate",
  certificate_revoked: "certificate",
  pin_mismatch: "pin",
  no_application_protocol: "protocol",
  unsupported_version: "protocol",
  no_shared_suite: "protocol",
  wrong_parameters: "protocol",
  not_tls: "protocol",
  sts_policy: "policy",
};

interface Call {
  readonly answer: Promise<unknown>;
  readonly given: AbortController;
}

/** What an application gives as the reason when it gives a call up. */
const GIVEN_UP = new Error("given up");

export class Conform {
  readonly #clients = new Map<string, Client>();
  readonly #calls = new Map<string, Call>();

  /** The answer to a step, but for its id. */
  async answer(step: Step): Promise<Json> {
    const action = this.#action(step);
    if (action === undefined) {
      return { unsupported: `there is no step ${JSON.stringify(step.step)}` };
    }
    try {
      return { ok: (await action) ?? null };
    } catch (error) {
      return { error: described(error) };
    }
  }

  /** Close what is open. */
  async close(): Promise<void> {
    await Promise.all([...this.#clients.values()].map((client) => client.close()));
  }

  #action(step: Step): Promise<Json | undefined> | undefined {
    switch (step.step) {
      case "hello":
        return Promise.resolve({ kit: KIT, client: NAME });
      case "connect":
        return this.#connect(step);
      case "call":
        return this.#call(step);
      case "expect":
        return this.#callOf(step).answer.then(typed);
      case "cancel":
        this.#callOf(step).given.abort(GIVEN_UP);
        return Promise.resolve(null);
      case "event":
        return this.#event(step);
      case "session":
        return Promise.resolve(this.#session(step));
      case "open_session":
        return this.#clientOf(step)
          .openSession()
          .then(({ id }) => ({ session: id }));
      case "cut":
        this.#clientOf(step).cut();
        return Promise.resolve(null);
      case "close":
        return this.#close(step);
      default:
        return withVectors(step);
    }
  }

  #clientOf({ client }: Step): Client {
    const found = this.#clients.get(client as string);
    if (found === undefined) {
      throw new Error(`there is no client ${JSON.stringify(client)}`);
    }
    return found;
  }

  #callOf({ call }: Step): Call {
    const found = this.#calls.get(call as string);
    if (found === undefined) {
      throw new Error(`there is no call ${JSON.stringify(call)}`);
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
      client: text("client_name"),
      home: text("home"),
      timeoutMs: number("timeout_ms"),
      connectTimeoutMs: number("connect_timeout_ms"),
    });
    this.#clients.set(text("client") ?? "", client);
    return { session: client.session?.id ?? null };
  }

  #call(step: Step): Promise<null> {
    const given = new AbortController();
    const params = untyped(step["params"] ?? null) as Params | null;
    const answer = this.#clientOf(step).call(step["method"] as string, params, {
      timeoutMs: step["timeout_ms"] as number | undefined,
      idempotencyKey: step["idempotency_key"] as string | undefined,
      traceparent: step["traceparent"] as string | undefined,
      signal: given.signal,
    });
    answer.catch(() => undefined); // `expect` tells it
    this.#calls.set(step["call"] as string, { answer, given });
    return Promise.resolve(null);
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
    const client = this.#clients.get(name); // if it never got so far there is none
    this.#clients.delete(name);
    await client?.close();
    return null;
  }
}

/** A step that needs no connection; undefined if there is no such step. */
function withVectors(step: Step): Promise<Json> | undefined {
  const hex = (name: string) => Buffer.from((step[name] ?? "") as string, "hex");
  switch (step.step) {
    case "tables":
      return Promise.resolve({ kinds: Kind, codes: Code });
    case "decode": {
      const pieces = (step["pieces"] as readonly string[]).map((piece) => Buffer.from(piece, "hex"));
      const context = step["context"] as unknown as Context;
      return Promise.resolve(outcomesOf(step["receiver"] as Side, context, pieces));
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

/** An error in the words of the kit. Any other is a fault of this program, and is thrown. */
function described(error: unknown): Json {
  if (error === GIVEN_UP) {
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
