/**
 * Splits a stream of bytes into frames.
 *
 * Any input gives the next frame, undefined if more bytes are needed, or a ProtocolError. A header is checked as soon as it is
 * complete, so the body of an invalid frame is never buffered. The result does not depend on how the bytes are split, the work
 * is linear, and memory grows with the bytes received, not with the announced length.
 */

import {
  type Accepted,
  acceptedBy,
  checkHead,
  checkLength,
  type Frame,
  HEADER_SIZE,
  LENGTH_SIZE,
  type Side,
  TOKEN_SIZE,
} from "./frame.js";

const EMPTY = Buffer.alloc(0);
const FIRST_CAPACITY = 1024;
const NONE = -1;

/**
 * Feed it bytes, then take frames until `next` returns undefined.
 *
 * `limit` is the largest accepted `length`. A change applies from the next frame on; a frame whose length was already accepted
 * stays accepted. `accepted` can only be extended. Do not use the decoder after a ProtocolError.
 */
export class FrameDecoder {
  limit: number;
  accepted: Accepted;
  #data: Buffer = EMPTY;
  #at = 0;
  #partial: Buffer | undefined; // an incomplete frame, in a buffer that may be larger
  #have = 0; // bytes in #partial
  #need = 0; // bytes needed in #partial before parsing again
  #checkedLength = NONE; // a length that was already accepted, perhaps under another limit

  constructor(receiver: Side, limit: number) {
    this.accepted = acceptedBy(receiver);
    this.limit = limit;
  }

  /** The number of bytes of an incomplete frame. */
  get buffered(): number {
    return this.#partial === undefined ? this.#data.length - this.#at : this.#have;
  }

  /** Add bytes, which must not change later. All frames of previous bytes must have been taken. */
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

  /** Return the next frame, or undefined if more bytes are needed. Throws ProtocolError. */
  next(): Frame | undefined {
    if (this.#partial !== undefined) {
      return undefined;
    }
    const data = this.#data;
    const at = this.#at;
    const available = data.length - at;
    if (available < LENGTH_SIZE) {
      if (available === 0) {
        this.#data = EMPTY; // otherwise an idle connection would retain its last read
        this.#at = 0;
      } else {
        this.#keep(LENGTH_SIZE);
      }
      return undefined;
    }
    const length = data.readUInt32BE(at);
    if (length !== this.#checkedLength) {
      checkLength(length, this.limit);
    }
    if (available < HEADER_SIZE) {
      this.#checkedLength = length;
      this.#keep(HEADER_SIZE);
      return undefined;
    }
    const kind = checkHead(data, at, this.accepted);
    const end = LENGTH_SIZE + length;
    if (available < end) {
      this.#checkedLength = length;
      this.#keep(end);
      return undefined;
    }
    this.#checkedLength = NONE;
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

/** Grow a buffer for `more` bytes after `have`: double the size, but at most to `need`. */
function grown(buffer: Buffer, have: number, more: number, need: number): Buffer {
  const wanted = have + more;
  if (wanted <= buffer.length) {
    return buffer;
  }
  const larger = Buffer.allocUnsafe(Math.max(wanted, Math.min(2 * wanted, need)));
  larger.set(buffer.subarray(0, have));
  return larger;
}
