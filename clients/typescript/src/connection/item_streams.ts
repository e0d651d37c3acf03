/**
 * The streams of items of one connection at the client (zcp1.md, section 18.10).
 *
 *     open, half   in flight; half: this end has ended its items
 *     leaving      CANCEL was sent, or END on a durable stream; its answer is awaited, and items are dropped
 *     none         answered
 *
 * Decides: the credit of both directions, and which frames are dropped.
 * Must not know: requests, sessions, and what an item means.
 */

import { Code, InternalError, InvalidArgument, ProtocolError } from "../errors.js";
import { decodeBody, encodeBody, phraseOf } from "../wire/body.js";
import { type Frame, Kind, MIN_LENGTH, type Token } from "../wire/frame.js";
import { type AcceptedRun, type Credit, decodeAccepted, type Resume } from "../wire/message.js";
import { ItemQueue, SendCredit } from "./credit.js";
import type { CreditRaised, ItemReceived, StreamAccepted } from "./events.js";
import type { Send } from "./output.js";

const EMPTY = new Uint8Array(0);

export type ItemStreamState = "none" | "open" | "half" | "leaving";

/**
 * One stream: `items` are the server's, `credit` is what the server allows to send. A durable one has `resume`, which is what it
 * reads (zcp1.md, section 20).
 */
export class ItemStream {
  state: ItemStreamState = "open";
  /** Whether ACCEPTED was received. */
  isAccepted = false;
  /** The position before which the application needs nothing, which the next CREDIT reports; -1 until it is set. */
  taken = -1;
  /** Whether an ITEM, CREDIT or ACCEPTED was received: the method has begun, so the stream must not be opened again. */
  hasBegun = false;
  /** Whether it failed because a frame of it was stale, and not by an ERROR of the server. */
  wasLost = false;
  credit = new SendCredit([0, 0]);
  items: ItemQueue;

  constructor(
    readonly number: number,
    readonly token: Token,
    window: Credit,
    readonly resume?: Resume,
  ) {
    this.items = new ItemQueue(window, window);
  }

  /** The numbers of a CREDIT. */
  get granted(): readonly number[] {
    return this.isAccepted && this.taken >= 0 ? [...this.items.granted, this.taken] : this.items.granted;
  }

  /** Process ACCEPTED. Throws ProtocolError if it does not fit the OPEN. */
  accept(body: Buffer, maxDepth: number): void {
    const { resume } = this;
    if (resume === undefined || this.isAccepted) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "ACCEPTED was not expected");
    }
    let run: AcceptedRun;
    try {
      run = decodeAccepted(body, maxDepth);
    } catch (error) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, `ACCEPTED is invalid: ${phraseOf(error)}`);
    }
    if (run.id !== resume.id || run.from !== resume.from) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "ACCEPTED is of another run or position");
    }
    this.isAccepted = true;
  }

  /** Whether an item can be sent now. A durable stream takes none. */
  get maySend(): boolean {
    return this.state === "open" && this.credit.maySend;
  }

  /** Take an item, one of which waits. Throws InternalError if it cannot be decoded. */
  takeItem(maxDepth: number): unknown {
    const body = this.items.take();
    if (body === undefined) {
      throw new Error("bug: no item waits");
    }
    try {
      return decodeBody(body, { maxDepth });
    } catch (error) {
      throw new InternalError(`item ${this.items.taken - 1} is invalid: ${phraseOf(error)}`, {}, { cause: error });
    }
  }
}

/** The streams in flight. */
export class ItemStreams {
  /** The largest `length` of an ITEM that the server accepts. */
  maxItem = 0;
  readonly #streams = new Map<number, ItemStream>();
  readonly #send: Send;
  readonly #maxDepth: number;

  constructor(send: Send, maxDepth: number) {
    this.#send = send;
    this.#maxDepth = maxDepth;
  }

  /** The number of streams in flight. */
  get size(): number {
    return this.#streams.size;
  }

  /** Add a stream whose OPEN grants `window`; `resume` makes it durable. */
  add(number: number, token: Token, window: Credit, resume?: Resume): ItemStream {
    const stream = new ItemStream(number, token, window, resume);
    this.#streams.set(number, stream);
    return stream;
  }

