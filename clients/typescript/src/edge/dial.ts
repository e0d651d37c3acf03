/** Making one connection: name, TCP, TLS, WELCOME, and what is remembered of the host. */

import { connect, type Socket } from "node:net";
import { type Address, addressText } from "../client/address.js";
import { type Clock, unlessAborted } from "../client/clock.js";
import { Link, type Owner } from "../client/link.js";
import { printable } from "../client/printable.js";
import { mayPass } from "../client/retry.js";
import { ClientConnection } from "../connection/connection.js";
import { CannotConnect, ConfigError, ConnectionClosed, TlsError } from "../errors.js";
import type { KnownHosts } from "./known_hosts.js";
import { startTls, type TlsSettings } from "./transport.js";
import type { Trust } from "./trust.js";

export interface DialSettings {
  readonly address: Address;
  /** The name or the address that the certificate must be for. */
  readonly serverHostname: string;
  readonly trust: Trust;
  readonly knownHosts: KnownHosts | undefined;
  /** The client's own time; dates are judged by `systemClock`. */
  readonly clock: Clock;
  readonly systemClock: Clock;
  readonly connectTimeoutMs: number;
  readonly maxFrame: number;
  readonly toleranceMs: number;
  readonly onWarning: (message: string) => void;
}

/** Connects to one server, as often as asked. */
export class Dialer {
  readonly #settings: DialSettings;

  constructor(settings: DialSettings) {
    this.#settings = settings;
  }

  /** A connection whose server was welcomed. Rejects with CannotConnect, ConnectionClosed, TlsError, CertificateError. */
  async dial(owner: Owner, signal: AbortSignal): Promise<Link> {
    const { trust, knownHosts, serverHostname, systemClock } = this.#settings;
    if (!trust.verify) {
      await knownHosts?.require(serverHostname, systemClock.wall());
    }
    const link = await this.#connect(owner, signal);
    if (trust.verify && knownHosts !== undefined) {
      try {
        await this.#remember(link, knownHosts);
      } catch (error) {
        link.abort();
        throw error;
      }
    }
    return link;
  }

  async #connect(owner: Owner, signal: AbortSignal): Promise<Link> {
    const { address, clock, connectTimeoutMs, maxFrame, toleranceMs } = this.#settings;
    const link = new Link(owner, clock, new ClientConnection({ maxFrame, toleranceMs }));
    const options = await this.#settings.trust.tlsOptions();
    const tcp = connect({ ...address, noDelay: true, allowHalfOpen: true }); // our close_notify comes after theirs
    const patience = new AbortController();
    const timer = clock.after(connectTimeoutMs, () => {
      patience.abort(new CannotConnect(`${addressText(address)}: no answer within ${connectTimeoutMs / 1000} s`));
    });
    try {
      await unlessAborted(this.#establish(tcp, link, options), AbortSignal.any([patience.signal, signal]));
      return link;
    } catch (error) {
      link.abort();
      tcp.destroy();
      throw this.#explained(error);
    } finally {
      timer.cancel();
    }
  }

  async #establish(tcp: Socket, link: Link, options: TlsSettings["options"]): Promise<void> {
    const { address, serverHostname, trust, clock, systemClock } = this.#settings;
    const wall = () => systemClock.wall();
    await new Promise<void>((resolve, reject) => {
      tcp.once("connect", () => {
        tcp.removeAllListeners("error");
        startTls(tcp, link, { options, host: serverHostname, trust, clock, wall }).then(resolve, reject);
      });
      tcp.once("error", (error) => {
        reject(new CannotConnect(`${addressText(address)}: ${causeOf(error)}`, { cause: error }));
      });
    });
    await link.welcomed;
  }

  /**
   * In TLS 1.3 a server refuses a client's certificate after the client's handshake: by an alert, or by a plain close
   * where it has no alert for it.
   */
  #explained(error: unknown): unknown {
    if (error instanceof ConnectionClosed) {
      if (error.cause instanceof TlsError && !mayPass(error.cause.failure)) {
        return error.cause;
      }
      if (error.clean && this.#settings.trust.hasCertificate) {
        return new ConnectionClosed(`${error.reason} before its WELCOME: it may not take this client's certificate`, {
          clean: true,
        });
      }
    }
    return error;
  }

  /** Take in the server's policy. That it cannot be written down is no reason not to connect. */
  async #remember({ welcome }: Link, knownHosts: KnownHosts): Promise<void> {
    const { serverHostname, systemClock, onWarning } = this.#settings;
    try {
      if (welcome !== undefined) {
        await knownHosts.learn(serverHostname, welcome.sts, systemClock.wall());
      }
    } catch (error) {
      if (!(error instanceof ConfigError || (error as NodeJS.ErrnoException).code !== undefined)) {
        throw error;
      }
      onWarning(`the sts policy of ${serverHostname} is not remembered: ${printable((error as Error).message)}`);
    }
  }
}

/** The system's own word. Node puts those of all addresses of a host into one error without a message. */
function causeOf(error: Error): string {
  const first = error instanceof AggregateError ? (error.errors[0] as Error) : error;
  return (first as NodeJS.ErrnoException).code ?? first.message;
}
