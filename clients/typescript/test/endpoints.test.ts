/** Endpoints and rounds: which address is tried next, and when. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { type Address, type Endpoint, endpointText, MAX_ADDRESSES, parseAddresses } from "../src/client/address.js";
import {
  ATTEMPT_DELAY_MS,
  Endpoints,
  GoingAway,
  HANDSHAKE_DELAY_MS,
  MAX_ENDPOINTS,
  RESOLUTION_DELAY_MS,
  type Round,
  STABLE_AFTER_MS,
} from "../src/client/endpoints.js";
import { CannotConnect, ConfigError, ConnectionClosed, TlsError, type ZcprotoError } from "../src/errors.js";

const START = 1_000_000;
const NEVER = Number.POSITIVE_INFINITY;
const [A, B] = parseAddresses(["a.example", "b.example"]) as unknown as [Address, Address];
const REFUSED = new CannotConnect("refused", { refused: true });
const CLOSED = new ConnectionClosed("cut");
const AWAY = new GoingAway("the server is going away");
const WRONG_PIN = new TlsError("pin_mismatch");

function listed(random = 0.5, addresses = [A, B]): Endpoints {
  return new Endpoints({ addresses, isRandom: false, random: () => random });
}

function at(address: Address, ip: string): Endpoint {
  return { ...address, ip };
}

/** Begin a round whose names are resolved at once. */
function begin(endpoints: Endpoints, found: Record<string, string[]>, now = START): Round {
  const round = endpoints.beginRound();
  for (const address of round.order) {
    round.resolved(address, found[address.host] ?? [], now);
  }
  return round;
}

/** Let each attempt of a round fail, and return their IP addresses in order. */
function tried(round: Round, now = START, error: (endpoint: Endpoint) => ZcprotoError = () => REFUSED): string[] {
  const ips: string[] = [];
  for (let next = round.next(now); typeof next !== "number"; next = round.next(now)) {
    ips.push(next.ip);
    round.failed(next, error(next), now);
  }
  return ips;
}

function near(actual: number, expected: number): void {
  assert.ok(Math.abs(actual - expected) < 1, `${actual} is not about ${expected}`);
}

describe("addresses", () => {
  test("several addresses are an array or a text with commas, each once", () => {
    const expected = [
      { host: "a.example", port: 7443 },
      { host: "b.example", port: 7444 },
    ];
    assert.deepEqual(parseAddresses("a.example, b.example:7444,A.example"), expected);
    assert.deepEqual(parseAddresses(["a.example:7443", "b.example:7444"]), expected);
  });

  test("number of addresses is limited", () => {
    for (const count of [0, MAX_ADDRESSES + 1]) {
      const given = Array.from({ length: count }, (_, n) => `host-${n}`);
      assert.throws(() => parseAddresses(given), ConfigError);
    }
  });

  test("endpoint as text names what was given and the IP address", () => {
    assert.equal(endpointText(at(A, "192.0.2.1")), "a.example:7443 (192.0.2.1)");
    assert.equal(endpointText({ host: "::1", port: 7443, ip: "::1" }), "[::1]:7443");
  });
});

describe("order of attempts", () => {
  test("listed addresses come in their order, and families alternate", () => {
    const found = {
      "a.example": ["2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.1"],
      "b.example": ["192.0.2.9", "2001:db8::9"],
    };
    const expected = ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.9", "2001:db8::9"];
    assert.deepEqual(tried(begin(listed(), found)), expected);
  });

  test("random order shuffles addresses, and those of a family", () => {
    const endpoints = new Endpoints({ addresses: [A, B], isRandom: true, random: () => 0 });
    const found = { "a.example": ["2001:db8::1", "192.0.2.1", "192.0.2.2"], "b.example": ["192.0.2.9"] };
    assert.deepEqual(tried(begin(endpoints, found)), ["192.0.2.9", "2001:db8::1", "192.0.2.2", "192.0.2.1"]);
  });

  test("endpoint of the last connection comes first", () => {
    const endpoints = listed();
    endpoints.connected(at(B, "192.0.2.3"), START);
    const found = { "a.example": ["192.0.2.1"], "b.example": ["192.0.2.2", "192.0.2.3"] };
    assert.deepEqual(tried(begin(endpoints, found)), ["192.0.2.3", "192.0.2.2", "192.0.2.1"]);
  });

  test("number of endpoints in a round is limited", () => {
    const ips = (net: number) => Array.from({ length: 60 }, (_, n) => `192.0.${net}.${n}`);
    assert.equal(tried(begin(listed(), { "a.example": ips(2), "b.example": ips(3) })).length, MAX_ENDPOINTS);
  });
});

