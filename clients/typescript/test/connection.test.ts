/** The conversation with bytes and times passed in. */

import assert from "node:assert/strict";
import { beforeEach, describe, test } from "node:test";
import {
  ClientConnection,
  MAX_FRAME_BEFORE_SESSION,
  MAX_SERVER_TIME,
  PONG_TIMEOUT_MS,
} from "../src/connection/connection.js";
import type { ClientEvent } from "../src/connection/events.js";
import { type Input, nextState, type State, TRANSITIONS } from "../src/connection/state.js";
import { Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable } from "../src/errors.js";
import { encodeBody } from "../src/wire/body.js";
import { FrameDecoder } from "../src/wire/decoder.js";
import { encodeFrame, type Frame, Kind, NO_TOKEN, type Token } from "../src/wire/frame.js";
import { tokenNumber, tokenText, WALL, WELCOME } from "./support/fake.js";

const SALT = 0xa1b2c3d4e5f60718n;
const NOW = BigInt(WALL);
const TOKEN = tokenText(9);

class Talk {
  readonly client = new ClientConnection();
  counter = -1n;
  wall = NOW;
  now = 0;
  readonly #sent = new FrameDecoder("server", 2 ** 32 - 1);

  frame(kind: Kind, stream: number, body?: unknown, { token = NO_TOKEN, time = this.wall, salt = SALT } = {}): Buffer {
    this.counter += 1n;
    const bytes = body === undefined ? Buffer.alloc(0) : body instanceof Buffer ? body : encodeBody(body);
    return encodeFrame(kind, stream, time, salt, this.counter, token, Buffer.from(bytes));
  }

  hear(data: Buffer): ClientEvent[] {
    return this.client.receiveData(data, this.wall, this.now);
  }

  say(...frame: Parameters<Talk["frame"]>): ClientEvent[] {
    return this.hear(this.frame(...frame));
  }

  welcome(more: object = {}): void {
    const [event] = this.say(Kind.WELCOME, 0, { ...WELCOME, ...more });
    assert.equal(event?.type, "welcomed");
  }

  request(method = "echo", token: Token = TOKEN): number {
    return this.client.request(method, null, token, undefined, this.wall);
  }

  sent(): Frame[] {
    this.#sent.feed(this.client.dataToSend() ?? Buffer.alloc(0));
    const frames: Frame[] = [];
    for (let frame = this.#sent.next(); frame !== undefined; frame = this.#sent.next()) {
      frames.push(frame);
    }
    return frames;
  }
}

let talk: Talk;
beforeEach(() => {
  talk = new Talk();
});

function endedBy(events: ClientEvent[]): Code | undefined {
  const last = events.at(-1);
  assert.equal(last?.type, "ended");
  return last?.type === "ended" ? last.code : undefined;
}

describe("states", () => {
  test("every state and input has its successor, or is a bug", () => {
    for (const state of Object.keys(TRANSITIONS) as State[]) {
      for (const input of ["welcome", "goaway", "fatal", "end"] as Input[]) {
        const next = TRANSITIONS[state][input];
        if (next === undefined) {
          assert.throws(() => nextState(state, input), /bug/);
        } else {
          assert.equal(nextState(state, input), next);
        }
      }
    }
  });

  test("nothing is sent before WELCOME, and none after the end", () => {
    assert.throws(() => talk.request(), Unavailable);
    talk.client.ping(NOW);
    assert.equal(talk.client.dataToSend(), undefined);
    talk.welcome();
    const stream = talk.request();
    talk.client.end();
    talk.client.cancel(stream, NOW);
    talk.client.ping(NOW);
    assert.equal(talk.sent().length, 1);
    assert.throws(() => talk.request(), ConnectionClosed);
    assert.deepEqual(talk.say(Kind.RESPONSE, stream, 1), []);
  });

  test("after GOAWAY answers still come and nothing new is sent", () => {
    talk.welcome();
    const stream = talk.request();
    const said = { reason: "draining", retry_after_ms: 1_000, more: [] };
    assert.deepEqual(talk.say(Kind.GOAWAY, 0, said), [{ type: "goaway", reason: "draining", retryAfterMs: 1_000 }]);
    assert.equal(talk.say(Kind.GOAWAY, 0, said).length, 1);
    assert.throws(() => talk.request(), Unavailable);
    assert.deepEqual(talk.say(Kind.RESPONSE, stream, 1), [{ type: "response", stream, value: 1 }]);
  });

  test("what follows the end in the same read is not looked at", () => {
    talk.welcome();
    const stream = talk.request();
    const data = Buffer.concat([talk.frame(Kind.ERROR, 0, [66, "x"]), talk.frame(Kind.RESPONSE, stream, 1)]);
    assert.equal(endedBy(talk.hear(data)), Code.REPLAYED);
    assert.equal(talk.client.state, "closed");
  });
});

