/** Calls of the server on a ClientConnection: every state with every input, refusals, and answers. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { ClientEvent } from "../src/connection/events.js";
import { UNREQUESTED_BURST } from "../src/connection/flood_limit.js";
import { MAX_BLOCKED_REFUSALS } from "../src/connection/server_calls.js";
import { type CallError, Cancelled, Code, NotFound, TokenExpired, Unimplemented } from "../src/errors.js";
import { decodeBody } from "../src/wire/body.js";
import { type Frame, Kind, MIN_LENGTH, NO_TOKEN } from "../src/wire/frame.js";
import { tokenNumber, tokenText } from "./support/fake.js";
import { endCode, NOW, Peer, TOKEN } from "./support/peer.js";

const CALLS = { calls: { max: 32 } };
const CALL = ["approve", { tool: "shell" }, { deadline_ms: 1_000 }];
const STALE = NOW - 30_001n;
const NEWER = tokenText(10);

function registered(more: object = CALLS): Peer {
  const peer = new Peer();
  peer.welcome(more);
  peer.client.handle(TOKEN, ["approve"], 4, NOW);
  peer.sent();
  return peer;
}

/** Return the kind, the number and the code or value of each answer. */
function answers(peer: Peer): unknown[] {
  return peer.sent().map(({ kind, stream, body }) => {
    const value = decodeBody(body);
    return [kind, stream, kind === Kind.FAILURE ? (value as unknown[])[0] : value];
  });
}

function receive(peer: Peer, kind: Kind, body: unknown, { token = TOKEN, time = NOW, stream = 1 } = {}): ClientEvent[] {
  return peer.receive(kind, stream, body, { token, time });
}

/** Replace the token of a session by that of a number. */
function refresh(peer: Peer, token: string, number: number): void {
  const stream = peer.client.request("session.refresh", null, token, undefined, NOW);
  peer.receive(Kind.RESPONSE, stream, { token: tokenNumber(number) });
  peer.sent();
}

describe("states", () => {
  const inputs: Readonly<Record<string, (peer: Peer) => ClientEvent[]>> = {
    call: (peer) => receive(peer, Kind.CALL, CALL),
    "stale call": (peer) => receive(peer, Kind.CALL, CALL, { time: STALE }),
    withdraw: (peer) => receive(peer, Kind.WITHDRAW, undefined),
    "stale withdraw": (peer) => receive(peer, Kind.WITHDRAW, undefined, { time: STALE }),
    answer: (peer) => {
      peer.client.calls.answer(1, true, NOW);
      return [];
    },
    fail: (peer) => {
      peer.client.calls.fail(1, new NotFound(), NOW);
      return [];
    },
  };
  const cancelled = [Kind.FAILURE, 1, Code.CANCELLED];
  const table = {
    none: {
      call: [["call"], []],
      "stale call": [[], [[Kind.FAILURE, 1, Code.STALE_TIMESTAMP]]],
      withdraw: [[], []],
      "stale withdraw": [[], []],
      answer: [[], []],
      fail: [[], []],
    },
    running: {
      call: [["ended"], []],
      "stale call": [["ended"], []],
      withdraw: [["withdrawn"], [cancelled]],
      "stale withdraw": [["withdrawn"], [cancelled]],
      answer: [[], [[Kind.RESULT, 1, true]]],
      fail: [[], [[Kind.FAILURE, 1, Code.NOT_FOUND]]],
    },
  };
  for (const [state, cases] of Object.entries(table)) {
    for (const [given, [events, sent]] of Object.entries(cases)) {
      test(`${state}: ${given}`, () => {
        const peer = registered();
        if (state === "running") {
          receive(peer, Kind.CALL, CALL);
        }
        const types = (inputs[given] as (peer: Peer) => ClientEvent[])(peer).map(({ type }) => type);
        assert.deepEqual(types, events);
        assert.deepEqual(answers(peer), sent);
      });
    }
  }

  test("each call is answered once, and its number is free after that", () => {
    const peer = registered();
    receive(peer, Kind.CALL, CALL);
    receive(peer, Kind.WITHDRAW, undefined);
    peer.client.calls.answer(1, true, NOW);
    assert.equal(answers(peer).length, 1);
    assert.equal(receive(peer, Kind.CALL, CALL)[0]?.type, "call");
    peer.client.end();
    peer.client.calls.answer(1, true, NOW);
    assert.deepEqual(answers(peer), []);
  });
});

