/** The TLS transport of a connection, over node:tls: handshake, verification, data, and how it ends. */

import { createHash, type X509Certificate } from "node:crypto";
import { isIP, type Socket } from "node:net";
import { connect, type TLSSocket } from "node:tls";
import type { Clock, Timer } from "../client/clock.js";
import type { ConnectionDriver, Transport } from "../client/connection_driver.js";
import type { TlsError } from "../errors.js";
import { failureOf, tlsError } from "./failure.js";
import { GatedStream } from "./gated_stream.js";
import { ALPN, type Trust } from "./trust.js";

/** Limits for reading and discarding data that the server sends after this client has closed. */
export const LINGER_MS = 2_000;
export const LINGER_BYTES = 4_194_304;

/** Buffered bytes above which requests are paused. */
const MAX_UNSENT = 262_144;

export interface TlsSettings {
  /** From `Trust.tlsOptions`. */
  readonly options: Awaited<ReturnType<Trust["tlsOptions"]>>;
  readonly host: string;
  readonly trust: Trust;
  readonly clock: Clock;
  /** The time for validity periods of certificates. */
  readonly wall: () => number;
}

/**
 * Perform the TLS handshake, verify the server, and connect the driver. Rejects with TlsError after having sent nothing but
 * the ClientHello.
 */
export async function startTls(
  tcp: Socket,
  driver: ConnectionDriver,
  { options, host, trust, clock, wall }: TlsSettings,
): Promise<void> {
  const gate = new GatedStream(tcp); // in the tick of the connect event, to miss no event
  const socket = connect({
    ...options,
    socket: gate,
    host,
    ...(isIP(host) ? {} : { servername: host }),
    ALPNProtocols: [ALPN],
    checkServerIdentity: () => undefined, // `Trust.verifyServer` checks the name
  });
  await new Promise<void>((resolve, reject) => {
    let refusal: TlsError | undefined;
    const fail = (error: TlsError) => {
      refusal ??= error;
      gate.destroy();
      socket.destroy();
      reject(refusal);
    };
    const failed = (error: NodeJS.ErrnoException) => fail(failureOf(error, socket, false));
    const closed = () => fail(tlsError("disconnected"));
    socket.on("error", failed);
    socket.once("close", closed);
    socket.once("secureConnect", () => {
      const certificate = socket.getPeerX509Certificate(); // call once: a second call returns undefined in Node 20
      const fault = trust.verifyServer(socket, certificate, host, wall());
      if (fault !== undefined || certificate === undefined) {
        fail(fault ?? tlsError("other"));
        return;
      }
      socket.off("error", failed);
      socket.off("close", closed);
      gate.approve();
      new TlsTransport(socket, certificate, gate, driver, clock);
      resolve();
    });
  });
}

class TlsTransport implements Transport {
  readonly leaf: Buffer;
  readonly #socket: TLSSocket;
  readonly #gate: GatedStream;
  readonly #clock: Clock;
  #error: TlsError | undefined;
  #hasEnded = false;
  #isClosing = false;
  #discarded = 0;
  #linger: Timer | undefined;

  constructor(
    socket: TLSSocket,
    certificate: X509Certificate,
    gate: GatedStream,
    driver: ConnectionDriver,
    clock: Clock,
  ) {
    this.#socket = socket;
    this.#gate = gate;
    this.#clock = clock;
    this.leaf = createHash("sha256").update(certificate.raw).digest();
    driver.connectionMade(this);
    socket.on("data", (data: Buffer) => {
      if (this.#isClosing) {
        this.#discard(data.length);
      } else {
        driver.dataReceived(data);
      }
    });
    socket.on("drain", () => driver.resumeWriting());
    socket.on("end", () => {
      this.#hasEnded = true;
      if (gate.hasEnded) {
        this.#error ??= tlsError("truncated");
      }
      driver.endReceived(this.#error); // before this end is closed
      this.close();
    });
    socket.on("error", (error) => {
      this.#error ??= failureOf(error, socket, true);
    });
    socket.once("close", () => {
      this.#linger?.cancel();
      gate.release();
      if (!this.#hasEnded && !this.#isClosing) {
        this.#error ??= tlsError("truncated");
      }
      driver.connectionLost(this.#error);
    });
    this.write = (data) => {
      socket.write(data);
      if (socket.writableLength > MAX_UNSENT) {
        driver.pauseWriting();
      }
    };
  }

  readonly write: (data: Buffer) => void;

  get unsentBytes(): number {
    return this.#socket.writableLength;
  }

  pauseReading(): void {
    if (!this.#isClosing) {
      this.#socket.pause();
    }
  }

  resumeReading(): void {
    this.#socket.resume();
  }

  close(): void {
    if (this.#isClosing) {
      return;
    }
    this.#isClosing = true;
    this.#linger = this.#clock.after(LINGER_MS, () => this.#destroy());
    this.#socket.resume(); // to read and discard what the server still sends
    this.#socket.end();
  }

  abort(): void {
    this.#isClosing = true;
    this.#error ??= tlsError("connection_reset");
    this.#gate.reset();
    this.#socket.destroy();
  }

  #discard(size: number): void {
    this.#discarded += size;
    if (this.#discarded > LINGER_BYTES) {
      this.#destroy();
    }
  }

  #destroy(): void {
    this.#gate.destroy();
    this.#socket.destroy();
  }
}
