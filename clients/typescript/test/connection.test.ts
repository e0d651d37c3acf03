/** ClientConnection, with bytes and times passed in. */

import assert from "node:assert/strict";
import { beforeEach, describe, test } from "node:test";
import { FRAME_TIMEOUT_MS, MAX_SERVER_TIME } from "../src/connection/connection.js";
import { UNREQUESTED_BURST, UNREQUESTED_PER_S } from "../src/connection/flood_limit.js";
import { PONG_TIMEOUT_MS } from "../src/connection/keepalive.js";
import { MAX_FRAME_BEFORE_SESSION } from "../src/connection/requests.js";
import { type Input, nextState, type State, TRANSITIONS } from "../src/connection/state.js";
import { Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable } from "../src/errors.js";
import { HEADER_SIZE, Kind, NO_TOKEN } from "../src/wire/frame.js";
import { tokenNumber, WELCOME } from "./support/fake.js";
import { endCode, NOW, Peer, SALT, TOKEN } from "./support/peer.js";

let peer: Peer;
beforeEach(() => {
  peer = new Peer();
});

describe("states", () => {
  test("every state and input has a next state or throws", () => {
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

  test("nothing is sent before WELCOME or after the end", () => {
    assert.throws(() => peer.request(), Unavailable);
    peer.client.ping(NOW);
    assert.equal(peer.client.dataToSend(), undefined);
    peer.welcome();
    const stream = peer.request();
    peer.client.end();
    peer.client.cancel(stream, NOW);
    peer.client.ping(NOW);
    assert.equal(peer.sent().length, 1);
    assert.throws(() => peer.request(), ConnectionClosed);
    assert.deepEqual(peer.receive(Kind.RESPONSE, stream, 1), []);
  });

  test("after GOAWAY responses arrive and new requests are refused", () => {
    peer.welcome();
    const stream = peer.request();
    const goAway = { reason: "draining", retry_after_ms: 1_000, more: [] };
    assert.deepEqual(peer.receive(Kind.GOAWAY, 0, goAway), [
      { type: "goaway", reason: "draining", retryAfterMs: 1_000 },
    ]);
    assert.equal(peer.receive(Kind.GOAWAY, 0, goAway).length, 1);
    assert.throws(() => peer.request(), Unavailable);
    assert.deepEqual(peer.receive(Kind.RESPONSE, stream, 1), [{ type: "response", stream, value: 1 }]);
  });

  test("frames after the end in the same read are ignored", () => {
    peer.welcome();
    const stream = peer.request();
    const data = Buffer.concat([peer.frame(Kind.ERROR, 0, [66, "x"]), peer.frame(Kind.RESPONSE, stream, 1)]);
    assert.equal(endCode(peer.receiveBytes(data)), Code.REPLAYED);
    assert.equal(peer.client.state, "closed");
  });
});

describe("sending", () => {
  test("frames have increasing counters, the salt, the server's time and the token", () => {
    peer.welcome();
    peer.wall += 40n;
    peer.request();
    peer.request("session.open");
    peer.client.ping(peer.wall);
    const frames = peer.sent();
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

  test("timestamps are in server time, whatever the local clock", () => {
    for (const time of [0n, MAX_SERVER_TIME]) {
      const far = new Peer();
      const [event] = far.receive(Kind.WELCOME, 0, WELCOME, { time });
      assert.equal(event?.type, "welcomed");
      far.wall += 5n;
      far.request();
      assert.equal(far.sent()[0]?.timestamp, time + 5n);
    }
    assert.equal(endCode(peer.receive(Kind.WELCOME, 0, WELCOME, { time: MAX_SERVER_TIME + 1n })), Code.PROTOCOL_ERROR);
  });

  test("timestamps never exceed 64 bits", () => {
    peer.receive(Kind.WELCOME, 0, WELCOME, { time: 5n });
    peer.wall -= 100n;
    peer.request();
    assert.equal(peer.sent()[0]?.timestamp, 0n);
  });

  test("streams wrap around and skip those in flight", () => {
    peer.welcome();
    assert.equal(peer.request(), 1);
    peer.client.nextStream = 2 ** 32 - 1;
    assert.equal(peer.request(), 2 ** 32 - 1);
    assert.equal(peer.request(), 2);
  });

  test("requests in flight are limited by max_streams", () => {
    peer.welcome({ max_streams: 2 });
    const stream = peer.request();
    peer.request();
    assert.throws(() => peer.request(), ResourceExhausted);
    peer.receive(Kind.ERROR, stream, [Code.CANCELLED, ""]);
    assert.doesNotThrow(() => peer.request());
  });

  test("frame size is limited without an accepted token", () => {
    peer.welcome();
    const large = { text: "a".repeat(MAX_FRAME_BEFORE_SESSION) };
    const request = () => peer.client.request("echo", large, TOKEN, undefined, NOW);
    assert.throws(request, (error: InvalidArgument) => error.details["limit"] === MAX_FRAME_BEFORE_SESSION);
    peer.receive(Kind.RESPONSE, peer.request(), {});
    assert.doesNotThrow(request);
    peer.receive(Kind.EVENT, 0, ["session.revoked", {}], { token: TOKEN });
    assert.throws(request, InvalidArgument);
    peer.receive(Kind.RESPONSE, peer.request("session.open"), { token: tokenNumber(9) });
    assert.doesNotThrow(request);
    peer.client.sessionEnded(TOKEN);
    assert.throws(request, InvalidArgument);
  });

  test("CANCEL has the token of its request, which stays in flight", () => {
    peer.welcome();
    const streams = [peer.request(), peer.request("session.refresh")];
    peer.sent();
    for (const stream of streams) {
      peer.client.cancel(stream, NOW);
    }
    assert.deepEqual(
      peer.sent().map(({ kind, token }) => [kind, token]),
      [
        [Kind.CANCEL, TOKEN],
        [Kind.CANCEL, NO_TOKEN],
      ],
    );
    assert.equal(peer.client.inFlight, 2);
  });

  test("PONG has the token of its PING", () => {
    peer.welcome();
    assert.deepEqual(peer.receive(Kind.PING, 0, undefined, { token: TOKEN }), []);
    assert.deepEqual(
      peer.sent().map(({ kind, token }) => [kind, token]),
      [[Kind.PONG, TOKEN]],
    );
  });

  test("PINGs of one read are answered by one PONG", () => {
    peer.welcome();
    peer.receiveBytes(Buffer.concat(Array.from({ length: 100 }, () => peer.frame(Kind.PING, 0))));
    assert.deepEqual(
      peer.sent().map(({ kind }) => kind),
      [Kind.PONG],
    );
  });

  test("PING flood of a server that reads nothing queues one PONG", () => {
    peer.welcome();
    peer.client.isOutputBlocked = true;
    for (let n = 0; n < 1_000; n++) {
      peer.receive(Kind.PING, 0);
    }
    assert.equal(peer.client.queuedBytes, 0);
    peer.client.unblockOutput(NOW);
    assert.equal(peer.sent().length, 1);
    peer.client.unblockOutput(NOW);
    assert.deepEqual(peer.sent(), []);
    peer.client.isOutputBlocked = true;
    peer.receive(Kind.PING, 0);
    peer.client.end();
    peer.client.unblockOutput(NOW);
    assert.deepEqual(peer.sent(), []);
  });

  test("flood of frames that answer no request delays reading", () => {
    peer.welcome();
    const kinds: [Kind, number, unknown, number][] = [
      [Kind.PING, 0, undefined, 1],
      [Kind.EVENT, 0, ["a", null], 1],
      [Kind.EVENT, 0, ["a", new Uint8Array(20_480)], 11],
      [Kind.RESPONSE, 9, null, 1],
    ];
    for (const [kind, stream, body, cost] of kinds) {
      peer.now += (1_000 * UNREQUESTED_BURST) / UNREQUESTED_PER_S;
      for (let n = 0; n < (0.99 * UNREQUESTED_BURST) / cost; n++) {
        peer.receive(kind, stream, body);
      }
      assert.equal(peer.client.readingDelay(peer.now), 0);
      for (let n = 0; n < 400; n++) {
        peer.receive(kind, stream, body);
      }
      const delay = peer.client.readingDelay(peer.now);
      assert.ok(delay > 0 && delay < 1_200, `${delay}`);
      peer.now += delay;
      assert.ok(peer.client.readingDelay(peer.now) < 1e-6);
    }
    for (let n = 0; n < 2 * UNREQUESTED_BURST; n++) {
      peer.receive(Kind.RESPONSE, peer.request(), null);
      peer.sent();
    }
    assert.ok(peer.client.readingDelay(peer.now) < 1e-6);
  });
});

describe("freshness", () => {
  beforeEach(() => peer.welcome());

  test("wrong salt or non-increasing counter ends the connection", () => {
    assert.equal(endCode(peer.receive(Kind.PING, 0, undefined, { salt: SALT + 1n })), Code.REPLAYED);
    const other = new Peer();
    other.welcome();
    other.counter = -1n;
    assert.equal(endCode(other.receive(Kind.PING, 0)), Code.REPLAYED);
  });

  test("timestamps at both edges of the tolerance are fresh", () => {
    for (const offset of [30_000n, -30_000n]) {
      peer.receive(Kind.PING, 0, undefined, { time: NOW + offset });
    }
    assert.equal(peer.sent().length, 2);
    for (const offset of [30_001n, -30_001n]) {
      peer.receive(Kind.PING, 0, undefined, { time: NOW + offset });
    }
    assert.equal(peer.sent().length, 0);
    assert.equal(peer.client.droppedStale, 2);
  });

  test("timestamps of any value are compared", () => {
    for (const time of [0n, 2n ** 63n, 2n ** 64n - 1n]) {
      assert.deepEqual(peer.receive(Kind.PING, 0, undefined, { time }), []);
    }
    assert.equal(peer.client.droppedStale, 3);
  });

  test("stale response fails its call with DATA_LOSS and others continue", () => {
    for (const [kind, body] of [
      [Kind.RESPONSE, 1],
      [Kind.ERROR, [5, "gone"]],
    ] as const) {
      const stream = peer.request();
      const other = peer.request();
      const [event] = peer.receive(kind, stream, body, { time: 0n });
      assert.equal(event?.type === "error" && event.code, Code.DATA_LOSS);
      assert.equal(peer.client.inFlight, 1);
      assert.deepEqual(peer.receive(Kind.RESPONSE, stream, 1, { time: 0n }), []);
      assert.deepEqual(peer.receive(Kind.RESPONSE, other, 1), [{ type: "response", stream: other, value: 1 }]);
    }
    assert.equal(peer.client.droppedStale, 2);
  });

  test("frame is judged at the last byte of its header, wherever it is cut", () => {
    for (let cut = 1; cut < HEADER_SIZE + 5; cut++) {
      const fresh = cut >= HEADER_SIZE;
      const data = peer.frame(Kind.RESPONSE, peer.request(), "abcd");
      assert.deepEqual(peer.receiveBytes(data.subarray(0, cut)), []);
      peer.wall += 31_000n;
      const next = peer.frame(Kind.RESPONSE, peer.request(), "next");
      const [event, second] = peer.receiveBytes(Buffer.concat([data.subarray(cut), next]));
      assert.equal(event?.type === "error" ? event.code : undefined, fresh ? undefined : Code.DATA_LOSS);
      assert.equal(second?.type, "response");
    }
  });

  test("bytes of an incomplete frame keep the connection alive for a limited time", () => {
    const data = peer.frame(Kind.RESPONSE, peer.request(), "x".repeat(1_000));
    peer.receiveBytes(data.subarray(0, HEADER_SIZE));
    let at = HEADER_SIZE;
    for (; peer.now + 5_000 < FRAME_TIMEOUT_MS; at++) {
      peer.now += 5_000;
      assert.deepEqual(peer.receiveBytes(data.subarray(at, at + 1)), []);
      assert.equal(peer.client.handleTimeout(peer.wall, peer.now), undefined);
    }
    peer.now = FRAME_TIMEOUT_MS;
    assert.equal(endCode(peer.receiveBytes(data.subarray(at, at + 1))), undefined);
  });

  test("tenth consecutive stale frame ends the connection, a fresh one resets the count", () => {
    const stale = () => peer.receive(Kind.PING, 0, undefined, { time: 0n });
    for (let count = 0; count < 9; count++) {
      assert.deepEqual(stale(), []);
    }
    peer.receive(Kind.PING, 0);
    for (let count = 0; count < 9; count++) {
      assert.deepEqual(stale(), []);
    }
    assert.equal(endCode(stale()), Code.STALE_TIMESTAMP);
  });

  test("stale ERROR STALE_TIMESTAMP corrects the clock", () => {
    const stream = peer.request();
    peer.sent();
    const time = NOW + 3_600_000n;
    const [event] = peer.receive(Kind.ERROR, stream, [67, "stale", { server_time: time }], { time });
    assert.equal(event?.type, "error");
    peer.request();
    assert.equal(peer.sent()[0]?.timestamp, time);
  });

  test("invalid server_time is ignored", () => {
    for (const server_time of [-1, "x", null, 1.5, MAX_SERVER_TIME + 1n]) {
      const offset = peer.client.clockOffset;
      peer.receive(Kind.ERROR, peer.request(), [67, "stale", { server_time }]);
      assert.equal(peer.client.clockOffset, offset);
    }
  });
});

describe("responses", () => {
  beforeEach(() => peer.welcome());

  test("invalid response fails its call with INTERNAL and the connection continues", () => {
    for (const kind of [Kind.RESPONSE, Kind.ERROR]) {
      const [event] = peer.receive(kind, peer.request(), Buffer.from("c1", "hex"));
      assert.equal(event?.type === "error" ? event.code : undefined, Code.INTERNAL);
    }
    assert.equal(peer.client.state, "open");
  });

  test("response on an unknown stream is dropped and counted", () => {
    assert.deepEqual(peer.receive(Kind.RESPONSE, 7, 1), []);
    assert.deepEqual(peer.receive(Kind.ERROR, 7, [1, ""]), []);
    assert.equal(peer.client.droppedUnknown, 2);
  });

  test("unexpected or invalid body ends the connection", () => {
    const invalid: [Kind, unknown][] = [
      [Kind.PING, 1],
      [Kind.PONG, 1],
      [Kind.WELCOME, WELCOME],
      [Kind.EVENT, [1, 2]],
      [Kind.EVENT, ["a"]],
      [Kind.GOAWAY, { reason: "x", retry_after_ms: 1.5 }],
      [Kind.GOAWAY, { reason: "x" }],
      [Kind.ERROR, "x"],
    ];
    for (const [kind, body] of invalid) {
      const other = new Peer();
      other.welcome();
      assert.equal(endCode(other.receive(kind, 0, body)), Code.PROTOCOL_ERROR);
    }
  });

  test("GOAWAY with a float without a fraction is invalid", () => {
    const body = Buffer.from("82a6726561736f6ea178ae72657472795f61667465725f6d73cb3ff0000000000000", "hex");
    assert.equal(endCode(peer.receive(Kind.GOAWAY, 0, body)), Code.PROTOCOL_ERROR);
  });
});

describe("keepalive", () => {
  test("PING is sent after a third of the idle timeout, and ends the connection without a response", () => {
    peer.welcome({ idle_timeout_ms: 90_000 });
    assert.equal(peer.client.nextDeadline(), 30_000);
    assert.equal(peer.client.handleTimeout(NOW, 29_999), undefined);
    assert.equal(peer.sent().length, 0);
    assert.equal(peer.client.handleTimeout(NOW, 30_000), undefined);
    assert.equal(peer.sent()[0]?.kind, Kind.PING);
    assert.equal(peer.client.nextDeadline(), 30_000 + PONG_TIMEOUT_MS);
    const ended = peer.client.handleTimeout(NOW, 30_000 + PONG_TIMEOUT_MS);
    assert.equal(ended?.type, "ended");
    assert.equal(peer.client.nextDeadline(), Number.POSITIVE_INFINITY);
  });

  test("traffic in both directions delays the PING", () => {
    peer.welcome({ idle_timeout_ms: 90_000 });
    peer.now = 10_000;
    peer.receive(Kind.RESPONSE, peer.request(), 1);
    peer.sent();
    peer.client.handleTimeout(NOW, 30_000);
    assert.equal(peer.sent().length, 0);
    peer.client.handleTimeout(NOW, 60_000);
    assert.equal(peer.sent()[0]?.kind, Kind.PING);
    peer.now = 60_001;
    peer.receive(Kind.PONG, 0);
    assert.equal(peer.client.nextDeadline(), 90_000);
  });

  test("tiny idle timeout has a minimum interval, and 0 disables keepalive", () => {
    peer.welcome({ idle_timeout_ms: 3 });
    assert.equal(peer.client.nextDeadline(), 250);
    const other = new Peer();
    other.welcome({ idle_timeout_ms: 0 });
    assert.equal(other.client.nextDeadline(), Number.POSITIVE_INFINITY);
  });
});