describe("registration", () => {
  test("session.handle has the methods and max", () => {
    const peer = new Peer();
    peer.welcome(CALLS);
    peer.client.handle(TOKEN, ["a", "b"], 4, NOW);
    const [frame] = peer.sent();
    assert.equal(frame?.token, TOKEN);
    assert.deepEqual(decodeBody((frame as Frame).body), ["session.handle", { methods: ["a", "b"], max: 4 }]);
  });

  test("server that does not call clients gets nothing", () => {
    const peer = new Peer();
    peer.welcome({ streams: { max_open: 1, max_item: 64 } });
    assert.throws(() => peer.client.handle(TOKEN, ["a"], 4, NOW), Unimplemented);
    assert.deepEqual(peer.sent(), []);
  });

  test("CALL and WITHDRAW before session.handle end the connection", () => {
    for (const kind of [Kind.CALL, Kind.WITHDRAW]) {
      const peer = new Peer();
      peer.welcome(CALLS);
      assert.equal(endCode(receive(peer, kind, undefined)), Code.PROTOCOL_ERROR);
    }
  });

  test("streams and calls exist beside each other", () => {
    const peer = registered({ ...CALLS, streams: { max_open: 1, max_item: 64 } });
    const { number } = peer.client.openStream("m", {}, TOKEN, { window: [1, 1] }, NOW);
    assert.equal(receive(peer, Kind.CALL, CALL, { stream: number })[0]?.type, "call");
    assert.equal(receive(peer, Kind.CREDIT, [1, 1], { stream: number })[0]?.type, "credit");
    assert.equal(receive(peer, Kind.RESPONSE, 1, { stream: number })[0]?.type, "response");
    peer.sent();
    peer.client.calls.answer(number, null, NOW);
    assert.deepEqual(answers(peer), [[Kind.RESULT, number, null]]);
  });

  test("call reaches the session by its token, the last two of a refreshed session", () => {
    const peer = registered();
    const code = (token: string) => {
      const [event] = receive(peer, Kind.CALL, CALL, { token });
      peer.client.calls.answer(1, null, NOW);
      const [answer] = answers(peer) as [Kind, number, unknown][];
      return event === undefined ? answer?.[2] : event.type;
    };
    assert.equal(code(NEWER), Code.UNAUTHENTICATED);
    refresh(peer, TOKEN, 10);
    assert.deepEqual([code(NEWER), code(TOKEN), code(NO_TOKEN)], ["call", "call", Code.UNAUTHENTICATED]);
    refresh(peer, NEWER, 11);
    assert.deepEqual([code(TOKEN), code(NEWER), code(tokenText(11))], [Code.UNAUTHENTICATED, "call", "call"]);
    refresh(peer, tokenText(77), 78); // not registered
    assert.equal(code(tokenText(78)), Code.UNAUTHENTICATED);
    peer.client.sessionEnded(tokenText(11));
    assert.deepEqual([code(NEWER), code(tokenText(11))], [Code.UNAUTHENTICATED, Code.UNAUTHENTICATED]);
  });

  test("later registration replaces the methods", () => {
    const peer = registered();
    peer.client.handle(TOKEN, [], 4, NOW);
    peer.sent();
    assert.deepEqual(receive(peer, Kind.CALL, CALL), []);
    assert.deepEqual(answers(peer), [[Kind.FAILURE, 1, Code.UNIMPLEMENTED]]);
  });
});

