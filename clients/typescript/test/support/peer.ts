/** A client connection without I/O, and the server's end of it. */

import assert from "node:assert/strict";
import { ClientConnection } from "../../src/connection/connection.js";
import type { ClientEvent } from "../../src/connection/events.js";
import type { Code } from "../../src/errors.js";
import { encodeBody } from "../../src/wire/body.js";
import { FrameDecoder } from "../../src/wire/decoder.js";
import { acceptedBy, encodeFrame, type Frame, Kind, NO_TOKEN, type Token } from "../../src/wire/frame.js";
import { tokenText, WALL, WELCOME } from "./fake.js";

export const SALT = 0xa1b2c3d4e5f60718n;
export const NOW = BigInt(WALL);
export const TOKEN = tokenText(9);

/** A client connection and the frames of its server. */
export class Peer {
  readonly client = new ClientConnection();
  counter = -1n;
  wall = NOW;
  now = 0;
  readonly #sent = new FrameDecoder("server", 2 ** 32 - 1);

  constructor() {
    this.#sent.accepted = acceptedBy("server", ["streams", "calls"]);
  }

  frame(kind: Kind, stream: number, body?: unknown, { token = NO_TOKEN, time = this.wall, salt = SALT } = {}): Buffer {
    this.counter += 1n;
    const bytes = body === undefined ? Buffer.alloc(0) : body instanceof Buffer ? body : encodeBody(body);
    return encodeFrame(kind, stream, time, salt, this.counter, token, Buffer.from(bytes));
  }

  receiveBytes(data: Buffer): ClientEvent[] {
    return this.client.receiveData(data, this.wall, this.now);
  }

  receive(...frame: Parameters<Peer["frame"]>): ClientEvent[] {
    return this.receiveBytes(this.frame(...frame));
  }

  welcome(more: object = {}): void {
    const [event] = this.receive(Kind.WELCOME, 0, { ...WELCOME, ...more });
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

/** Return the code of the end of a connection. */
export function endCode(events: ClientEvent[]): Code | undefined {
  const last = events.at(-1);
  assert.equal(last?.type, "ended");
  return last?.type === "ended" ? last.code : undefined;
}
