/** Streams of items of a ClientConnection: every state with every input, credit, and limits. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { ItemQueue, SendCredit } from "../src/connection/credit.js";
import type { ClientEvent } from "../src/connection/events.js";
import type { ItemStream, ItemStreamState } from "../src/connection/item_streams.js";
import {
  Code,
  ConnectionClosed,
  InternalError,
  InvalidArgument,
  ResourceExhausted,
  Unavailable,
  Unimplemented,
} from "../src/errors.js";
import { decodeBody, encodeBody } from "../src/wire/body.js";
import { HEADER_SIZE, Kind, MIN_LENGTH } from "../src/wire/frame.js";
import type { Credit } from "../src/wire/message.js";
import { tokenNumber } from "./support/fake.js";
import { endCode, NOW, Peer, TOKEN } from "./support/peer.js";

const STREAMS = { streams: { max_open: 2, max_item: 1_000 } };
const WINDOW: Credit = [2, 10_000];

function opened(more: object = STREAMS): Peer {
  const peer = new Peer();
  peer.welcome(more);
  return peer;
}

function open(peer: Peer, window: Credit = WINDOW): ItemStream {
  return peer.client.openStream("m", {}, TOKEN, { window }, NOW);
}

/** A stream in a state: two items were granted, and the server allows one. */
class Row {
  readonly peer = opened();
  readonly stream = open(this.peer);

  constructor(state: ItemStreamState) {
    this.receive(Kind.CREDIT, [1, 1_000]);
    if (state === "half") {
      this.end();
    } else if (state === "leaving") {
      this.leave();
    } else if (state === "none") {
      this.receive(Kind.RESPONSE, null);
    }
    this.peer.sent();
  }

  receive(kind: Kind, body: unknown, { time = NOW } = {}): ClientEvent[] {
    return this.peer.receive(kind, 1, body, { token: TOKEN, time });
  }

  send(): ClientEvent[] {
    if (this.stream.maySend) {
      this.peer.client.streams.sendItem(this.stream, 1, NOW);
    }
    return [];
  }

  end(): ClientEvent[] {
    this.peer.client.streams.endItems(this.stream, NOW);
    return [];
  }

  leave(): ClientEvent[] {
    this.peer.client.cancel(1, NOW);
    return [];
  }

  lose(): ClientEvent[] {
    this.peer.client.end();
    return [];
  }
}

const STALE = { time: NOW - 30_001n };
const INPUTS: Readonly<Record<string, (row: Row) => ClientEvent[]>> = {
  item: (row) => row.receive(Kind.ITEM, 1),
  "items beyond credit": (row) => [1, 2, 3].flatMap((item) => row.receive(Kind.ITEM, item)),
  credit: (row) => row.receive(Kind.CREDIT, [5, 5_000]),
  "credit lower": (row) => row.receive(Kind.CREDIT, [0, 5_000]),
  response: (row) => row.receive(Kind.RESPONSE, 1),
  error: (row) => row.receive(Kind.ERROR, [Code.NOT_FOUND, ""]),
  "stale item": (row) => row.receive(Kind.ITEM, 1, STALE),
  "stale credit": (row) => row.receive(Kind.CREDIT, [5, 5_000], STALE),
  "stale response": (row) => row.receive(Kind.RESPONSE, 1, STALE),
  send: (row) => row.send(),
  end: (row) => row.end(),
  leave: (row) => row.leave(),
  goaway: (row) => row.peer.receive(Kind.GOAWAY, 0, { reason: "draining", retry_after_ms: 1 }),
  "connection lost": (row) => row.lose(),
};

interface Case {
  readonly next: ItemStreamState | "ended";
  readonly events?: readonly string[];
  readonly sent?: readonly Kind[];
}

function inFlight(state: ItemStreamState): Record<string, Case> {
  return {
    item: { next: state, events: ["item"] },
    "items beyond credit": { next: "ended", events: ["item", "item", "ended"] },
    credit: { next: state, events: ["credit"] },
    "credit lower": { next: "ended", events: ["ended"] },
    response: { next: "none", events: ["response"] },
    error: { next: "none", events: ["error"] },
    "stale item": { next: "leaving", events: ["error"], sent: [Kind.CANCEL] },
    "stale credit": { next: "leaving", events: ["error"], sent: [Kind.CANCEL] },
    "stale response": { next: "none", events: ["error"] },
    send: { next: state },
    end: { next: "half" },
    leave: { next: "leaving", sent: [Kind.CANCEL] },
    goaway: { next: state, events: ["goaway"] },
    "connection lost": { next: state },
  };
}

const unchanged = (next: ItemStreamState): Record<string, Case> =>
  Object.fromEntries(Object.keys(INPUTS).map((input) => [input, { next }]));

