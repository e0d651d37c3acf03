/** The vectors of retry decisions: a client does what each says, at the time that it says, with a server in memory. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { Client } from "../src/client/client.js";
import { ApiKey, Certificate, type Credentials, DeviceKey, SchemeLogin } from "../src/client/session.js";
import { Code, TlsError } from "../src/errors.js";
import {
  Failure,
  FakeServer,
  KEY,
  NO_RESPONSE,
  opened,
  type Request,
  settled,
  tokenNumber,
  watch,
} from "./support/fake.js";
import { vectorFile } from "./support/vectors.js";

interface Decision {
  readonly name: string;
  readonly type: "decision";
  readonly outcome: {
    readonly error?: { readonly code: number; readonly details: object };
    readonly connection?: "lost" | "ended";
  };
  readonly request: {
    readonly idempotent: boolean;
    readonly token: "present" | "earlier" | "none";
    readonly done: readonly string[];
    readonly delays: number;
    readonly time_left_ms: number | null;
    readonly draining: boolean;
  };
  readonly client: {
    readonly credentials: "key" | "device" | "certificate" | "scheme" | null;
    readonly refresh_token: boolean;
    readonly reopenings: number;
  };
  readonly random: number;
  readonly expect: { readonly step: string; readonly after_ms?: number };
}

interface Deadlines {
  readonly name: string;
  readonly type: "deadline";
  readonly timeout_ms: number | null;
  readonly attempts_at_ms: readonly number[];
  readonly expect: { readonly deadline_ms: readonly (number | null)[] };
}

const { vectors } = vectorFile<Decision | Deadlines>("retry");
const signer = { sign: () => new Uint8Array(64) };
const CREDENTIALS: Readonly<Record<string, () => Credentials>> = {
  key: () => new ApiKey("ada", KEY),
  device: () => new DeviceKey(signer, "laptop"),
  certificate: () => new Certificate("ada"),
  scheme: () => new SchemeLogin({ scheme: "password", user: "ada" }),
};

/** Several addresses, so that a lost connection is replaced at once. */
const ADDRESSES = [1, 2, 3, 4, 5].map((n) => ({ host: `192.0.2.${n}`, port: 7443 }));

class Scene {
  readonly server = new FakeServer();
  readonly #held: Request[] = [];
  #random = 0;
  #sessions = 0;
  client!: Client;

