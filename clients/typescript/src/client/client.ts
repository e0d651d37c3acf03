/** The client of one server, or of several: its own session, and those of other users. */

import type { Welcome } from "../connection/welcome.js";
import { addressText, type Endpoint } from "./address.js";
import { callBack } from "./handlers.js";
import { SharedConnection } from "./shared_connection.js";
import type { ClientSettings, SessionOptions } from "./types.js";
import { UserClient } from "./user_client.js";

/** Called with the client and where it is connected. */
export type OnConnected = (client: Client, endpoint: Endpoint) => unknown;

/** A client of one server, or of several that share their sessions, made by `connect`. */
export class Client extends UserClient {
  /** The first of `addresses`. */
  readonly address: string;
  /** The addresses that `connect` was given. */
  readonly addresses: readonly string[];
  readonly #settings: ClientSettings;
  readonly #onConnected: OnConnected | undefined;
  readonly #shared: SharedConnection;

  /** @internal */
  constructor(settings: ClientSettings, onConnected?: OnConnected) {
    const shared = new SharedConnection(settings);
    super(settings, settings.credentials, shared);
    this.address = addressText(settings.addresses[0]);
    this.addresses = settings.addresses.map(addressText);
    this.#settings = settings;
    this.#onConnected = onConnected;
    this.#shared = shared;
  }

  /** Connect, and open a session if there are credentials. Waits for a server that is starting. @internal */
  override async open(): Promise<void> {
    try {
      await this.#shared.manager.get(); // limited by the start and connect timeouts
    } catch (error) {
      await this.close();
      throw error;
    }
    await super.open();
    const onConnected = this.#onConnected;
    if (onConnected !== undefined) {
      const call = (endpoint: Endpoint) =>
        void callBack("onConnected", () => onConnected(this, endpoint), this.#settings.onWarning);
      if (this.endpoint !== undefined) {
        call(this.endpoint);
      }
      this.#shared.onConnected = call;
    }
  }

  protected override async closeNow(): Promise<void> {
    try {
      await this.#shared.closeUsers();
      await super.closeNow();
    } finally {
      await this.#shared.manager.close();
    }
  }

  /**
   * Open a session of another user on the connection of this client. It has its own calls, streams, handlers and events, and is
   * renewed independently.
   *
   *     await using ada = await client.sessionFor({ user: "ada", key });
   *     await ada.call("order.place", { id: 7 });
   *
   * Rejects with ConfigError without credentials, otherwise like `openSession`.
   */
  async sessionFor(options: SessionOptions): Promise<UserClient> {
    const settings = { ...this.#settings, opensSession: true, onEvent: options.onEvent, positions: undefined };
    const user = new UserClient(settings, await this.#settings.credentialsOf(options), this.#shared);
    await user.open();
    return user;
  }

  /** The WELCOME of the current connection, if any. */
  get welcome(): Welcome | undefined {
    return this.#shared.manager.current?.welcome;
  }

  /** Where this client is connected, if it is. */
  get endpoint(): Endpoint | undefined {
    return this.#shared.manager.current?.endpoint;
  }

  /** Reset the connection like a network failure, for tests. The client reconnects. */
  cut(): void {
    this.#shared.manager.abort();
  }
}
