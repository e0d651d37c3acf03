/** One TLS connection over node:tls, for a link: the handshake, the judgement, records, and how it ends. */

import { createHash, type X509Certificate } from "node:crypto";
import { isIP, type Socket } from "node:net";
import { connect, type TLSSocket } from "node:tls";
import type { Clock, Timer } from "../client/clock.js";
import type { Link, Transport } from "../client/link.js";
import type { TlsError } from "../errors.js";
import { failureOf, tlsError } from "./failure.js";
import { HeldStream } from "./held_stream.js";
import { ALPN, type Trust } from "./trust.js";

/** After our close, what the server still sends is read and discarded: for so long, and so much at most. */
export const LINGER_MS = 2_000;
export const LINGER_BYTES = 4_194_304;

/** Bytes written and not sent yet, above which no more requests are taken. */
const MAX_UNSENT = 262_144;

export interface TlsSettings {
  /** Of the trust. */
  readonly options: Awaited<ReturnType<Trust["tlsOptions"]>>;
  readonly host: string;
  readonly trust: Trust;
  readonly clock: Clock;
  /** Against which dates are judged. */
  readonly wall: () => number;
}

/**
 * Speak TLS on a TCP connection, and connect the link to it. Resolves when the server has proved to be the one expected;
 * rejects with TlsError, and then nothing was sent but the ClientHello.
 */
export async function startTls(
  tcp: Socket,
  link: Link,
  { options, host, trust, clock, wall }: TlsSettings,
): Promise<void> {
  const held = new HeldStream(tcp); // in the turn in which TCP is connected: none of its events is missed
  const socket = connect({
    ...options,
    socket: held,
    host,
    ...(isIP(host) ? {} : { servername: host }),
    ALPNProtocols: [ALPN],
    checkServerIdentity: () => undefined, // by `judge`, in all three ways of trust
  });
  await new Promise<void>((resolve, reject) => {
    let refusal: TlsError | undefined;
    const fail = (error: TlsError) => {
      refusal ??= error;
      held.destroy();
      socket.destroy();
      reject(refusal);
    };
    const failed = (error: NodeJS.ErrnoException) => fail(failureOf(error, socket, false));
    const closed = () => fail(tlsError("disconnected"));
    socket.on("error", failed);
    socket.once("close", closed);
    socket.once("secureConnect", () => {
      const certificate = socket.getPeerX509Certificate(); // once: Node 20 has none when it is asked again
      const wrong = trust.judge(socket, certificate, host, wall());
      if (wrong !== undefined || certificate === undefined) {
        fail(wrong ?? tlsError("other"));
        return;
      }
      socket.off("error", failed);
      socket.off("close", closed);
      held.approve();
      new TlsTransport(socket, certificate, held, link, clock);
      resolve();
    });
  });
}

class TlsTransport implements Transport {
  readonly leaf: Buffer;
  readonly #socket: TLSSocket;
  readonly #held: HeldStream;
  readonly #clock: Clock;
  #error: TlsError | undefined;
  #hasEnded = false;
  #isClosing = false;
  #discarded = 0;
  #linger: Timer | undefined;

  constructor(socket: TLSSocket, certificate: X509Certificate, held: HeldStream, link: Link, clock: Clock) {
    this.#socket = socket;
    this.#held = held;
    this.#clock = clock;
    this.leaf = createHash("sha256").update(certificate.raw).digest();
    link.connectionMade(this);
    socket.on("data", (data: Buffer) => {
      if (this.#isClosing) {
        this.#discard(data.length);
      } else {
        link.dataReceived(data);
      }
    });
    socket.on("drain", () => link.resumeWriting());
    socket.on("end", () => {
      this.#hasEnded = true;
      if (held.hasEnded) {
        this.#error ??= tlsError("truncated");
      }
      link.endReceived(this.#error); // before our own end goes out
      this.close();
    });
    socket.on("error", (error) => {
      this.#error ??= failureOf(error, socket, true);
    });
    socket.once("close", () => {
      this.#linger?.cancel();
      held.release();
      if (!this.#hasEnded && !this.#isClosing) {
        this.#error ??= tlsError("truncated");
      }
      link.connectionLost(this.#error);
    });
    this.write = (data) => {
      socket.write(data);
      if (socket.writableLength > MAX_UNSENT) {
        link.pauseWriting();
      }
    };
  }

  readonly write: (data: Buffer) => void;

  close(): void {
    if (this.#isClosing) {
      return;
    }
    this.#isClosing = true;
    this.#linger = this.#clock.after(LINGER_MS, () => this.#destroy());
    this.#socket.end();
  }

  abort(): void {
    this.#isClosing = true;
    this.#error ??= tlsError("connection_reset");
    this.#held.reset();
    this.#socket.destroy();
  }

  #discard(size: number): void {
    this.#discarded += size;
    if (this.#discarded > LINGER_BYTES) {
      this.#destroy();
    }
  }

  #destroy(): void {
    this.#held.destroy();
    this.#socket.destroy();
  }
}
