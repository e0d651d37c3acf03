/**
 * A stream of bytes, cut into frames.
 *
 * Total on any bytes: the next frame, undefined for 'more is needed', or a ProtocolError. A header is judged as soon
 * as it is there, so the body of a refused frame is never buffered. However the bytes are cut into pieces, the frames
 * are the same, and the work stays linear in the bytes. Memory grows with what has come, not with what was announced.
 */

import { checkHead, checkLength, type Frame, HEADER_SIZE, LENGTH_SIZE, type Side, TOKEN_SIZE } from "./frame.js";

const EMPTY = Buffer.alloc(0);
const FIRST_CAPACITY = 1024;
const NONE = -1;

/**
 * Feed it what arrives, then take frames until there is none.
 *
 * `limit` is the largest `length` accepted. It may be changed at any time and holds from the next frame on; a frame
 * whose length was accepted before may still come. After a ProtocolError it must not be used again.
 */
export class FrameDecoder {
  limit: number;
  readonly #receiver: Side;
  #data: Buffer = EMPTY;
  #at = 0;
  #partial: Buffer | undefined; // the beginning of a frame, in a buffer that may be larger
  #have = 0; // bytes in it
  #need = 0; // bytes that it must have before looking at it again can help
  #accepted = NONE; // a length that was accepted already, under a limit that may have been another

  constructor(receiver: Side, limit: number) {
    this.#receiver = receiver;
    this.limit = limit;
  }

  /** Bytes held of a frame that is not complete. */
  get buffered(): number {
    return this.#partial === undefined ? this.#data.length - this.#at : this.#have;
  }

  /** Take in bytes. All frames of the bytes before must have been taken. What is given must not change later. */
  feed(data: Buffer): void {
    if (this.#partial === undefined) {
      this.#data = data;
      this.#at = 0;
      return;
    }
    this.#partial = grown(this.#partial, this.#have, data.length, this.#need);
    this.#partial.set(data, this.#have);
    this.#have += data.length;
    if (this.#have >= this.#need) {
      this.#data = this.#partial.subarray(0, this.#have);
      this.#at = 0;
      this.#partial = undefined;
    }
  }

  /** The next complete frame, or undefined if more bytes are needed. Throws ProtocolError. */
  next(): Frame | undefined {
    if (this.#partial !== undefined) {
      return undefined;
    }
    const data = this.#data;
    const at = this.#at;
    const available = data.length - at;
    if (available < LENGTH_SIZE) {
      if (available === 0) {
        this.#data = EMPTY; // else each idle connection would hold its last read
        this.#at = 0;
      } else {
        this.#keep(LENGTH_SIZE);
      }
      return undefined;
    }
    const length = data.readUInt32BE(at);
    if (length !== this.#accepted) {
      checkLength(length, this.limit);
    }
    if (available < HEADER_SIZE) {
      this.#accepted = length;
      this.#keep(HEADER_SIZE);
      return undefined;
    }
    const kind = checkHead(data, at, this.#receiver);
    const end = LENGTH_SIZE + length;
    if (available < end) {
      this.#accepted = length;
      this.#keep(end);
      return undefined;
    }
    this.#accepted = NONE;
    this.#at = at + end;
    return {
      length,
      kind,
      stream: data.readUInt32BE(at + 8),
      timestamp: data.readBigUInt64BE(at + 12),
      salt: data.readBigUInt64BE(at + 20),
      counter: data.readBigUInt64BE(at + 28),
      token: data.toString("latin1", at + 36, at + 36 + TOKEN_SIZE),
      body: data.subarray(at + HEADER_SIZE, at + LENGTH_SIZE + length),
    };
  }

  #keep(need: number): void {
    const rest = this.#data.subarray(this.#at);
    this.#partial = Buffer.allocUnsafe(Math.max(rest.length, Math.min(need, FIRST_CAPACITY)));
    this.#partial.set(rest);
    this.#have = rest.length;
    this.#need = need;
    this.#data = EMPTY;
    this.#at = 0;
  }
}

/** A buffer with room for `more` bytes behind `have`: twice as large as it must be, but no larger than needed. */
function grown(buffer: Buffer, have: number, more: number, need: number): Buffer {
  const wanted = have + more;
  if (wanted <= buffer.length) {
    return buffer;
  }
  const larger = Buffer.allocUnsafe(Math.max(wanted, Math.min(2 * wanted, need)));
  larger.set(buffer.subarray(0, have));
  return larger;
}
