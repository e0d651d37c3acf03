/**
 * The client's session.
 *
 * Decides: when to open, refresh and attach a session, and when it has ended. After TOKEN_REVOKED, SESSION_REPLACED or a
 * refused `session.open`, every call gets that error until the application requests a new session.
 * Rules: all waiting calls share one attempt. No call is sent during a refresh, since the server revokes the old token with
 * its response. A refresh token works once; if the response was lost, it can be sent again for a few seconds after the
 * first attempt and never later: repetitions do not extend the server's grace. The server cannot cause a storm of requests: early refreshes have a minimum interval, a session that has
 * already expired is renewed with growing delays, and one `session.revoked` per token and connection is checked.
 * Must not know: the calls that use the token.
 */

import type { EventReceived } from "../connection/events.js";
import { CallError, Cancelled, Code, ConnectionClosed, Unauthenticated, ZcprotoError } from "../errors.js";
import { NO_TOKEN, type Token } from "../wire/frame.js";
import type { Params } from "../wire/message.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep, type Timer, unlessAborted } from "./clock.js";
import type { ConnectionDriver, PendingCall } from "./connection_driver.js";
import type { Handlers } from "./handlers.js";
import {
  MAY_HAVE_RUN_CODES,
  REFUSING_CODES,
  retryAction,
  retryAfterMs,
  SESSION_ENDED_CODES,
  type Shown,
} from "./retry.js";
import { ClientSession, type Credentials, DeviceKey, SchemeLogin } from "./session.js";
import { SessionKeeper } from "./session_keeper.js";

/** Timeout of requests of `session.*`. */
const REQUEST_TIMEOUT_MS = 10_000;
/** Timeout of `session.close`. */
const CLOSE_TIMEOUT_MS = 2_000;
/** Consecutive lost responses to `session.open`. Each may have left a session that counts against the limit. */
const MAX_LOST = 3;
/** Minimum interval between early refreshes, and from a session that is usable for less than that to the next one. */
const MIN_REFRESH_INTERVAL_MS = 1_000;

/** How long a session must last until the delays after lost sessions begin again. */
const STABLE_AFTER_MS = 5_000;

const FOREVER = Number.POSITIVE_INFINITY;

export interface SessionManagerOptions {
  readonly clock: Clock;
  readonly getConnection: (signal: AbortSignal) => Promise<ConnectionDriver>;
  /** Return a connection that has room for a request, or takes no more. */
  readonly waitReady: (signal: AbortSignal) => Promise<ConnectionDriver>;
  /** All open connections, those that drain included. */
  readonly connections: () => readonly ConnectionDriver[];
  readonly credentials: Credentials | undefined;
  /** The client as `product/version`, listed by the server. */
  readonly client: string;
  readonly handlers: Handlers;
  readonly random: Random;
}

/**
 * Manages the session of one client. Calls carry `token` and can be sent until `usableUntil`; after that, await
 * `waitUntilUsable`.
 */
export class SessionManager {
  session: ClientSession | undefined;
  token: Token = NO_TOKEN;
  usableUntil = FOREVER;
  readonly #options: SessionManagerOptions;
  readonly #device: DeviceKey | undefined;
  readonly #login: SchemeLogin | undefined;
  readonly #closing = new AbortController();
  #isRequired = false;
  #refusedToken: Token = NO_TOKEN; // refused with UNAUTHENTICATED
  #endedBy: CallError | undefined;
  #renewing: Promise<void> | undefined;
  #previousToken: Token = NO_TOKEN; // before the last refresh
  readonly #proved = new WeakSet<ConnectionDriver>(); // where the server knows the key of the device
  #registered = new WeakSet<ConnectionDriver>(); // where it has accepted the handlers of this session
  readonly #preparing = new Map<ConnectionDriver, Promise<void>>(); // where it gets them now
  #attaching: { readonly token: Token; readonly call: PendingCall } | undefined;
  #timer: Timer | undefined;
  readonly #keeper: SessionKeeper; // of a session with handlers
  #refreshedEarlyAt = -FOREVER;
  #notBefore = -FOREVER; // of the next renewal
  readonly #backoff: Backoff; // of sessions that expire at once
  #isLost = false; // the server does not know the token, and another session has not been opened yet
  readonly #lostBackoff: Backoff; // of sessions that the server has lost
  #openedAt = -FOREVER;
  #checkedRevocation: { readonly salt: bigint; readonly token: Token } | undefined;

