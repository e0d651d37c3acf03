/** The queue of callers that wait for room on a connection. */

import assert from "node:assert/strict";
import { beforeEach, describe, test } from "node:test";
import { WaitingQueue } from "../src/client/waiting_queue.js";
import { settled } from "./support/fake.js";

describe("WaitingQueue", () => {
  let queue: WaitingQueue;
  let woken: string[];

  beforeEach(() => {
    queue = new WaitingQueue();
    woken = [];
  });

  function enter(name: string, wasWoken = false, signal?: AbortSignal): void {
    queue.wait(wasWoken, signal).then(
      () => woken.push(name),
      (error: Error) => woken.push(`${name}: ${error.message}`),
    );
  }

  async function wake(count: number): Promise<string[]> {
    woken = [];
    queue.wake(count);
    await settled();
    return woken;
  }

  test("callers are woken in order of arrival, and no more than wanted", async () => {
    for (const name of ["a", "b", "c"]) {
      enter(name);
    }
    assert.deepEqual(await wake(-1), []);
    assert.deepEqual(await wake(2), ["a", "b"]);
    assert.equal(queue.isEmpty, false);
    assert.deepEqual(await wake(2), ["c"]);
    assert.equal(queue.isEmpty, true);
    assert.deepEqual(await wake(1), []);
  });

  test("caller that was woken in vain keeps its place", async () => {
    enter("first");
    enter("second");
    assert.deepEqual(await wake(1), ["first"]);
    enter("first", true);
    assert.deepEqual(await wake(2), ["first", "second"]);
  });

  test("aborted caller leaves the queue with the reason of its signal", async () => {
    const controller = new AbortController();
    enter("gone", false, controller.signal);
    enter("next");
    controller.abort(new Error("no time"));
    await settled();
    assert.deepEqual(woken, ["gone: no time"]);
    assert.deepEqual(await wake(1), ["next"]);
  });

  test("caller that was aborted before it waits is rejected and wakes no other", async () => {
    enter("next");
    enter("gone", false, AbortSignal.abort(new Error("no time")));
    await settled();
    assert.deepEqual(woken, ["gone: no time"]);
  });

  test("turn of a woken caller that was aborted since passes to the next", async () => {
    enter("next");
    enter("gone", true, AbortSignal.abort(new Error("no time")));
    await settled();
    assert.deepEqual(woken.toSorted(), ["gone: no time", "next"]);
  });

  test("signal that is aborted after its caller was woken has no effect", async () => {
    const controller = new AbortController();
    enter("woken", false, controller.signal);
    enter("next");
    queue.wake(1);
    controller.abort(new Error("too late"));
    await settled();
    assert.deepEqual(woken, ["woken"]);
    assert.deepEqual(await wake(1), ["next"]);
  });
});
