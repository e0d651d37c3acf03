/**
 * The TCP connection as node:tls gets to see it.
 *
 * It stands between the two for what neither tells:
 *
 * - Whether the server said close_notify. node:tls ends its stream alike after a close_notify and after a bare end of
 *   TCP. Here the end of TCP is passed on only when all that came before it was read: if TLS has not ended by then, there
 *   was no close_notify, and the connection was truncated (RFC 8446 section 6.1).
 * - Nothing encrypted goes out before the server was judged. node:tls tells of a certificate when the client's Finished
 *   is written already, with its own certificate if it has one; here they wait until `approve`.
 */

import type { Socket } from "node:net";
import { Duplex } from "node:stream";

const APPLICATION_DATA = 0x17; // RFC 8446 section 5.1: all encrypted records are of this type
const RECORD_HEADER = 5;

type Done = (error?: Error | null) => void;

export class HeldStream extends Duplex {
  /** TCP has ended, and what came before it was read. */
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
    // Not at once: what TLS makes of the last bytes is told in this turn.
    tcp.on("end", () => setImmediate(() => this.#end()));
    tcp.on("error", (error) => this.destroy(error));
    tcp.on("close", () => setImmediate(() => this.destroy()));
  }

  /** The server is the one expected: let go what waits, and all that follows. */
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

  /** TLS is over: let TCP go when what was written is out. */
  release(): void {
    this.#tcp.destroySoon();
  }

  /** Reset the connection, as a network would. */
  reset(): void {
    if (this.#tcp.writableEnded || this.#tcp.destroyed) {
      this.#tcp.destroy(); // libuv resets nothing that is being shut down, and Node would never close it then
    } else {
      this.#tcp.resetAndDestroy();
    }
  }
}

/** Whether one of these TLS records is encrypted. node:tls writes whole records. */
function hasEncrypted(records: Buffer): boolean {
  for (let at = 0; at + RECORD_HEADER <= records.length; at += RECORD_HEADER + records.readUInt16BE(at + 3)) {
    if (records[at] === APPLICATION_DATA) {
      return true;
    }
  }
  return false;
}