describe("what is sent", () => {
  test("counts up from 1, with the salt, the server's time and the token", () => {
    talk.welcome();
    talk.wall += 40n;
    talk.request();
    talk.request("session.open");
    talk.client.ping(talk.wall);
    const frames = talk.sent();
    assert.deepEqual(
      frames.map(({ counter }) => counter),
      [1n, 2n, 3n],
    );
    assert.deepEqual(
      frames.map(({ token }) => token),
      [TOKEN, NO_TOKEN, NO_TOKEN],
    );
    assert.deepEqual([...new Set(frames.map(({ salt }) => salt))], [SALT]);
    assert.deepEqual([...new Set(frames.map(({ timestamp }) => timestamp))], [NOW + 40n]);
  });

  test("is in the server's time, wherever our clock is", () => {
    for (const time of [0n, MAX_SERVER_TIME]) {
      const far = new Talk();
      const [event] = far.say(Kind.WELCOME, 0, WELCOME, { time });
      assert.equal(event?.type, "welcomed");
      far.wall += 5n;
      far.request();
      assert.equal(far.sent()[0]?.timestamp, time + 5n);
    }
    assert.equal(endedBy(talk.say(Kind.WELCOME, 0, WELCOME, { time: MAX_SERVER_TIME + 1n })), Code.PROTOCOL_ERROR);
  });

  test("never has a timestamp that 64 bits cannot hold", () => {
    talk.say(Kind.WELCOME, 0, WELCOME, { time: 5n });
    talk.wall -= 100n;
    talk.request();
    assert.equal(talk.sent()[0]?.timestamp, 0n);
  });

  test("streams begin again after the last one, and pass over those in flight", () => {
    talk.welcome();
    assert.equal(talk.request(), 1);
    talk.client.nextStream = 2 ** 32 - 1;
    assert.equal(talk.request(), 2 ** 32 - 1);
    assert.equal(talk.request(), 2);
  });

  test("is bounded by max_streams", () => {
    talk.welcome({ max_streams: 2 });
    const stream = talk.request();
    talk.request();
    assert.throws(() => talk.request(), ResourceExhausted);
    talk.say(Kind.ERROR, stream, [Code.CANCELLED, ""]);
    assert.doesNotThrow(() => talk.request());
  });

  test("is small until the server has taken a token, and again when that is over", () => {
    talk.welcome();
    const large = { text: "a".repeat(MAX_FRAME_BEFORE_SESSION) };
    const ask = () => talk.client.request("echo", large, TOKEN, undefined, NOW);
    assert.throws(ask, (error: InvalidArgument) => error.details["limit"] === MAX_FRAME_BEFORE_SESSION);
    talk.say(Kind.RESPONSE, talk.request(), {});
    assert.doesNotThrow(ask);
    talk.say(Kind.EVENT, 0, ["session.revoked", {}], { token: TOKEN });
    assert.throws(ask, InvalidArgument);
    talk.say(Kind.RESPONSE, talk.request("session.open"), { token: tokenNumber(9) });
    assert.doesNotThrow(ask);
    talk.client.sessionEnded(TOKEN);
    assert.throws(ask, InvalidArgument);
  });

  test("CANCEL carries the token of its request, and the answer is still awaited", () => {
    talk.welcome();
    const streams = [talk.request(), talk.request("session.refresh")];
    talk.sent();
    for (const stream of streams) {
      talk.client.cancel(stream, NOW);
    }
    assert.deepEqual(
      talk.sent().map(({ kind, token }) => [kind, token]),
      [
        [Kind.CANCEL, TOKEN],
        [Kind.CANCEL, NO_TOKEN],
      ],
    );
    assert.equal(talk.client.inFlight, 2);
  });

  test("a PING is answered with its own token", () => {
    talk.welcome();
    assert.deepEqual(talk.say(Kind.PING, 0, undefined, { token: TOKEN }), []);
    assert.deepEqual(
      talk.sent().map(({ kind, token }) => [kind, token]),
      [[Kind.PONG, TOKEN]],
    );
  });
});

