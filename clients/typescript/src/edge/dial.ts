/** Makes one connection: TCP, TLS, WELCOME, and the `sts` policy of the host. Resolves names. */

import { lookup } from "node:dns/promises";
import { connect, type Socket } from "node:net";
import { type Address, addressText, type Endpoint, endpointText } from "../client/address.js";
import { type Clock, unlessAborted } from "../client/clock.js";
import type { ConnectionListener } from "../client/connection_driver.js";
import { ConnectionDriver } from "../client/connection_driver.js";
import { isTransient } from "../client/retry.js";
import { escapeText } from "../client/text.js";
import { ClientConnection } from "../connection/connection.js";
import { CannotConnect, ConfigError, ConnectionClosed, TlsError, ZcprotoError } from "../errors.js";
import type { KnownHosts } from "./known_hosts.js";
import { startTls, type TlsSettings } from "./transport.js";
import type { Trust } from "./trust.js";

export interface DialSettings {
  /** The name or address to verify in the certificate, instead of the host. */
  readonly serverHostname: string | undefined;
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

/** Makes connections to the servers of a client. */
export class Dialer {
  readonly #settings: DialSettings;

  constructor(settings: DialSettings) {
    this.#settings = settings;
  }

  /** Return the IP addresses of a name, the resolver's choice first. Rejects with CannotConnect or TlsError. */
  async resolve(address: Address, signal: AbortSignal): Promise<string[]> {
    const name = addressText(address);
    await this.#requireVerification(address);
    try {
      const found = await this.#inTime(lookup(address.host, { all: true, verbatim: true }), name, signal);
      return found.map(({ address: ip }) => ip);
    } catch (error) {
      if (error instanceof ZcprotoError) {
        throw error;
      }
      const { code, message } = error as NodeJS.ErrnoException;
      throw new CannotConnect(`${name}: ${code ?? message}; check the host name and DNS`, { cause: error });
    }
  }

  /**
   * Connect and wait for WELCOME, and call `onReached` once there is a TCP connection. Rejects with CannotConnect,
   * ConnectionClosed, TlsError, CertificateError.
   */
  async dial(
    listener: ConnectionListener,
    endpoint: Endpoint,
    onReached: () => void,
    signal: AbortSignal,
  ): Promise<ConnectionDriver> {
    const { trust, knownHosts } = this.#settings;
    await this.#requireVerification(endpoint);
    const connection = await this.#connect(listener, endpoint, onReached, signal);
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

  /** Return the name that the certificate must be valid for. */
  #hostname({ host }: Address): string {
    return this.#settings.serverHostname ?? host;
  }

  /** Reject with TlsError if a policy forbids connecting without verification. */
  async #requireVerification(address: Address): Promise<void> {
    const { trust, knownHosts, systemClock } = this.#settings;
    if (!trust.verify) {
      for (const host of new Set([address.host, this.#hostname(address)])) {
        await knownHosts?.require(host, systemClock.wall());
      }
    }
  }

  async #connect(
    listener: ConnectionListener,
    endpoint: Endpoint,
    onReached: () => void,
    signal: AbortSignal,
  ): Promise<ConnectionDriver> {
    const { clock, maxFrame, toleranceMs } = this.#settings;
    const connection = new ConnectionDriver(listener, clock, new ClientConnection({ maxFrame, toleranceMs }), endpoint);
    const options = await this.#tlsOptions(endpoint, signal);
    const { ip: host, port } = endpoint;
    const tcp = connect({ host, port, noDelay: true, allowHalfOpen: true }); // to send close_notify after the server's
    try {
      await this.#inTime(this.#establish(tcp, connection, options, onReached), endpointText(endpoint), signal);
      return connection;
    } catch (error) {
      connection.abort();
      tcp.destroy();
      throw this.#explained(error);
    }
  }

  /** Read the files of the trust. A server that is starting writes its CA before it listens. */
  async #tlsOptions(endpoint: Endpoint, signal: AbortSignal): Promise<TlsSettings["options"]> {
    const { trust } = this.#settings;
    try {
      return await trust.tlsOptions();
    } catch (error) {
      if (!trust.isCaMissing()) {
        throw error;
      }
      const tcp = connect({ host: endpoint.ip, port: endpoint.port });
      try {
        await this.#inTime(this.#reached(tcp, endpoint), endpointText(endpoint), signal);
      } finally {
        tcp.destroy();
      }
      return await trust.tlsOptions();
    }
  }

  /** Limit a part of an attempt by the connect timeout. */
  async #inTime<T>(work: Promise<T>, name: string, signal: AbortSignal): Promise<T> {
    const { clock, connectTimeoutMs } = this.#settings;
    const timeout = new AbortController();
    const timer = clock.after(connectTimeoutMs, () => {
      timeout.abort(new CannotConnect(`${name}: no response within ${connectTimeoutMs / 1000} s`));
    });
    try {
      return await unlessAborted(work, AbortSignal.any([timeout.signal, signal]));
    } finally {
      timer.cancel();
    }
  }

  #reached(tcp: Socket, endpoint: Endpoint): Promise<void> {
    return new Promise((resolve, reject) => {
      tcp.once("connect", () => {
        tcp.removeAllListeners("error");
        resolve();
      });
      tcp.once("error", (error) => reject(this.#cannotConnect(error, endpoint)));
    });
  }

  #cannotConnect(error: NodeJS.ErrnoException, endpoint: Endpoint): CannotConnect {
    const { trust } = this.#settings;
    const refused = error.code === "ECONNREFUSED";
    const missing = refused && trust.isCaMissing() ? `, and ${escapeText(String(trust.caFile))} does not exist` : "";
    const cure = refused ? "start the server, or check the host and the port" : "check the address and the network";
    const problem = `${error.code ?? error.message}${missing}`;
    return new CannotConnect(`${addressText(endpoint)}: ${problem}; ${cure}`, { refused, cause: error });
  }

  async #establish(
    tcp: Socket,
    connection: ConnectionDriver,
    options: TlsSettings["options"],
    onReached: () => void,
  ): Promise<void> {
    const { trust, clock, systemClock } = this.#settings;
    const wall = () => systemClock.wall();
    await this.#reached(tcp, connection.endpoint);
    onReached();
    await startTls(tcp, connection, { options, host: this.#hostname(connection.endpoint), trust, clock, wall });
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
  async #remember({ endpoint, welcome }: ConnectionDriver, knownHosts: KnownHosts): Promise<void> {
    const { systemClock, onWarning } = this.#settings;
    const hostname = this.#hostname(endpoint);
    try {
      if (welcome !== undefined) {
        await knownHosts.learn(hostname, welcome.sts, systemClock.wall());
      }
    } catch (error) {
      if (!(error instanceof ConfigError || (error as NodeJS.ErrnoException).code !== undefined)) {
        throw error;
      }
      onWarning(`the sts policy of ${hostname} was not stored: ${escapeText((error as Error).message)}`);
    }
  }
}