  // --- receiving ---------------------------------------------------------------------------------

  /** Process an ACCEPTED, ITEM or CREDIT on a stream in flight. Return undefined if it is dropped. Throws ProtocolError. */
  receive({ kind, stream: number, body }: Frame): StreamAccepted | ItemReceived | CreditRaised | undefined {
    const stream = this.#streams.get(number);
    if (stream === undefined) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT on the stream of a REQUEST");
    }
    if (stream.state === "leaving") {
      return undefined;
    }
    stream.hasBegun = true;
    if (kind === Kind.ACCEPTED) {
      stream.accept(body, this.#maxDepth);
      return { type: "accepted", stream: number };
    }
    if (stream.resume !== undefined && !stream.isAccepted) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, "ITEM or CREDIT before ACCEPTED");
    }
    if (kind === Kind.ITEM) {
      stream.items.receive(body);
      return { type: "item", stream: number };
    }
    stream.credit.read(body);
    return { type: "credit", stream: number };
  }

  /** Return whether a stream is in flight and was not left. */
  isRead(number: number): boolean {
    const stream = this.#streams.get(number);
    return stream !== undefined && stream.state !== "leaving";
  }

  /** Note that a stream fails because a frame of it was stale. Return it; undefined for a request. */
  lost(number: number): ItemStream | undefined {
    const stream = this.#streams.get(number);
    if (stream !== undefined) {
      stream.wasLost = true;
    }
    return stream;
  }

  /** Forget a stream that was answered. What it holds can still be taken. */
  answered(number: number): void {
    const stream = this.#streams.get(number);
    if (stream !== undefined) {
      this.#streams.delete(number);
      stream.state = "none";
      stream.items.end();
    }
  }

  // --- sending -----------------------------------------------------------------------------------

  /** Drop the items of a stream that is cancelled, and those to come. Return false if it was left before. */
  leave(number: number): boolean {
    const stream = this.#streams.get(number);
    if (stream === undefined) {
      return true; // a REQUEST
    }
    const isFirst = stream.state !== "leaving";
    stream.state = "leaving";
    stream.items.clear();
    return isFirst;
  }

  /**
   * Return the next item of a stream, one of which waits, and send the credit that is due then. Throws InternalError for one
   * that cannot be decoded: cancel the stream then.
   */
  takeItem(stream: ItemStream, wall: bigint): unknown {
    const value = stream.takeItem(this.#maxDepth);
    if (stream.items.nextGrant() !== undefined) {
      this.sendCredit(stream, wall);
    }
    return value;
  }

  /** Send a CREDIT of what was granted, with `taken` of an accepted durable stream. */
  sendCredit(stream: ItemStream, wall: bigint): void {
    if (stream.state === "open" || stream.state === "half") {
      this.#send(Kind.CREDIT, stream.number, stream.token, encodeBody(stream.granted), wall);
    }
  }

  /** Leave a durable stream, whose run goes on. It is in flight until its response. */
  detach(stream: ItemStream, wall: bigint): void {
    if (stream.state === "open") {
      this.leave(stream.number);
      this.#send(Kind.END, stream.number, stream.token, EMPTY, wall);
    }
  }

  /** Send an ITEM, which needs `stream.maySend`. Throws InvalidArgument for a value that cannot be sent. */
  sendItem(stream: ItemStream, value: unknown, wall: bigint): void {
    let body: Uint8Array;
    try {
      body = encodeBody(value);
    } catch (error) {
      throw new InvalidArgument(phraseOf(error), {}, { cause: error });
    }
    const size = MIN_LENGTH + body.length;
    const limit = this.maxItem;
    if (size > limit) {
      throw new InvalidArgument(`the item has ${size} bytes; the server accepts ${limit}`, { size, limit });
    }
    stream.credit.count(size);
    this.#send(Kind.ITEM, stream.number, stream.token, body, wall);
  }

  /** Send an END: no more items follow. A durable stream takes none, and END would leave it. */
  endItems(stream: ItemStream, wall: bigint): void {
    if (stream.state === "open" && stream.resume === undefined) {
      stream.state = "half";
      this.#send(Kind.END, stream.number, stream.token, EMPTY, wall);
    }
  }
}