  /** Connect, and lose as many sessions as the client has opened others for before. */
  async prepare({ client: { credentials, refresh_token, reopenings }, request }: Omit<Decision, "expect">) {
    const { server } = this;
    const session = () =>
      opened(++this.#sessions, {
        bound: credentials === "device",
        ...(refresh_token ? { refresh_token: tokenNumber(99) } : {}),
      });
    server.on("session.open", session);
    server.on("session.refresh", session);
    server.on("session.attach", () => ({}));
    server.on("subject", (held) => {
      this.#held.push(held);
      return NO_RESPONSE;
    });
    this.client = await server.connect({
      addresses: ADDRESSES as never,
      isRandom: false,
      credentials: credentials === null ? undefined : (CREDENTIALS[credentials] as () => Credentials)(),
      opensSession: request.token !== "none",
      random: () => this.#random,
    });
    await server.clock.advance(5_000); // the first session has lasted
    for (let n = 0; n < reopenings; n++) {
      server.script("other", new Failure(Code.UNAUTHENTICATED, { reason: "unknown_token" }), {});
      await this.client.call("other");
    }
  }

  /** Return the request that waits for an answer. */
  async #request(): Promise<Request> {
    await this.server.clock.advance(0); // delays of earlier attempts are 0
    const request = this.#held.pop();
    assert.ok(request, "the request was not sent");
    return request;
  }

  async #answer({ connection, error }: Decision["outcome"]): Promise<void> {
    const request = await this.#request();
    if (error !== undefined) {
      request.connection.fail(request, error.code, error.details);
    } else {
      if (connection === "ended") {
        request.connection.goAway();
      }
      request.connection.end(connection === "lost" ? new TlsError("truncated") : undefined);
    }
  }

  /** Send the request, and bring its call into the state of a vector. */
  async begin({ outcome, request }: Decision) {
    const { server, client } = this;
    const timeoutMs = request.time_left_ms ?? Number.POSITIVE_INFINITY;
    const more = request.idempotent ? { idempotencyKey: "key" } : {};
    const call = watch(client.call("subject", {}, { timeoutMs, ...more }));
    for (const _step of request.done) {
      await this.#answer(outcome);
    }
    for (let n = 0; n < request.delays; n++) {
      await this.#answer(outcome.error === undefined ? outcome : { error: { code: Code.UNAVAILABLE, details: {} } });
    }
    await server.clock.advance(0);
    if (request.token === "earlier") {
      server.script("other", new Failure(Code.TOKEN_EXPIRED), {});
      await client.call("other");
    }
    if (request.draining) {
      server.last.goAway();
      await settled();
    }
    return call;
  }

  /** Let the request fail, and return what follows within a time: the time and the next step. */
  async next({ outcome, random }: Decision, call: { readonly isDone: boolean }, withinMs: number): Promise<unknown> {
    const { server } = this;
    const begin = server.clock.ms;
    const seen = server.requests.length;
    this.#random = random;
    await this.#answer(outcome);
    const names: Readonly<Record<string, string>> = {
      "session.refresh": "refresh",
      "session.attach": "attach",
      "session.open": "reopen",
      subject: "wait",
    };
    for (const step of [0, withinMs - 0.001, 0.002]) {
      await server.clock.advance(step);
      const steps = server.requests.slice(seen).map(({ method }) => names[method]);
      const found = steps.find((name) => name !== undefined);
      if (found !== undefined || call.isDone) {
        const afterMs = Math.round(server.clock.ms - begin);
        return { step: call.isDone ? "report" : found, after_ms: afterMs };
      }
    }
    return "nothing";
  }

  /** Check that the request is sent again after its step. */
  async isSentAgain(): Promise<boolean> {
    await settled();
    return this.#held.length === 1;
  }

  async end(): Promise<void> {
    await this.server.closed(this.client);
  }
}

describe("decisions", () => {
  for (const vector of vectors.filter(({ type }) => type === "decision") as readonly Decision[]) {
    const isImpossible = vector.client.credentials === null && vector.request.token !== "none";
    const skip = isImpossible ? "a client without credentials has no session" : false;
    test(vector.name, { skip }, async () => {
      const scene = new Scene();
      await scene.prepare(vector);
      const call = await scene.begin(vector);
      const { step, after_ms = 0 } = vector.expect;
      const found = await scene.next(vector, call, after_ms);
      // The first step of `send` is the request itself, without a delay.
      assert.deepEqual(found, { step: step === "send" ? "wait" : step, after_ms });
      assert.equal(await scene.isSentAgain(), step !== "report");
      await scene.end();
    });
  }
});

describe("deadlines of attempts", () => {
  for (const vector of vectors.filter(({ type }) => type === "deadline") as readonly Deadlines[]) {
    test(vector.name, async () => {
      const server = new FakeServer();
      const client = await server.connect({ random: () => 0 });
      server.on("subject", () => new Failure(Code.UNAVAILABLE));
      const driver = server.last.driver;
      const begin = server.clock.ms;
      driver.pauseWriting(); // each attempt waits until the server reads
      const call = watch(client.call("subject", {}, { timeoutMs: vector.timeout_ms ?? Number.POSITIVE_INFINITY }));
      const sent: unknown[] = [];
      for (const at of vector.attempts_at_ms) {
        await server.clock.advance(begin + at - server.clock.ms);
        const before = server.requests.length;
        driver.resumeWriting();
        await settled();
        driver.pauseWriting();
        const [request, ...more] = server.requests.slice(before);
        assert.deepEqual(more, []);
        sent.push(request?.meta.deadline_ms ?? null);
      }
      assert.deepEqual(sent, vector.expect.deadline_ms);
      driver.resumeWriting();
      await server.closed(client);
      assert.ok(call.isDone);
    });
  }
});

test("all types of vectors are read", () => {
  assert.deepEqual([...new Set(vectors.map(({ type }) => type))].sort(), ["deadline", "decision"]);
});