  constructor(options: SessionManagerOptions) {
    this.#options = options;
    this.#backoff = new Backoff(options.random);
    this.#lostBackoff = new Backoff(options.random);
    this.#keeper = new SessionKeeper({
      clock: options.clock,
      session: () => (options.handlers.methods.length > 0 && !this.#closing.signal.aborted ? this.session : undefined),
      show: async () => this.presentToken(await options.getConnection(this.#closing.signal)),
      renew: () => this.#renewing ?? this.#start(true),
    });
    this.#device = options.credentials instanceof DeviceKey ? options.credentials : undefined;
    this.#login = options.credentials instanceof SchemeLogin ? options.credentials : undefined;
  }

  /** Whether the session was revoked, replaced or refused. Only the application can open a new one. */
  get hasEnded(): boolean {
    return this.#endedBy !== undefined;
  }

  /** Whether another session can be opened. */
  get canOpen(): boolean {
    return this.#options.credentials !== undefined;
  }

  /** Return which token a request had. After the end of the session no other one has followed it. */
  shown(token: Token): Shown {
    if (token === NO_TOKEN) {
      return "none";
    }
    return token === this.token || this.hasEnded ? "present" : "earlier";
  }

  /** Return whether this is the token of the session, or was its last one. */
  ownsToken(token: Token): boolean {
    return token !== NO_TOKEN && (token === this.token || token === this.#previousToken);
  }

  /** Why the renewal takes its time, if there is a reason. */
  get renewalProblem(): ZcprotoError | undefined {
    const isDelayed = this.#options.clock.now() < this.#notBefore;
    const delayedBy = this.#isLost
      ? "the server has lost the session, and the next one is not open yet"
      : "the server opens only expired sessions; report it to its operator";
    const problem = isDelayed ? delayedBy : this.#login?.problem;
    return problem === undefined ? undefined : new ZcprotoError(problem);
  }

  /**
   * Require a session for calls, and forget one that has ended or was refused. Throws Unauthenticated without
   * credentials.
   */
  requireSession(): void {
    if (this.#options.credentials === undefined) {
      throw new Unauthenticated(
        "this client has no credentials; give a key, a device, a certificate or a login to connect",
      );
    }
    this.#isRequired = true;
    this.#endedBy = undefined;
    if (this.session !== undefined && this.token === this.#refusedToken) {
      this.session = undefined;
      this.token = NO_TOKEN;
    }
    this.#updateUsableUntil();
  }

  /**
   * Wait until calls can be sent: with a valid session, or without one if none is required. Rejects with the error that
   * ended the session or prevented it, or with the signal's reason.
   */
  async waitUntilUsable(signal?: AbortSignal): Promise<void> {
    for (;;) {
      if (this.#endedBy !== undefined) {
        throw this.#endedBy.copy();
      }
      if (this.#renewing === undefined) {
        if (this.#options.clock.now() < this.usableUntil) {
          return;
        }
        this.#start(true);
      }
      await unlessAborted(this.#renewing as unknown as Promise<void>, signal);
    }
  }

  /** Record that a call uses the token now. */
  touch(now: number): void {
    const { session } = this;
    if (session !== undefined && session.idleTimeoutMs > 0) {
      session.touch(now);
      this.usableUntil = session.usableUntil;
    }
  }

  /** Handle TOKEN_EXPIRED for a token. */
  markExpired(token: Token): void {
    if (token === this.token && this.session !== undefined) {
      this.session.expire();
      this.#updateUsableUntil();
    }
  }

  /** Handle a token that belongs to another certificate. Return false for credentials without one. */
  reopen(token: Token): boolean {
    if (this.#options.credentials?.canReopen !== true) {
      return false;
    }
    if (token === this.token) {
      this.session?.dropRefreshToken();
      this.markExpired(token);
    }
    return true;
  }

  /**
   * Handle a token that the server does not know: open another session after a delay, once for all calls (zcp1.md, section 11.2).
   * The store has lost the refresh token as well.
   */
  markLost(token: Token): void {
    if (token === this.token && this.session !== undefined && !this.#isLost) {
      this.#delayOpening();
      this.session.dropRefreshToken();
      this.markExpired(token);
    }
  }

  #delayOpening(): void {
    const now = this.#options.clock.now();
    if (now - this.#openedAt >= STABLE_AFTER_MS) {
      this.#lostBackoff.reset();
    }
    this.#isLost = true;
    this.#notBefore = now + this.#lostBackoff.next();
  }

  /** Handle UNAUTHENTICATED for a token that is not unknown. It stays in use until the application requests a new session. */
  markRefused(token: Token): void {
    this.#refusedToken = token;
  }

  /** Handle TOKEN_REVOKED or SESSION_REPLACED for a token. */
  markEnded(token: Token, error: CallError): void {
    if (token === this.token) {
      this.#endSession(error);
    }
  }

  #endSession(error: CallError): void {
    this.#endedBy = error;
    this.#isLost = false;
    this.session = undefined;
    this.#previousToken = this.token;
    this.token = NO_TOKEN;
    this.#options.handlers.abort(error);
    this.#timer?.cancel();
    this.#keeper.stop();
    this.#updateUsableUntil();
  }

  #updateUsableUntil(): void {
    if (this.#endedBy !== undefined || this.#renewing !== undefined) {
      this.usableUntil = -FOREVER;
    } else if (this.session !== undefined) {
      this.usableUntil = this.session.usableUntil;
    } else {
      this.usableUntil = this.#isRequired ? -FOREVER : FOREVER;
    }
  }

