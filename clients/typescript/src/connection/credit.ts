/**
 * Counts the items of one direction of a stream against its credit (zcp1.md, section 18.5).
 *
 *     SendCredit   the sender's half: may an item be sent?
 *     ItemQueue    the receiver's half: was an item allowed, which items wait, when to grant more?
 *
 * Rules:
 *
 * - Credit is absolute: items and bytes since OPEN. An item may exceed the bytes that are left, and is then the last.
 * - The receiver grants for what the application has taken, never for what it has only stored.
 * - A receiver that holds nothing has granted at least one item and one byte more than it has received.
 */

import { Code, ProtocolError } from "../errors.js";
import { phraseOf } from "../wire/body.js";
import { MIN_LENGTH } from "../wire/frame.js";
import { type Credit, decodeCredit } from "../wire/message.js";

/** What the peer allows to send, and what was sent: totals since OPEN. */
export class SendCredit {
  #items: number;
  #bytes: number;
  #sentItems = 0;
  #sentBytes = 0;

  constructor([items, bytes]: Credit) {
    this.#items = items;
    this.#bytes = bytes;
  }

  get maySend(): boolean {
    return this.#sentItems < this.#items && this.#sentBytes < this.#bytes;
  }

  /** Count an item that is sent. */
  count(length: number): void {
    this.#sentItems += 1;
    this.#sentBytes += length;
  }

  /** Apply a CREDIT of the peer. Throws ProtocolError if it is malformed or lower than before. */
  read(body: Buffer): void {
    let credit: readonly number[];
    try {
      credit = decodeCredit(body);
    } catch (error) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, `CREDIT is invalid: ${phraseOf(error)}`);
    }
    const [items = 0, bytes = 0, taken] = credit;
    if (taken !== undefined) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "CREDIT of three numbers, which only clients send");
    }
    if (items < this.#items || bytes < this.#bytes) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "credit is lower than before");
    }
    this.#items = items;
    this.#bytes = bytes;
  }
}

const NOTHING: Credit = [0, 0];

/** The items that a peer has sent and the application has not taken. Their peer may send `granted` at first. */
export class ItemQueue {
  readonly #window: Credit;
  #granted: Credit;
  #received: Credit;
  #taken: Credit;
  #bodies: Buffer[] = [];
  #hasEnded = false;

  /** `window`: what to grant beyond what was taken. `received` items were taken before. */
  constructor(window: Credit, granted: Credit, received: Credit = NOTHING) {
    this.#window = window;
    this.#granted = granted;
    this.#received = received;
    this.#taken = received;
  }

  /** What the peer may send in all. */
  get granted(): Credit {
    return this.#granted;
  }

  /** The number of items that wait. */
  get held(): number {
    return this.#bodies.length;
  }

  /** The number of items taken, which is the number of the next one. */
  get taken(): number {
    return this.#taken[0];
  }

  /** Add an item. Throws ProtocolError if the credit did not allow it. */
  receive(body: Buffer): void {
    const [items, bytes] = this.#received;
    if (items >= this.#granted[0] || bytes >= this.#granted[1]) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "ITEM beyond the credit");
    }
    this.#received = [items + 1, bytes + MIN_LENGTH + body.length];
    this.#bodies.push(Buffer.from(body)); // a copy: the original is part of a larger read
  }

  /** Return the body of the oldest item, or undefined if none waits. */
  take(): Buffer | undefined {
    const body = this.#bodies.shift();
    if (body !== undefined) {
      const [items, bytes] = this.#taken;
      this.#taken = [items + 1, bytes + MIN_LENGTH + body.length];
    }
    return body;
  }

  /**
   * Return the credit to send, or undefined until half of the window is used.
   *
   * A peer without credit whose items were all taken has used all of it, so there is no deadlock.
   */
  nextGrant(): Credit | undefined {
    if (this.#hasEnded) {
      return undefined;
    }
    const [items, bytes] = this.#granted;
    const [windowItems, windowBytes] = this.#window;
    const moreItems = this.#taken[0] + windowItems - items;
    const moreBytes = this.#taken[1] + windowBytes - bytes;
    if (moreItems <= 0 && moreBytes <= 0) {
      return undefined;
    }
    if (moreItems * 2 < windowItems && moreBytes * 2 < windowBytes) {
      return undefined;
    }
    this.#granted = [items + Math.max(moreItems, 0), bytes + Math.max(moreBytes, 0)];
    return this.#granted;
  }

  /** Record that the peer sends no more. What waits can still be taken. */
  end(): void {
    this.#hasEnded = true;
  }

  /** Discard what waits. */
  clear(): void {
    this.#bodies = [];
  }
}
