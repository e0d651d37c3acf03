/** What a connection driver works with: its transport, its listener, and the calls in flight. */

import type { CallReceived, EventReceived, GoAwayReceived } from "../connection/events.js";
import type { ItemStream } from "../connection/item_streams.js";
import type { ConnectionClosed } from "../errors.js";
import type { Timer } from "./clock.js";
import type { ConnectionDriver } from "./connection_driver.js";

/** The transport of a connection. `close` and `abort` are followed by `connectionLost`. */
export interface Transport {
  /** SHA-256 of the server's certificate (DER). */
  readonly leaf: Buffer;
  /** Bytes that are written but not sent. `resumeWriting` follows once all are sent. */
  readonly unsentBytes: number;
  write(data: Buffer): void;
  pauseReading(): void;
  resumeReading(): void;
  /** Send written data and close_notify, then end. */
  close(): void;
  /** Reset the connection. */
  abort(): void;
}

/** Receives the events of a connection as a whole. */
export interface ConnectionListener {
  eventReceived(connection: ConnectionDriver, event: EventReceived): void;
  callReceived(connection: ConnectionDriver, event: CallReceived): void;
  callWithdrawn(connection: ConnectionDriver, number: number): void;
  connectionDraining(connection: ConnectionDriver, event: GoAwayReceived): void;
  connectionEnded(connection: ConnectionDriver, error: ConnectionClosed): void;
  /** The server has stopped answering requests in flight; `connectionHeard` follows if a byte arrives after all. */
  connectionSilent(connection: ConnectionDriver): void;
  connectionHeard(connection: ConnectionDriver): void;
  /** More requests can be sent, for which none of the connection's own callers waits. */
  connectionFree(requests: number): void;
}

/** A request in flight. `response` settles once. */
export class PendingCall {
  readonly response: Promise<unknown>;
  isDone = false;
  timer: Timer | undefined;
  #resolve!: (value: unknown) => void;
  #reject!: (error: Error) => void;

  constructor(
    readonly connection: ConnectionDriver,
    readonly stream: number,
  ) {
    this.response = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  succeed(value: unknown): void {
    this.isDone = true;
    this.timer?.cancel();
    this.#resolve(value);
  }

  fail(error: Error): void {
    this.isDone = true;
    this.timer?.cancel();
    this.#reject(error);
  }
}

/** A stream of items in flight. `response` settles at its end; items that have arrived can still be taken then. */
export class PendingStream extends PendingCall {
  /** Called after an ITEM or CREDIT, and when the connection can send again. */
  onChange: () => void = () => undefined;

  constructor(
    connection: ConnectionDriver,
    readonly items: ItemStream,
  ) {
    super(connection, items.number);
  }

  /** Whether the server may have begun the stream: it must not be opened again. */
  get hasBegun(): boolean {
    return this.items.hasBegun;
  }

  get hasItem(): boolean {
    return this.items.items.held > 0;
  }

  /** Whether an item can be sent now. */
  get maySend(): boolean {
    return this.items.maySend && this.connection.canWrite;
  }

  /** Return an item, one of which waits. Throws InternalError for an invalid one: abandon the stream then. */
  takeItem(): unknown {
    return this.connection.withStreams((streams, wall) => streams.takeItem(this.items, wall));
  }

  /** Send an item if the stream is still in flight. Throws InvalidArgument for a value that cannot be sent. */
  sendItem(item: unknown): void {
    if (this.items.state === "open") {
      this.connection.withStreams((streams, wall) => streams.sendItem(this.items, item, wall));
    }
  }

  endItems(): void {
    this.connection.withStreams((streams, wall) => streams.endItems(this.items, wall));
  }
}
