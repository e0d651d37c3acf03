/** When a server counts as silent: every step with its time. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BYTES_PER_SECOND, PROBE_MS, QUIET_MS, RECENT_MS, Silence } from "../src/connection/silence.js";

describe("Silence", () => {
  test("PING after a quiet time, then silent, then heard", () => {
    const silence = new Silence(100);
    assert.equal(silence.check(100, 0), 100 + QUIET_MS);
    assert.equal(silence.heard(1_000), false);
    assert.equal(silence.check(100 + QUIET_MS, 0), 1_000 + QUIET_MS);
    assert.equal(silence.check(1_000 + QUIET_MS, 0), "ping");
    silence.probe(7_000, 0);
    assert.equal(silence.check(7_000, 0), 7_000 + PROBE_MS);
    assert.equal(silence.isSilent, false);
    assert.equal(silence.check(7_000 + PROBE_MS, 0), "silent");
    assert.deepEqual([silence.isSilent, silence.isProbed], [true, true]);
    assert.equal(silence.heard(20_000), true);
    assert.deepEqual([silence.isSilent, silence.isProbed], [false, false]);
    assert.equal(silence.check(20_000, 0), 20_000 + QUIET_MS);
  });

  test("call that times out asks for a PING unless a byte is recent, or one was sent", () => {
    const silence = new Silence(0);
    assert.equal(silence.callTimedOut(RECENT_MS - 1), false);
    assert.equal(silence.callTimedOut(RECENT_MS), true);
    silence.probe(RECENT_MS, 0);
    assert.equal(silence.callTimedOut(RECENT_MS + 10), false);
    silence.check(RECENT_MS + PROBE_MS, 0);
    assert.equal(silence.callTimedOut(RECENT_MS + PROBE_MS), false);
  });

  test("bytes that were sent since the last byte allow more time", () => {
    const silence = new Silence(0);
    silence.sent(BYTES_PER_SECOND - 1);
    silence.probe(5_000, 0);
    assert.equal(silence.check(5_000, 0), 5_000 + PROBE_MS);
    silence.heard(6_000);
    silence.sent(3 * BYTES_PER_SECOND);
    silence.probe(11_000, 0);
    assert.equal(silence.check(11_000, 0), 14_000 + PROBE_MS);
    silence.heard(12_000);
    silence.probe(17_000, 0);
    assert.equal(silence.check(17_000, 0), 17_000 + PROBE_MS);
  });

  test("time begins again while bytes before the PING are being sent, and not when they stand still", () => {
    const silence = new Silence(0);
    silence.probe(5_000, 100_000);
    assert.equal(silence.check(7_000, 60_000), 7_000 + PROBE_MS);
    assert.equal(silence.check(9_000, 0), 9_000 + PROBE_MS);
    assert.equal(silence.check(11_000, 0), "silent");
    const stuck = new Silence(0);
    stuck.probe(5_000, 100_000);
    assert.equal(stuck.check(7_000, 100_000), "silent");
  });
});
