/**
 * The connection of a client, which all its sessions share.
 *
 * Decides: which session an event or a call of the server belongs to, and when the application is notified of a connection.
 * Must not know: calls, retries, and how sessions are opened.
 */

import type { CallReceived, EventReceived } from "../connection/events.js";
import { Unauthenticated } from "../errors.js";
import type { Token } from "../wire/frame.js";
import { addressText, type Endpoint } from "./address.js";
import type { ConnectionDriver } from "./connection_driver.js";
import { ConnectionManager } from "./connection_manager.js";
import type { ClientSettings } from "./types.js";

/** A session, as seen by its connection. */
export interface ConnectedSession {
  /** Whether the server has ended the session: it needs no connection. */
  readonly hasEnded: boolean;
  ownsToken(token: Token): boolean;
  /** Show the session on a new connection. */
  present(connection: ConnectionDriver): Promise<void>;
  /** Show it on a connection beside the current one. Resolves with whether the server knows it, or without a session to show. */
  showBeside(connection: ConnectionDriver): Promise<boolean | undefined>;
  eventReceived(event: EventReceived): void;
  callReceived(connection: ConnectionDriver, event: CallReceived): void;
  callWithdrawn(connection: ConnectionDriver, number: number): void;
  connectionEnded(connection: ConnectionDriver, error: Error): void;
  close(): Promise<void>;
}

/** The first session to be added is the client's own: it also gets events that belong to no session. */
export class SharedConnection {
  readonly manager: ConnectionManager;
  readonly #sessions = new Set<ConnectedSession>();
  /** Called once the sessions were shown on a new connection. */
  onConnected: (endpoint: Endpoint) => void = () => undefined;

  constructor(settings: ClientSettings) {
    const { addresses, startTimeoutMs, onWarning } = settings;
    this.manager = new ConnectionManager({
      ...settings,
      onStarting: () => {
        onWarning(
          `${addresses.map(addressText).join(", ")}: nothing listens there yet; waiting up to ${startTimeoutMs / 1000} s for the server to start`,
        );
      },
      isWanted: () => [...this.#sessions].some(({ hasEnded }) => !hasEnded),
      onConnection: (connection) => void this.#present(connection),
      onBeside: (connection) => this.#canMoveTo(connection),
      onExtra: (connection) => this.#showOn(connection),
      onEvent: (event) => this.#sessionOf(event.token)?.eventReceived(event),
      onCall: (connection, event) => this.#callReceived(connection, event),
      onWithdraw: (connection, number) => this.#forAll((session) => session.callWithdrawn(connection, number)),
      onEnded: (connection, error) => this.#forAll((session) => session.connectionEnded(connection, error)),
    });
  }

  add(session: ConnectedSession): void {
    this.#sessions.add(session);
  }

  remove(session: ConnectedSession): void {
    this.#sessions.delete(session);
  }

  /** Close all sessions but the client's own. */
  async closeUsers(): Promise<void> {
    const [, ...users] = this.#sessions;
    await Promise.all(users.map((user) => user.close()));
  }

  #forAll(step: (session: ConnectedSession) => void): void {
    for (const session of this.#sessions) {
      step(session);
    }
  }

  /** Return the session of a token, otherwise the client's own; undefined once that is closed. */
  #sessionOf(token: Token): ConnectedSession | undefined {
    const [own] = this.#sessions;
    return [...this.#sessions].find((session) => session.ownsToken(token)) ?? own;
  }

  #callReceived(connection: ConnectionDriver, event: CallReceived): void {
    const session = this.#sessionOf(event.token);
    if (session?.ownsToken(event.token)) {
      session.callReceived(connection, event);
    } else {
      connection.failCall(event.stream, new Unauthenticated("no session of this client has this token"));
    }
  }

  /** Return whether the server of a connection knows one of the sessions. True without sessions. */
  async #canMoveTo(connection: ConnectionDriver): Promise<boolean> {
    const known = await Promise.all([...this.#sessions].map((session) => session.showBeside(connection)));
    return known.includes(true) || !known.includes(false);
  }

  async #showOn(connection: ConnectionDriver): Promise<void> {
    await Promise.all([...this.#sessions].map((session) => session.present(connection)));
  }

  async #present(connection: ConnectionDriver): Promise<void> {
    await this.#showOn(connection);
    if (this.manager.current === connection) {
      this.onConnected(connection.endpoint);
    }
  }
}