const TABLE: Readonly<Record<ItemStreamState, Readonly<Record<string, Case>>>> = {
  open: {
    ...inFlight("open"),
    send: { next: "open", sent: [Kind.ITEM] },
    end: { next: "half", sent: [Kind.END] },
  },
  half: inFlight("half"),
  leaving: {
    ...unchanged("leaving"),
    response: { next: "none", events: ["response"] },
    error: { next: "none", events: ["error"] },
    "stale response": { next: "none", events: ["error"] },
    goaway: { next: "leaving", events: ["goaway"] },
  },
  none: { ...unchanged("none"), goaway: { next: "none", events: ["goaway"] } },
};

describe("states", () => {
  for (const [state, cases] of Object.entries(TABLE)) {
    for (const [given, input] of Object.entries(INPUTS)) {
      test(`${state}: ${given}`, () => {
        const row = new Row(state as ItemStreamState);
        const events = input(row);
        const { next, events: expected = [], sent = [] } = cases[given] as Case;
        assert.deepEqual(
          events.map(({ type }) => type),
          expected,
        );
        if (next === "ended") {
          assert.equal(row.peer.client.state, "closed");
          return;
        }
        assert.equal(row.stream.state, next);
        assert.deepEqual(
          row.peer.sent().map(({ kind }) => kind),
          sent,
        );
      });
    }
  }
});

describe("opening", () => {
  test("OPEN has the method, the token and the window", () => {
    const peer = opened();
    peer.client.openStream("tokens", { n: 1 }, TOKEN, { window: [3, 4], deadline_ms: 5 }, NOW);
    const [frame] = peer.sent();
    assert.equal(frame?.kind, Kind.OPEN);
    assert.equal(frame.token, TOKEN);
    assert.deepEqual(decodeBody(frame.body), ["tokens", { n: 1 }, { credit: [3, 4], deadline_ms: 5 }]);
  });

  test("server without streams gets nothing", () => {
    const peer = opened({});
    assert.throws(() => open(peer), Unimplemented);
    assert.deepEqual(peer.sent(), []);
    assert.equal(endCode(peer.receive(Kind.ITEM, 1, 1)), Code.PROTOCOL_ERROR);
  });

  test("streams are limited by max_open and by max_streams, and requests continue", () => {
    const peer = opened();
    open(peer);
    open(peer);
    assert.throws(
      () => open(peer),
      (error) => error instanceof ResourceExhausted && error.details["limit"] === 2,
    );
    assert.doesNotThrow(() => peer.request());
    const small = opened({ ...STREAMS, max_streams: 1 });
    small.request();
    assert.throws(
      () => open(small),
      (error) => error instanceof ResourceExhausted && !("limit" in error.details),
    );
  });

  test("no stream is opened after GOAWAY or the end", () => {
    const peer = opened();
    peer.receive(Kind.GOAWAY, 0, { reason: "draining", retry_after_ms: 1 });
    assert.throws(() => open(peer), Unavailable);
    peer.client.end();
    assert.throws(() => open(peer), ConnectionClosed);
  });

  test("left stream counts until its answer", () => {
    const peer = opened({ streams: { max_open: 1, max_item: 1_000 } });
    const { number } = open(peer);
    peer.client.cancel(number, NOW);
    assert.throws(() => open(peer), ResourceExhausted);
    peer.receive(Kind.ERROR, number, [Code.CANCELLED, ""]);
    assert.doesNotThrow(() => open(peer));
  });
});

