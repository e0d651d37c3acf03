/** Makes the frames that a client sends, and queues their bytes. */

import { encodeFrame, type Kind, type Token } from "../wire/frame.js";

const UINT64_MAX = 2n ** 64n - 1n;

/** Queue a frame unless the connection has ended. `wall` is this machine's time. */
export type Send = (kind: Kind, stream: number, token: Token, body: Uint8Array, wall: bigint) => void;

export class Output {
  /** Set by WELCOME. */
  salt = 0n;
  /** The offset of the server's clock from this one. */
  clockOffset = 0n;
  queuedBytes = 0;
  #counter = 0n; // of the last frame
  #frames: Buffer[] = [];

  /** Queue a frame. */
  send(kind: Kind, stream: number, token: Token, body: Uint8Array, wall: bigint): void {
    this.#counter += 1n;
    const time = wall + this.clockOffset;
    // The local clock may have been set to any time; the field has 64 bits.
    const timestamp = time < 0n ? 0n : time > UINT64_MAX ? UINT64_MAX : time;
    const frame = encodeFrame(kind, stream, timestamp, this.salt, this.#counter, token, body);
    this.queuedBytes += frame.length;
    this.#frames.push(frame);
  }

  /** Return all queued bytes, or undefined if the queue is empty. */
  take(): Buffer | undefined {
    const frames = this.#frames;
    if (frames.length === 0) {
      return undefined;
    }
    this.#frames = [];
    this.queuedBytes = 0;
    return frames.length === 1 ? frames[0] : Buffer.concat(frames);
  }
}