describe("the next attempt beside those under way", () => {
  const found = { "a.example": ["192.0.2.1"], "b.example": ["192.0.2.2"] };

  test("begins at once after a failure", () => {
    const round = begin(listed(), found);
    const first = round.next(START) as Endpoint;
    round.failed(first, REFUSED, START + 10);
    assert.deepEqual(round.next(START + 10), at(B, "192.0.2.2"));
  });

  test("begins after a delay without a TCP connection", () => {
    const round = begin(listed(), found);
    round.next(START);
    assert.equal(round.next(START), START + ATTEMPT_DELAY_MS);
    assert.deepEqual(round.next(START + ATTEMPT_DELAY_MS), at(B, "192.0.2.2"));
    assert.equal(round.next(START + ATTEMPT_DELAY_MS), NEVER);
  });

  test("waits longer for a handshake", () => {
    const round = begin(listed(), found);
    round.reached(round.next(START) as Endpoint, START + 100);
    assert.equal(round.next(START + ATTEMPT_DELAY_MS), START + 100 + HANDSHAKE_DELAY_MS);
  });

  test("does not begin sooner because an earlier attempt has failed", () => {
    const round = begin(listed(), { "a.example": ["192.0.2.1", "192.0.2.3"], "b.example": ["192.0.2.2"] });
    const first = round.next(START) as Endpoint;
    const later = START + ATTEMPT_DELAY_MS;
    round.next(later);
    round.reached(first, later);
    round.failed(first, REFUSED, later);
    assert.equal(round.next(later), later + ATTEMPT_DELAY_MS);
  });

  test("can be of an endpoint that rested when the round began", () => {
    const endpoints = listed(0.9);
    endpoints.connected(at(A, "192.0.2.1"), START);
    endpoints.lost(at(A, "192.0.2.1"), START, 0);
    const round = begin(endpoints, found);
    assert.deepEqual(round.next(START), at(B, "192.0.2.2"));
    near(round.next(START) as number, START + 90);
    assert.deepEqual(round.next(START + ATTEMPT_DELAY_MS), at(A, "192.0.2.1"));
  });
});

describe("names", () => {
  test("first attempt waits for the first name, or a moment after another one", () => {
    const round = listed().beginRound();
    assert.equal(round.next(START), NEVER);
    round.resolved(B, ["192.0.2.2"], START);
    assert.equal(round.next(START), START + RESOLUTION_DELAY_MS);
    assert.deepEqual(round.next(START + RESOLUTION_DELAY_MS), at(B, "192.0.2.2"));
    round.resolved(A, ["192.0.2.1"], START + 100);
    round.failed(at(B, "192.0.2.2"), REFUSED, START + 100);
    assert.equal(typeof round.next(START + 300), "object", "a slow name joins later");
  });

  test("name that cannot be resolved rests like an endpoint", () => {
    const endpoints = listed(0.9, [A]);
    const delays = [90, 180, 360];
    for (const delay of delays) {
      endpoints.beginRound().unresolved(A, CLOSED, START);
      near(endpoints.dueAt, START + delay);
    }
  });
});

test("name that was not resolved when another answered does not wait for that one to rest", () => {
  const endpoints = listed();
  const a = at(A, "192.0.2.1");
  endpoints.beginRound().resolved(A, [a.ip], START);
  endpoints.connected(a, START);
  const now = START + STABLE_AFTER_MS;
  endpoints.lost(a, now, 60_000);
  assert.equal(endpoints.dueAt, -NEVER);
  assert.deepEqual(tried(begin(endpoints, { "a.example": [a.ip], "b.example": ["192.0.2.2"] }, now), now), [
    "192.0.2.2",
  ]);
  near(endpoints.dueAt, now + 50);
});

describe("rests", () => {
  const a = at(A, "192.0.2.1");
  const b = at(B, "192.0.2.2");

  test("lasting connection resets the backoff of its endpoint alone", () => {
    const endpoints = listed(1);
    endpoints.connected(a, START);
    for (let count = 0; count < 4; count++) {
      endpoints.failed(b, REFUSED, START);
      endpoints.lost(a, START, 0);
    }
    endpoints.connected(a, START);
    endpoints.lost(a, START + STABLE_AFTER_MS, 0);
    endpoints.failed(b, REFUSED, START + STABLE_AFTER_MS);
    near(endpoints.restsUntil(a), START + STABLE_AFTER_MS + 100);
    near(endpoints.restsUntil(b), START + STABLE_AFTER_MS + 1_600);
  });

  test("server that goes away rests as long as it asks", () => {
    const endpoints = listed();
    endpoints.connected(a, START);
    endpoints.lost(a, START, 2_000);
    near(endpoints.restsUntil(a), START + 2_050);
  });
});

describe("the error of a round", () => {
  function failure(errors: [ZcprotoError, ZcprotoError], hasConnected: boolean, startsUntil = NEVER) {
    const endpoints = listed();
    if (hasConnected) {
      endpoints.connected(at(A, "192.0.2.9"), START);
    }
    const found = { "a.example": ["192.0.2.1"], "b.example": ["192.0.2.2"] };
    tried(begin(endpoints, found), START, ({ host }) => errors[host === "a.example" ? 0 : 1]);
    return endpoints.failure(startsUntil);
  }

  test("first round is repeated while a server may be starting", () => {
    assert.equal(failure([REFUSED, REFUSED], false), undefined);
    assert.equal(failure([CLOSED, AWAY], false), undefined);
    assert.equal(failure([CLOSED, CLOSED], false), CLOSED);
    assert.equal(failure([REFUSED, WRONG_PIN], false), WRONG_PIN);
    assert.equal(failure([REFUSED, CLOSED], false, START), CLOSED);
    assert.equal(failure([REFUSED, REFUSED], false, START), REFUSED);
  });

  test("later rounds are repeated unless all have failed permanently", () => {
    assert.equal(failure([CLOSED, CLOSED], true), undefined);
    assert.equal(failure([REFUSED, WRONG_PIN], true), undefined);
    assert.equal(failure([WRONG_PIN, WRONG_PIN], true), WRONG_PIN);
  });
});