describe("calls", () => {
  test("call has its method, params, deadline and trace", () => {
    const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const [event] = receive(registered(), Kind.CALL, ["approve", null, { deadline_ms: 5, traceparent, more: 1 }]);
    const expected = { stream: 1, token: TOKEN, method: "approve", params: {}, deadlineMs: 5, traceparent };
    assert.deepEqual(event, { type: "call", ...expected });
  });

  test("invalid call is refused and the connection continues", () => {
    const peer = registered();
    const invalid = [
      "approve",
      ["approve"],
      ["approve", {}],
      ["approve", {}, {}],
      ["approve", {}, null],
      ["approve", [], { deadline_ms: 1 }],
      ["Approve", {}, { deadline_ms: 1 }],
      ["approve", {}, { deadline_ms: 1.5 }],
      ["approve", {}, { deadline_ms: "1" }],
      ["approve", {}, { deadline_ms: null }],
      Buffer.from("c1", "hex"),
    ];
    for (const body of invalid) {
      assert.deepEqual(receive(peer, Kind.CALL, body), []);
      assert.deepEqual(answers(peer), [[Kind.FAILURE, 1, Code.INVALID_ARGUMENT]]);
    }
  });

  test("call whose deadline has passed is refused", () => {
    const peer = registered();
    receive(peer, Kind.CALL, ["approve", {}, { deadline_ms: 0 }]);
    assert.deepEqual(answers(peer), [[Kind.FAILURE, 1, Code.DEADLINE_EXCEEDED]]);
  });

  test("WITHDRAW with another token is ignored", () => {
    const peer = registered();
    receive(peer, Kind.CALL, CALL);
    assert.deepEqual(receive(peer, Kind.WITHDRAW, undefined, { token: NEWER }), []);
    assert.deepEqual(answers(peer), []);
  });

  test("server that calls and reads no answers is disconnected", () => {
    const peer = registered();
    peer.client.isOutputBlocked = true;
    for (let n = 0; n < MAX_BLOCKED_REFUSALS; n++) {
      assert.deepEqual(receive(peer, Kind.CALL, null), []);
    }
    assert.equal(endCode(receive(peer, Kind.CALL, null)), Code.PROTOCOL_ERROR);
  });

  test("WITHDRAW with a body ends the connection", () => {
    const peer = registered();
    receive(peer, Kind.CALL, CALL);
    assert.equal(endCode(receive(peer, Kind.WITHDRAW, null)), Code.PROTOCOL_ERROR);
  });

  test("result that cannot be sent fails the call with INTERNAL", () => {
    const peer = registered({ ...CALLS, max_frame: 1_000 });
    const fits = "x".repeat(1_000 - MIN_LENGTH - 3);
    for (const [result, answer] of [
      [fits, [Kind.RESULT, 1, fits]],
      [`${fits}x`, [Kind.FAILURE, 1, Code.INTERNAL]],
      [new Date(), [Kind.FAILURE, 1, Code.INTERNAL]],
    ] as const) {
      receive(peer, Kind.CALL, CALL);
      peer.client.calls.answer(1, result, NOW);
      assert.deepEqual(answers(peer), [answer]);
    }
  });

  test("failure has the code, the message and the details that can be sent", () => {
    const peer = registered({ ...CALLS, max_frame: 1_000 });
    const failed = (error: CallError) => {
      receive(peer, Kind.CALL, CALL);
      peer.client.calls.fail(1, error, NOW);
      return decodeBody((peer.sent()[0] as Frame).body);
    };
    assert.deepEqual(failed(new NotFound("no such tool", { tool: 1 })), [Code.NOT_FOUND, "no such tool", { tool: 1 }]);
    assert.deepEqual(failed(new Cancelled("no", { at: new Date() })), [Code.CANCELLED, "the error cannot be sent"]);
    assert.deepEqual(failed(new NotFound("x".repeat(1_000))), [Code.NOT_FOUND, "the error cannot be sent"]);
    assert.deepEqual(failed(new TokenExpired("")), [Code.UNKNOWN, "", {}]);
  });

  test("flood of calls delays reading", () => {
    const peer = registered();
    for (let n = 0; n < UNREQUESTED_BURST + 100; n++) {
      receive(peer, Kind.CALL, CALL);
      peer.client.calls.answer(1, null, NOW);
    }
    assert.ok(peer.client.readingDelay(0) > 0);
  });
});