  // --- new connections and events ----------------------------------------------------------------

  /**
   * Present the token on a new connection, so that events and calls of the session arrive there. Attach a session that is bound to
   * a device. The request is small: a large one is refused on a connection without a session.
   */
  async presentToken(connection: ConnectionDriver): Promise<void> {
    if (this.#renewing === undefined) {
      await this.#presentToken(connection);
    }
  }

  /** Return what to wait for before a request is sent on a connection: the server gets the handlers there first. */
  preparing(connection: ConnectionDriver): Promise<void> | undefined {
    return this.#preparing.size === 0 ? undefined : this.#preparing.get(connection);
  }

  /** Note that the handlers are being registered on a connection, if there are any that it does not have. */
  #prepare(connection: ConnectionDriver, work: Promise<void>): Promise<void> {
    if (this.#lacksHandlers(connection)) {
      const done = work.catch(() => undefined).finally(() => this.#preparing.delete(connection));
      this.#preparing.set(connection, done);
    }
    return work;
  }

  #lacksHandlers(connection: ConnectionDriver): boolean {
    return this.#canRegister(connection) && !this.#registered.has(connection);
  }

  async #presentToken(connection: ConnectionDriver): Promise<void> {
    if (this.session !== undefined && connection.ready) {
      await this.#prepare(connection, this.#present(connection));
    }
  }

  async #present(connection: ConnectionDriver): Promise<void> {
    const { token } = this;
    const provingDevice = this.#provingDevice(connection);
    try {
      if (provingDevice !== undefined) {
        await this.#attach(connection, provingDevice).response;
        await this.#registerIfAny(connection);
      } else if (this.#canRegister(connection)) {
        await this.registerHandlers(connection);
      } else {
        await connection.request("session.info", null, token, undefined, this.#requestDeadline()).response;
      }
    } catch (error) {
      if (error instanceof CallError) {
        this.#handleRefusal(token, error);
      } else if (!(error instanceof ConnectionClosed)) {
        throw error;
      } // the next connection presents the token
    }
  }

  /** Register the application's handlers for the session on a connection that is ready. Rejects like a call. */
  async registerHandlers(connection: ConnectionDriver): Promise<void> {
    const { methods, max } = this.#options.handlers;
    this.touch(this.#options.clock.now());
    this.#keeper.start();
    const registered = this.#registered;
    await connection.handle(this.token, methods, max, this.#requestDeadline()).response;
    registered.add(connection);
  }

  /** Register them on all connections but one, too. Errors are ignored: the server calls where it can. */
  async registerElsewhere(but: ConnectionDriver | undefined): Promise<void> {
    const others = this.#options.connections().filter((other) => other !== but && this.#canRegister(other));
    await Promise.all(others.map((other) => this.registerHandlers(other).catch(ignoreCallError)));
  }

  async #registerIfAny(connection: ConnectionDriver): Promise<void> {
    if (this.#canRegister(connection)) {
      await connection.waitReady(this.#closing.signal);
      if (connection.ready) {
        await this.registerHandlers(connection);
      }
    }
  }

  #canRegister(connection: ConnectionDriver): boolean {
    const hasHandlers = this.#options.handlers.methods.length > 0;
    return hasHandlers && connection.welcome?.calls !== undefined && !connection.draining;
  }

  /** Return the device, if it has to prove its key on a connection for the session. */
  #provingDevice(connection: ConnectionDriver): DeviceKey | undefined {
    return this.session?.bound === true && !this.#proved.has(connection) ? this.#device : undefined;
  }

  #requestDeadline(): number {
    return this.#options.clock.now() + REQUEST_TIMEOUT_MS;
  }

  /** Attach the session to a connection. Concurrent callers share one request. */
  #attach(connection: ConnectionDriver, device: DeviceKey): PendingCall {
    const { token } = this;
    const current = this.#attaching;
    if (current?.token === token && current.call.connection === connection && !current.call.isDone) {
      return current.call;
    }
    const params = device.attachParams(connection, token);
    const call = connection.request("session.attach", params, token, undefined, this.#requestDeadline());
    this.#attaching = { token, call };
    call.response.then(
      () => {
        this.#proved.add(connection);
      },
      () => undefined, // reported to its waiters
    );
    return call;
  }

  /**
   * Attach the session of a token to a connection if both are still in use. Return false without a device. Rejects with the
   * server's error, DeadlineExceeded, or the signal's reason.
   */
  async attach(connection: ConnectionDriver, token: Token, signal?: AbortSignal): Promise<boolean> {
    if (this.#device === undefined) {
      return false;
    }
    if (token === this.token && connection.ready) {
      this.#proved.delete(connection);
      try {
        await unlessAborted(this.#attach(connection, this.#device).response, signal);
      } catch (error) {
        if (!(error instanceof ConnectionClosed)) {
          throw error instanceof CallError && !signal?.aborted ? error.copy() : error;
        }
      }
    }
    return true;
  }

  #handleRefusal(token: Token, error: CallError): void {
    const action = retryAction(error);
    if (action === "reopen") {
      this.reopen(token);
    } else if (action === "replace" && this.canOpen) {
      this.markLost(token);
      if (this.#renewing === undefined && this.#isLost) {
        this.#start(true); // events and calls of the server need a session, too
      }
    } else if (error.code === Code.UNAUTHENTICATED) {
      this.markRefused(token);
    } else if (error.code === Code.TOKEN_EXPIRED) {
      this.markExpired(token);
    } else if (SESSION_ENDED_CODES.has(error.code)) {
      this.markEnded(token, error);
    }
  }

  /** Handle an event of the session. */
  eventReceived(event: EventReceived, connection: ConnectionDriver | undefined): void {
    if (event.token !== this.token || this.session === undefined) {
      return;
    }
    if (event.name === "session.revoked") {
      this.#options.handlers.abort(new Cancelled("the session has ended"));
    }
    if (event.name === "session.revoked" && connection !== undefined) {
      const { salt } = connection;
      if (this.#checkedRevocation?.salt !== salt || this.#checkedRevocation.token !== this.token) {
        this.#checkedRevocation = { salt, token: this.token };
        void this.presentToken(connection); // the response has the code: revoked or replaced
      }
    } else if (event.name === "session.expiring") {
      this.#refreshEarly();
    }
  }

  // --- opening and refreshing --------------------------------------------------------------------

  #refreshEarly(): void {
    const { session } = this;
    const now = this.#options.clock.now();
    if (session === undefined || this.#renewing !== undefined || !session.canRefresh(now)) {
      return;
    }
    const allowedAt = this.#refreshedEarlyAt + MIN_REFRESH_INTERVAL_MS;
    if (now < allowedAt) {
      this.#setTimer(allowedAt);
      return;
    }
    this.#refreshedEarlyAt = now;
    this.#start(false);
  }

  #start(must: boolean): void {
    const renewing = this.#renew(must).finally(() => {
      this.#renewing = undefined;
      this.#updateUsableUntil();
      this.#keeper.start();
    });
    renewing.catch(() => undefined); // without a waiter, the next call retries and reports it
    this.#renewing = renewing;
    this.#updateUsableUntil();
  }

  /** Refresh or open the session. Unless `isMust`, the old token still works: give up at the first error. */
  async #renew(isMust: boolean): Promise<void> {
    const { clock, getConnection, waitReady, random } = this.#options;
    const { signal } = this.#closing;
    await this.#untilOpeningIsAllowed();
    const renewal = { must: isMust, backoff: new Backoff(random), done: new Set<string>(), lost: 0 };
    for (;;) {
      await getConnection(signal);
      const login = this.#loginToFetch(clock.now());
      if (login !== undefined) {
        await unlessAborted(
          login.fetch(() => clock.now()),
          signal,
        );
        continue; // with the connection that is current now
      }
      const connection = await waitReady(signal);
      const sentAt = clock.now();
      if (!connection.ready || this.#loginToFetch(sentAt) !== undefined) {
        continue;
      }
      const [method, params] = this.#nextRequest(connection, sentAt);
      const call = connection.request(method, params, this.token, undefined, sentAt + REQUEST_TIMEOUT_MS);
      let result: unknown;
      try {
        result = await this.#responseOf(call);
      } catch (error) {
        if (error instanceof ConnectionClosed && !signal.aborted) {
          if (method === "session.refresh" && !connection.unansweredDidNotRun) {
            renewal.must = true; // the old token may be revoked
            this.session?.markRefreshLost(sentAt);
          }
          renewal.lost += 1;
          if (renewal.lost > MAX_LOST) {
            throw error;
          }
        } else if (error instanceof CallError && !signal.aborted) {
          if (!(await this.#shouldRetry(error, method, connection, renewal))) {
            return;
          }
        } else {
          throw error;
        }
        continue;
      }
      this.#adopt(result, connection, method);
      return;
    }
  }

  async #untilOpeningIsAllowed(): Promise<void> {
    const { clock } = this.#options;
    const delay = this.#notBefore - clock.now();
    if (delay > 0) {
      await sleep(clock, delay, this.#closing.signal);
    }
  }

  /** Return whether to retry; false if the old token still works. Rejects with the error if a retry cannot help. */
  async #shouldRetry(
    error: CallError,
    method: string,
    connection: ConnectionDriver,
    renewal: { must: boolean; backoff: Backoff; done: Set<string> },
  ): Promise<boolean> {
    const { clock, random } = this.#options;
    const { signal } = this.#closing;
    const action = retryAction(error);
    const isFirst = !renewal.done.has(action);
    renewal.done.add(action);
    if (action === "later" && renewal.must) {
      await sleep(clock, renewal.backoff.next(retryAfterMs(error.details)), signal);
      return true;
    }
    if (action === "at_once" && isFirst) {
      return true;
    }
    if (action === "attach" && isFirst) {
      try {
        await this.attach(connection, this.token, signal);
      } catch (refusal) {
        if (!(refusal instanceof CallError)) {
          throw refusal;
        } // the next response reports it, too
      }
      return true;
    }
    if (method === "session.refresh" && this.#shouldOpenInstead(error, renewal.must)) {
      renewal.must = true;
      await this.#untilOpeningIsAllowed();
      return true;
    }
    if (!renewal.must && !SESSION_ENDED_CODES.has(error.code)) {
      const wait = ((this.session?.usableUntil ?? 0) - clock.now()) * (0.25 + random() / 4); // a quarter to a half
      this.#setTimer(clock.now() + Math.max(wait, MIN_REFRESH_INTERVAL_MS));
      return false;
    }
    if (REFUSING_CODES.has(error.code)) {
      this.#endSession(error);
    }
    throw error;
  }

  /** Wait for a response, or until this client is closed. */
  async #responseOf(call: PendingCall): Promise<unknown> {
    const { signal } = this.#closing;
    try {
      return await unlessAborted(call.response, signal);
    } finally {
      if (signal.aborted) {
        call.connection.abandon(call, signal.reason as Error);
      }
    }
  }

  /** Return the login that must be fetched before the next request, if it needs one. */
  #loginToFetch(now: number): SchemeLogin | undefined {
    return this.#login?.isFetched(now) === false && this.session?.canRefresh(now) !== true ? this.#login : undefined;
  }

  #nextRequest(connection: ConnectionDriver, now: number): [string, Params] {
    const { credentials, client } = this.#options;
    if (this.session?.canRefresh(now)) {
      return ["session.refresh", { refresh_token: this.session.refreshTokenBytes, client }];
    }
    return ["session.open", { ...credentials?.params(connection), client }];
  }

  /**
   * Return whether to open a new session instead: the refresh token has expired, may have been used, belongs to a previous
   * certificate, or is unknown when the token is no longer usable.
   */
  #shouldOpenInstead(error: CallError, isMust: boolean): boolean {
    const action = retryAction(error);
    if (error.code === Code.UNAUTHENTICATED && (action === "report" || action === "replace")) {
      if (!isMust) {
        return false;
      }
      this.#delayOpening();
    } else if (action === "reopen") {
      if (this.#options.credentials?.canReopen !== true) {
        return false;
      }
    } else if (error.code !== Code.TOKEN_EXPIRED && !MAY_HAVE_RUN_CODES.has(error.code)) {
      return false;
    }
    this.session?.dropRefreshToken();
    return true;
  }

  #adopt(result: unknown, connection: ConnectionDriver, method: string): void {
    const { clock, random } = this.#options;
    const now = clock.now();
    const serverWall = clock.wall() + Number(connection.clockOffset);
    const session = new ClientSession(result, { serverWall, now, jitter: random() });
    const { token } = this;
    this.session = session;
    this.token = session.tokenBytes;
    this.#isLost = false;
    if (method === "session.refresh") {
      this.#previousToken = token;
      this.#showElsewhere(connection, token);
    } else {
      this.#openedAt = now;
      this.#registered = new WeakSet();
      this.#proved.add(connection);
      for (const other of this.#options.connections()) {
        other.sessionEnded(token);
        if (other !== connection) {
          void this.#presentToken(other);
        }
      }
    }
    this.#setTimer(session.canRefresh(now) ? session.refreshAt : FOREVER);
    if (session.usableUntil - now < MIN_REFRESH_INTERVAL_MS) {
      this.#notBefore = now + MIN_REFRESH_INTERVAL_MS + this.#backoff.next();
    } else {
      this.#backoff.reset();
    }
    if (this.#device !== undefined && !this.#proved.has(connection)) {
      void this.#presentToken(connection);
    } else if (this.#lacksHandlers(connection)) {
      this.#prepare(connection, this.#registerIfAny(connection)).catch(() => undefined); // the next connection registers them
    }
  }

  /**
   * Show the new token on all other connections at once: the server suspends the session there until then, and cuts its streams
   * after a minute at most (zcp1.md, section 9.6). The answers do not matter.
   */
  #showElsewhere(but: ConnectionDriver, old: Token): void {
    for (const other of this.#options.connections()) {
      if (other === but) {
        continue;
      }
      other.tokenRenewed(old, this.token);
      if (other.ready && this.#lacksHandlers(other)) {
        void this.#presentToken(other);
      } else {
        this.#show(other).catch(ignoreCallError);
      }
    }
  }

  /**
   * Show the session on a connection beside the one in use. Return whether the server knows it there, or nothing without a session
   * to show.
   */
  async showBeside(connection: ConnectionDriver): Promise<boolean | undefined> {
    if (this.session === undefined || this.#renewing !== undefined) {
      return undefined;
    }
    try {
      await this.#show(connection);
      return true;
    } catch (error) {
      ignoreCallError(error);
      return error instanceof CallError && error.code === Code.TOKEN_EXPIRED;
    }
  }

  async #show(connection: ConnectionDriver): Promise<void> {
    const { token } = this;
    const device = this.#provingDevice(connection);
    if (device === undefined) {
      await connection.show("session.info", null, token, this.#requestDeadline()).response;
    } else {
      const params = device.attachParams(connection, token);
      await connection.show("session.attach", params, token, this.#requestDeadline()).response;
      this.#proved.add(connection);
    }
  }

  #setTimer(at: number): void {
    this.#timer?.cancel();
    const { clock } = this.#options;
    if (at !== FOREVER && !this.#closing.signal.aborted) {
      // A timer fires early if its delay exceeds the maximum timer delay.
      this.#timer = clock.after(at - clock.now(), () => (clock.now() < at ? this.#setTimer(at) : this.#refreshEarly()));
    }
  }

  // --- the end -----------------------------------------------------------------------------------

  /** Close the session on the server if the connection is ready, since the server limits sessions per user. */
  async close(connection: ConnectionDriver | undefined): Promise<void> {
    this.#closing.abort(new ConnectionClosed("this client is closed; connect again", { clean: true }));
    await this.#renewing?.catch(() => undefined); // reported to its waiters
    this.#timer?.cancel();
    this.#keeper.stop();
    const { token, session } = this;
    if (session === undefined || connection === undefined || !connection.ready) {
      return;
    }
    this.session = undefined;
    this.#previousToken = token;
    const deadline = this.#options.clock.now() + CLOSE_TIMEOUT_MS;
    try {
      await connection.request("session.close", null, token, undefined, deadline).response;
    } catch (error) {
      if (!(error instanceof CallError || error instanceof ConnectionClosed)) {
        throw error;
      } // the session expires on the server
    }
    connection.sessionEnded(token);
  }
}

function ignoreCallError(error: unknown): void {
  if (!(error instanceof CallError || error instanceof ConnectionClosed)) {
    throw error;
  }
}
