/** Makes one connection: TCP, TLS, WELCOME, and the `sts` policy of the host. */

import { connect, type Socket } from "node:net";
import { type Address, addressText } from "../client/address.js";
import { type Clock, unlessAborted } from "../client/clock.js";
import { ConnectionDriver } from "../client/connection_driver.js";
import type { ConnectionListener } from "../client/pending.js";
import { isTransient } from "../client/retry.js";
import { escapeText } from "../client/text.js";
import { ClientConnection } from "../connection/connection.js";
import { CannotConnect, ConfigError, ConnectionClosed, TlsError } from "../errors.js";
import type { KnownHosts } from "./known_hosts.js";
import { startTls, type TlsSettings } from "./transport.js";
import type { Trust } from "./trust.js";

export interface DialSettings {
  readonly address: Address;
  /** The name or address to verify in the certificate. */
  readonly serverHostname: string;
  readonly trust: Trust;
  readonly knownHosts: KnownHosts | undefined;
  /** For timeouts and timestamps; `systemClock` is for dates of certificates. */
  readonly clock: Clock;
  readonly systemClock: Clock;
  readonly connectTimeoutMs: number;
  readonly maxFrame: number;
  readonly toleranceMs: number;
  readonly onWarning: (message: string) => void;
}

/** Makes connections to one server. */
export class Dialer {
  readonly #settings: DialSettings;

  constructor(settings: DialSettings) {
    this.#settings = settings;
  }

  /** Connect and wait for WELCOME. Rejects with CannotConnect, ConnectionClosed, TlsError, CertificateError. */
  async dial(listener: ConnectionListener, signal: AbortSignal): Promise<ConnectionDriver> {
    const { address, trust, knownHosts, serverHostname, systemClock } = this.#settings;
    if (!trust.verify) {
      for (const host of new Set([address.host, serverHostname])) {
        await knownHosts?.require(host, systemClock.wall());
      }
    }
    const connection = await this.#connect(listener, signal);
    if (trust.verify && knownHosts !== undefined) {
      try {
        await this.#remember(connection, knownHosts);
      } catch (error) {
        connection.abort();
        throw error;
      }
    }
    return connection;
  }

  async #connect(listener: ConnectionListener, signal: AbortSignal): Promise<ConnectionDriver> {
    const { address, clock, maxFrame, toleranceMs } = this.#settings;
    const connection = new ConnectionDriver(listener, clock, new ClientConnection({ maxFrame, toleranceMs }));
    const options = await this.#tlsOptions(signal);
    const tcp = connect({ ...address, noDelay: true, allowHalfOpen: true }); // to send close_notify after the server's
    try {
      await this.#inTime(this.#establish(tcp, connection, options), signal);
      return connection;
    } catch (error) {
      connection.abort();
      tcp.destroy();
      throw this.#explained(error);
    }
  }

  /** Read the files of the trust. A server that is starting writes its CA before it listens. */
  async #tlsOptions(signal: AbortSignal): Promise<TlsSettings["options"]> {
    const { address, trust } = this.#settings;
    try {
      return await trust.tlsOptions();
    } catch (error) {
      if (!trust.isCaMissing()) {
        throw error;
      }
      const tcp = connect(address);
      try {
        await this.#inTime(this.#reached(tcp), signal);
      } finally {
        tcp.destroy();
      }
      return await trust.tlsOptions();
    }
  }

  /** Limit a part of an attempt by the connect timeout. */
  async #inTime<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
    const { address, clock, connectTimeoutMs } = this.#settings;
    const timeout = new AbortController();
    const timer = clock.after(connectTimeoutMs, () => {
      timeout.abort(new CannotConnect(`${addressText(address)}: no response within ${connectTimeoutMs / 1000} s`));
    });
    try {
      return await unlessAborted(work, AbortSignal.any([timeout.signal, signal]));
    } finally {
      timer.cancel();
    }
  }

  #reached(tcp: Socket): Promise<void> {
    return new Promise((resolve, reject) => {
      tcp.once("connect", () => {
        tcp.removeAllListeners("error");
        resolve();
      });
      tcp.once("error", (error) => reject(this.#cannotConnect(error)));
    });
  }

  #cannotConnect(error: Error): CannotConnect {
    const { address, trust } = this.#settings;
    const codes = codesOf(error);
    const refused = codes.includes("ECONNREFUSED");
    const missing = refused && trust.isCaMissing() ? `, and ${escapeText(String(trust.caFile))} does not exist` : "";
    const cure = refused ? "start the server, or check the host and the port" : "check the address and the network";
    const cause = refused ? "ECONNREFUSED" : (codes[0] ?? error.message);
    return new CannotConnect(`${addressText(address)}: ${cause}${missing}; ${cure}`, { refused, cause: error });
  }

  async #establish(tcp: Socket, connection: ConnectionDriver, options: TlsSettings["options"]): Promise<void> {
    const { serverHostname, trust, clock, systemClock } = this.#settings;
    const wall = () => systemClock.wall();
    await this.#reached(tcp);
    await startTls(tcp, connection, { options, host: serverHostname, trust, clock, wall });
    await connection.welcomed;
  }

  /**
   * Explain an error after the handshake: in TLS 1.3 a server refuses a client certificate only then, by an alert or by a
   * plain close.
   */
  #explained(error: unknown): unknown {
    if (error instanceof ConnectionClosed) {
      if (error.cause instanceof TlsError && !isTransient(error.cause.failure)) {
        return error.cause;
      }
      if (error.clean && this.#settings.trust.hasCertificate) {
        return new ConnectionClosed(
          `${error.reason} before its WELCOME; it may have refused this client's certificate`,
          {
            clean: true,
          },
        );
      }
    }
    return error;
  }

  /** Store the server's policy. Failing to write the file only causes a warning. */
  async #remember({ welcome }: ConnectionDriver, knownHosts: KnownHosts): Promise<void> {
    const { serverHostname, systemClock, onWarning } = this.#settings;
    try {
      if (welcome !== undefined) {
        await knownHosts.learn(serverHostname, welcome.sts, systemClock.wall());
      }
    } catch (error) {
      if (!(error instanceof ConfigError || (error as NodeJS.ErrnoException).code !== undefined)) {
        throw error;
      }
      onWarning(`the sts policy of ${serverHostname} was not stored: ${escapeText((error as Error).message)}`);
    }
  }
}

/** Return the error codes of the system. Node wraps those of all addresses of a host in one error without a message. */
function codesOf(error: Error): string[] {
  const errors: NodeJS.ErrnoException[] = error instanceof AggregateError ? error.errors : [error];
  return errors.flatMap(({ code }) => (code === undefined ? [] : [code]));
}
