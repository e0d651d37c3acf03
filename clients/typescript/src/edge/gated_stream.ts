/**
 * A stream between TCP and node:tls, for two properties that node:tls does not expose:
 *
 * - Whether the server sent close_notify. node:tls ends its stream in the same way after close_notify and after a bare end of
 *   TCP. This stream passes on the end of TCP only after all data was read: if TLS has not ended by then, there was no
 *   close_notify, and the connection was truncated (RFC 8446 section 6.1).
 * - Encrypted data must not be sent before the server was verified. node:tls reports the server's certificate only after it
 *   has written the client's Finished and client certificate. This stream holds them until `approve`.
 */

import type { Socket } from "node:net";
import { Duplex } from "node:stream";

const APPLICATION_DATA = 0x17; // RFC 8446 section 5.1: the type of all encrypted records
const RECORD_HEADER = 5;

type Done = (error?: Error | null) => void;

export class GatedStream extends Duplex {
  /** Whether TCP has ended and all data before it was read. */
  hasEnded = false;
  readonly #tcp: Socket;
  #isApproved = false;
  #held: [Buffer, Done][] = [];

  constructor(tcp: Socket) {
    super({ allowHalfOpen: true });
    this.#tcp = tcp;
    tcp.on("data", (chunk: Buffer) => {
      if (!this.push(chunk)) {
        tcp.pause();
      }
    });
    // Deferred: TLS emits the events of the last bytes in this tick.
    tcp.on("end", () => setImmediate(() => this.#end()));
    tcp.on("error", (error) => this.destroy(error));
    tcp.on("close", () => setImmediate(() => this.destroy()));
  }

  /** Send held data and everything that follows: the server was verified. */
  approve(): void {
    this.#isApproved = true;
    const held = this.#held;
    this.#held = [];
    for (const [chunk, done] of held) {
      this.#tcp.write(chunk, done);
    }
  }

  #end(): void {
    this.hasEnded = true;
    this.push(null);
  }

  override _read(): void {
    this.#tcp.resume();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: Done): void {
    if (!this.#isApproved && hasEncrypted(chunk)) {
      this.#held.push([chunk, done]);
    } else if (this.#tcp.write(chunk)) {
      done();
    } else {
      this.#tcp.once("drain", done);
    }
  }

  override _final(done: Done): void {
    this.#tcp.end(() => done());
  }

  override _destroy(error: Error | null, done: Done): void {
    this.#tcp.destroy();
    done(error);
  }

  /** Close TCP once all written data was sent, after the end of TLS. */
  release(): void {
    this.#tcp.destroySoon();
  }

  /** Reset the connection, like a network failure. */
  reset(): void {
    if (this.#tcp.writableEnded || this.#tcp.destroyed) {
      this.#tcp.destroy(); // libuv cannot reset a connection during shutdown, and Node would never close it
    } else {
      this.#tcp.resetAndDestroy();
    }
  }
}

/** Return whether any of these TLS records is encrypted. node:tls writes whole records. */
function hasEncrypted(records: Buffer): boolean {
  for (let at = 0; at + RECORD_HEADER <= records.length; at += RECORD_HEADER + records.readUInt16BE(at + 3)) {
    if (records[at] === APPLICATION_DATA) {
      return true;
    }
  }
  return false;
}