describe("items", () => {
  test("taken items are granted again, and items outlive the answer", () => {
    const { peer, stream, receive } = withReceive();
    receive(Kind.ITEM, "one");
    receive(Kind.ITEM, "two");
    assert.equal(peer.client.streams.takeItem(stream, NOW), "one");
    const [credit] = peer.sent();
    assert.equal(credit?.kind, Kind.CREDIT);
    assert.deepEqual(decodeBody(credit.body), [3, 10_000 + MIN_LENGTH + 4]);
    receive(Kind.RESPONSE, null);
    assert.equal(peer.client.streams.takeItem(stream, NOW), "two");
    assert.deepEqual(peer.sent(), []);
  });

  test("invalid item is an InternalError with its number", () => {
    const { peer, stream, receive } = withReceive();
    receive(Kind.ITEM, "one");
    receive(Kind.ITEM, Buffer.from("c1", "hex"));
    peer.client.streams.takeItem(stream, NOW);
    assert.throws(
      () => peer.client.streams.takeItem(stream, NOW),
      (error) => error instanceof InternalError && /item 1 /.test(error.message),
    );
  });

  test("item of more than max_item is refused, at both ends", () => {
    const { peer, stream, receive } = withReceive();
    const item = "x".repeat(1_000 - MIN_LENGTH - 3);
    assert.throws(() => peer.client.streams.sendItem(stream, `${item}x`, NOW), InvalidArgument);
    assert.throws(() => peer.client.streams.sendItem(stream, () => 0, NOW), InvalidArgument);
    assert.ok(stream.maySend);
    peer.sent();
    peer.client.streams.sendItem(stream, item, NOW);
    assert.equal(peer.sent()[0]?.length, 1_000);
    assert.ok(!stream.maySend);
    assert.equal(receive(Kind.ITEM, item)[0]?.type, "item");
    const tooLong = peer.frame(Kind.ITEM, 1, `${item}x`).subarray(0, HEADER_SIZE);
    assert.equal(endCode(peer.receiveBytes(tooLong)), Code.FRAME_TOO_LARGE);
  });

  test("ITEM and CREDIT on the stream of a REQUEST end the connection", () => {
    for (const kind of [Kind.ITEM, Kind.CREDIT]) {
      const peer = opened();
      assert.equal(endCode(peer.receive(kind, peer.request(), [9, 9])), Code.PROTOCOL_ERROR);
    }
  });

  test("frames keep the token of OPEN after a refresh", () => {
    const { peer, stream, receive } = withReceive();
    receive(Kind.CREDIT, [9, 9_000]);
    const refresh = peer.client.request("session.refresh", null, TOKEN, undefined, NOW);
    peer.receive(Kind.RESPONSE, refresh, { token: tokenNumber(10) });
    peer.sent();
    receive(Kind.ITEM, 1);
    peer.client.streams.takeItem(stream, NOW);
    peer.client.streams.sendItem(stream, 1, NOW);
    peer.client.streams.endItems(stream, NOW);
    peer.client.cancel(1, NOW);
    const frames = peer.sent();
    assert.deepEqual(
      frames.map(({ kind }) => kind),
      [Kind.CREDIT, Kind.ITEM, Kind.END, Kind.CANCEL],
    );
    assert.ok(frames.every(({ token }) => token === TOKEN));
  });

  test("taking an item that does not wait is a bug", () => {
    const { peer, stream } = withReceive();
    assert.throws(() => peer.client.streams.takeItem(stream, NOW), /bug/);
  });

  function withReceive() {
    const row = new Row("open");
    return { peer: row.peer, stream: row.stream, receive: row.receive.bind(row) };
  }
});

describe("credit", () => {
  const body = (...totals: unknown[]) => Buffer.from(encodeBody(totals));

  test("CREDIT has totals that replace the earlier ones", () => {
    const credit = new SendCredit([0, 0]);
    credit.read(body(3, 100));
    credit.read(body(3, 100));
    let sent = 0;
    for (; credit.maySend; sent++) {
      credit.count(10);
    }
    assert.equal(sent, 3);
  });

  test("item may exceed the bytes that are left, and is then the last", () => {
    const credit = new SendCredit([10, 1]);
    assert.ok(credit.maySend);
    credit.count(5_000);
    assert.ok(!credit.maySend);
  });

  test("lower totals and other forms are refused", () => {
    const invalid = [body(1, 500), body(9, 1), body(1), body(1, 2, 3), body("1", 2), body(-1, 2), Buffer.alloc(0)];
    for (const bytes of [...invalid, Buffer.from("92cb3ff000000000000064", "hex")]) {
      assert.throws(() => new SendCredit([2, 100]).read(bytes), { code: Code.PROTOCOL_ERROR });
    }
  });

  test("window is granted again once half of its items or bytes is used", () => {
    const items = new ItemQueue([10, 10_000], [10, 10_000]);
    const grants: (Credit | undefined)[] = [];
    for (let n = 0; n < 10; n++) {
      items.receive(Buffer.alloc(0));
      items.take();
      grants.push(items.nextGrant());
    }
    assert.deepEqual(
      grants.map((grant) => grant?.[0]),
      [undefined, undefined, undefined, undefined, 15, undefined, undefined, undefined, undefined, 20],
    );
    items.receive(Buffer.alloc(6_000));
    items.take();
    assert.deepEqual(items.nextGrant(), [21, 10_000 + 11 * MIN_LENGTH + 6_000]);
  });

  test("taking all items always allows another one, whatever the window", () => {
    for (const window of [
      [1, 1],
      [2, 1],
      [1, 65],
      [3, 200],
    ] as Credit[]) {
      const items = new ItemQueue(window, window);
      for (let n = 0; n < 100; n++) {
        items.receive(Buffer.alloc(n));
        items.take();
        items.nextGrant();
      }
      assert.equal(items.taken, 100);
    }
  });

  test("nothing is granted for items that are only stored, nor after the end", () => {
    const items = new ItemQueue([4, 4_000], [4, 4_000]);
    for (let n = 0; n < 4; n++) {
      items.receive(Buffer.alloc(0));
    }
    assert.equal(items.nextGrant(), undefined);
    assert.throws(() => items.receive(Buffer.alloc(0)), { code: Code.PROTOCOL_ERROR });
    items.end();
    items.take();
    items.take();
    assert.equal(items.nextGrant(), undefined);
    assert.equal(items.held, 2);
  });
});