describe("freshness", () => {
  beforeEach(() => talk.welcome());

  test("a frame of another connection, and a counter that does not grow, end it", () => {
    assert.equal(endedBy(talk.say(Kind.PING, 0, undefined, { salt: SALT + 1n })), Code.REPLAYED);
    const other = new Talk();
    other.welcome();
    other.counter = -1n;
    assert.equal(endedBy(other.say(Kind.PING, 0)), Code.REPLAYED);
  });

  test("both edges of the tolerance are inside", () => {
    for (const off of [30_000n, -30_000n]) {
      talk.say(Kind.PING, 0, undefined, { time: NOW + off });
    }
    assert.equal(talk.sent().length, 2);
    for (const off of [30_001n, -30_001n]) {
      talk.say(Kind.PING, 0, undefined, { time: NOW + off });
    }
    assert.equal(talk.sent().length, 0);
    assert.equal(talk.client.droppedStale, 2);
  });

  test("any timestamp can be compared", () => {
    for (const time of [0n, 2n ** 63n, 2n ** 64n - 1n]) {
      assert.deepEqual(talk.say(Kind.PING, 0, undefined, { time }), []);
    }
    assert.equal(talk.client.droppedStale, 3);
  });

  test("the tenth stale frame in a row ends it, and a fresh one ends the row", () => {
    const stale = () => talk.say(Kind.PING, 0, undefined, { time: 0n });
    for (let count = 0; count < 9; count++) {
      assert.deepEqual(stale(), []);
    }
    talk.say(Kind.PING, 0);
    for (let count = 0; count < 9; count++) {
      assert.deepEqual(stale(), []);
    }
    assert.equal(endedBy(stale()), Code.STALE_TIMESTAMP);
  });

  test("ERROR STALE_TIMESTAMP sets the clock right, though it is stale itself", () => {
    const stream = talk.request();
    talk.sent();
    const time = NOW + 3_600_000n;
    const [event] = talk.say(Kind.ERROR, stream, [67, "stale", { server_time: time }], { time });
    assert.equal(event?.type, "error");
    talk.request();
    assert.equal(talk.sent()[0]?.timestamp, time);
  });

  test("a server_time that is none is passed over", () => {
    for (const server_time of [-1, "x", null, 1.5, MAX_SERVER_TIME + 1n]) {
      const offset = talk.client.clockOffset;
      talk.say(Kind.ERROR, talk.request(), [67, "stale", { server_time }]);
      assert.equal(talk.client.clockOffset, offset);
    }
  });
});

describe("answers", () => {
  beforeEach(() => talk.welcome());

  test("that cannot be read fail their call with INTERNAL, and the connection goes on", () => {
    for (const kind of [Kind.RESPONSE, Kind.ERROR]) {
      const [event] = talk.say(kind, talk.request(), Buffer.from("c1", "hex"));
      assert.equal(event?.type === "error" ? event.code : undefined, Code.INTERNAL);
    }
    assert.equal(talk.client.state, "open");
  });

  test("to nothing are dropped and counted", () => {
    assert.deepEqual(talk.say(Kind.RESPONSE, 7, 1), []);
    assert.deepEqual(talk.say(Kind.ERROR, 7, [1, ""]), []);
    assert.equal(talk.client.droppedUnknown, 2);
  });

  test("a kind without a body that has one, and what cannot be read, ends it", () => {
    const wrong: [Kind, unknown][] = [
      [Kind.PING, 1],
      [Kind.PONG, 1],
      [Kind.WELCOME, WELCOME],
      [Kind.EVENT, [1, 2]],
      [Kind.EVENT, ["a"]],
      [Kind.GOAWAY, { reason: "x", retry_after_ms: 1.5 }],
      [Kind.GOAWAY, { reason: "x" }],
      [Kind.ERROR, "x"],
    ];
    for (const [kind, body] of wrong) {
      const other = new Talk();
      other.welcome();
      assert.equal(endedBy(other.say(kind, 0, body)), Code.PROTOCOL_ERROR);
    }
  });

  test("a GOAWAY with a float that looks like an int is wrong", () => {
    const body = Buffer.from("82a6726561736f6ea178ae72657472795f61667465725f6d73cb3ff0000000000000", "hex");
    assert.equal(endedBy(talk.say(Kind.GOAWAY, 0, body)), Code.PROTOCOL_ERROR);
  });
});

describe("keepalive", () => {
  test("a PING goes out after a third of the idle timeout, and its silence ends it", () => {
    talk.welcome({ idle_timeout_ms: 90_000 });
    assert.equal(talk.client.nextDeadline(), 30_000);
    assert.equal(talk.client.handleTimeout(NOW, 29_999), undefined);
    assert.equal(talk.sent().length, 0);
    assert.equal(talk.client.handleTimeout(NOW, 30_000), undefined);
    assert.equal(talk.sent()[0]?.kind, Kind.PING);
    assert.equal(talk.client.nextDeadline(), 30_000 + PONG_TIMEOUT_MS);
    const ended = talk.client.handleTimeout(NOW, 30_000 + PONG_TIMEOUT_MS);
    assert.equal(ended?.type, "ended");
    assert.equal(talk.client.nextDeadline(), Number.POSITIVE_INFINITY);
  });

  test("traffic both ways makes a PING needless", () => {
    talk.welcome({ idle_timeout_ms: 90_000 });
    talk.now = 10_000;
    talk.say(Kind.RESPONSE, talk.request(), 1);
    talk.sent();
    talk.client.handleTimeout(NOW, 30_000);
    assert.equal(talk.sent().length, 0);
    talk.client.handleTimeout(NOW, 60_000);
    assert.equal(talk.sent()[0]?.kind, Kind.PING);
    talk.now = 60_001;
    talk.say(Kind.PONG, 0);
    assert.equal(talk.client.nextDeadline(), 90_000);
  });

  test("a tiny idle timeout floods nobody, and none needs no PING", () => {
    talk.welcome({ idle_timeout_ms: 3 });
    assert.equal(talk.client.nextDeadline(), 250);
    const other = new Talk();
    other.welcome({ idle_timeout_ms: 0 });
    assert.equal(other.client.nextDeadline(), Number.POSITIVE_INFINITY);
  });
});
