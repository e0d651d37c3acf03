/**
 * The client's session: opened, refreshed and, once the server took it away, given up.
 *
 * What it decides: when a session is opened or refreshed. One attempt serves all calls that wait. After TOKEN_REVOKED or
 * SESSION_REPLACED, or when opening one was refused, nothing is tried again until the application asks for it: every call
 * gets the same error.
 *
 * While a refresh is on its way no call is sent: the server takes the old token for revoked as soon as it has answered. A
 * refresh token works once; when the answer is lost, the same one is good for a few seconds more, and after that must
 * never be used again.
 */

import type { EventReceived } from "../connection/events.js";
import { CallError, Code, ConnectionClosed, Unauthenticated } from "../errors.js";
import { NO_TOKEN, type Token } from "../wire/frame.js";
import type { Params } from "../wire/message.js";
import { Backoff, type Random } from "./backoff.js";
import { type Clock, sleep, type Timer, unlessAborted } from "./clock.js";
import type { Link, PendingCall } from "./link.js";
import { retryAfterMs, SESSION_IS_OVER, whatNext } from "./retry.js";
import { ClientSession, type Credentials, DeviceKey } from "./session.js";

/** The server must answer the methods of sessions within. */
const ANSWER_TIMEOUT_MS = 10_000;
/** For the server to end the session of a client that leaves. */
const CLOSE_TIMEOUT_MS = 2_000;
/** After that a refresh token whose answer was lost is not used again: half the server's usual grace. */
const REFRESH_GRACE_MS = 5_000;
/** Answers to session.open lost in a row: each may have left a session behind that counts against the cap. */
const MAX_LOST = 3;
/** Between attempts to refresh ahead of the end. */
const MIN_AHEAD_INTERVAL_MS = 1_000;

const FOREVER = Number.POSITIVE_INFINITY;
const ENDED_BY_REFUSAL: ReadonlySet<number> = new Set([...SESSION_IS_OVER, Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED]);
const MAYBE_RUN: ReadonlySet<number> = new Set([Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN]);

export interface SessionKeeperOptions {
  readonly clock: Clock;
  readonly getLink: (signal: AbortSignal) => Promise<Link>;
  readonly credentials: Credentials | undefined;
  /** product/version, as the server lists it. */
  readonly client: string;
  readonly random: Random;
}

/**
 * Keeps the session of one client. `token` is what calls carry now, and they may be sent while the time is below
 * `goodUntil`; beyond it, wait for `makeGood`.
 */
export class SessionKeeper {
  session: ClientSession | undefined;
  token: Token = NO_TOKEN;
  goodUntil = FOREVER;
  readonly #options: SessionKeeperOptions;
  readonly #device: DeviceKey | undefined;
  readonly #closing = new AbortController();
  #isWanted = false;
  #unknownToken: Token = NO_TOKEN; // the server did not know it, or a method wants more than it
  #over: CallError | undefined;
  #renewing: Promise<void> | undefined;
  #attaching: { readonly token: Token; readonly call: PendingCall } | undefined;
  #timer: Timer | undefined;

  constructor(options: SessionKeeperOptions) {
    this.#options = options;
    this.#device = options.credentials instanceof DeviceKey ? options.credentials : undefined;
  }

  /** Whether the server took the session away, or refused one: only the application goes on from here. */
  get isOver(): boolean {
    return this.#over !== undefined;
  }

  /**
   * From here on calls need a session. What was over is forgotten, and so is a session that was refused. Throws
   * Unauthenticated if there is nothing to open one with.
   */
  want(): void {
    if (this.#options.credentials === undefined) {
      throw new Unauthenticated("this client has neither a key nor a device nor a certificate to open a session with");
    }
    this.#isWanted = true;
    this.#over = undefined;
    if (this.session !== undefined && this.token === this.#unknownToken) {
      this.session = undefined;
      this.token = NO_TOKEN;
    }
    this.#setGood();
  }

  /**
   * Settles when calls may be sent: with a session that is alive, or with none if none is wanted. Rejects with the error
   * that ended the session, or with which none could be opened, or with the signal's reason.
   */
  async makeGood(signal?: AbortSignal): Promise<void> {
    for (;;) {
      if (this.#over !== undefined) {
        throw this.#over.again();
      }
      if (this.#renewing === undefined) {
        if (this.#options.clock.now() < this.goodUntil) {
          return;
        }
        this.#start(true);
      }
      await unlessAborted(this.#renewing as unknown as Promise<void>, signal);
    }
  }

  /** A call with the token is being sent. */
  used(now: number): void {
    const { session } = this;
    if (session !== undefined && session.idleTimeoutMs > 0) {
      session.used(now);
      this.goodUntil = session.goodUntil;
    }
  }

  /** The server says that a token has expired. */
  expired(token: Token): void {
    if (token === this.token && this.session !== undefined) {
      this.session.expire();
      this.#setGood();
    }
  }

  /** The server says that a token belongs to another certificate. False if this client shows none. */
  reopen(token: Token): boolean {
    if (this.#options.credentials?.kind !== "tls") {
      return false;
    }
    if (token === this.token) {
      this.session?.dropRefreshToken();
      this.expired(token);
    }
    return true;
  }

  /** The server answered UNAUTHENTICATED to a token. It is sent on until the application asks for another. */
  unknown(token: Token): void {
    this.#unknownToken = token;
  }

  /** The server says that a token's session was taken away. */
  ended(token: Token, error: CallError): void {
    if (token === this.token) {
      this.#giveUp(error);
    }
  }

  #giveUp(error: CallError): void {
    this.#over = error;
    this.session = undefined;
    this.token = NO_TOKEN;
    this.#timer?.cancel();
    this.#setGood();
  }

  #setGood(): void {
    if (this.#over !== undefined || this.#renewing !== undefined) {
      this.goodUntil = -FOREVER;
    } else if (this.session !== undefined) {
      this.goodUntil = this.session.goodUntil;
    } else {
      this.goodUntil = this.#isWanted ? -FOREVER : FOREVER;
    }
  }

  // --- new connections and events ---------------------------------------------------------------

  /**
   * Show the token on a new connection, so that it has its session and gets its events. If it is bound to a device, that
   * proves its key. A small request goes first: a larger one would be refused on a connection without a session.
   */
  show(link: Link): void {
    if (this.#renewing === undefined) {
      this.#show(link);
    }
  }

  #show(link: Link): void {
    if (this.session === undefined || !link.ready) {
      return;
    }
    const { token } = this;
    const call =
      this.session.bound && this.#device !== undefined && !link.proved
        ? this.#attach(link, this.#device)
        : link.request("session.info", null, token, undefined, this.#answerDeadline());
    call.answer.catch((error: unknown) => {
      if (error instanceof CallError) {
        this.#refused(token, error);
      }
    });
  }

  #answerDeadline(): number {
    return this.#options.clock.now() + ANSWER_TIMEOUT_MS;
  }

  /** Prove the device's key on a connection; one request serves all who want it. */
  #attach(link: Link, device: DeviceKey): PendingCall {
    const { token } = this;
    const before = this.#attaching;
    if (before?.token === token && before.call.link === link && !before.call.isDone) {
      return before.call;
    }
    const params = device.attachParams(link, token);
    const call = link.request("session.attach", params, token, undefined, this.#answerDeadline());
    this.#attaching = { token, call };
    call.answer.then(
      () => {
        link.proved = true;
      },
      () => undefined, // whoever waits for it is told
    );
    return call;
  }

  /**
   * The server wants the key of a token proved on a connection: do so, if both are still in use. False if there is no
   * device to prove it with. Rejects with the server's answer, DeadlineExceeded, or the signal's reason.
   */
  async attach(link: Link, token: Token, signal?: AbortSignal): Promise<boolean> {
    if (this.#device === undefined) {
      return false;
    }
    if (token === this.token && link.ready) {
      link.proved = false;
      try {
        await unlessAborted(this.#attach(link, this.#device).answer, signal);
      } catch (error) {
        if (!(error instanceof ConnectionClosed)) {
          throw error instanceof CallError && !signal?.aborted ? error.again() : error;
        }
      }
    }
    return true;
  }

  #refused(token: Token, error: CallError): void {
    if (whatNext(error) === "reopen") {
      this.reopen(token);
    } else if (error.code === Code.UNAUTHENTICATED) {
      this.unknown(token);
    } else if (error.code === Code.TOKEN_EXPIRED) {
      this.expired(token);
    } else if (SESSION_IS_OVER.has(error.code)) {
      this.ended(token, error);
    }
  }

  /** What an event says of the session. */
  eventReceived(event: EventReceived, link: Link | undefined): void {
    if (event.token !== this.token || this.session === undefined) {
      return;
    }
    if (event.name === "session.revoked" && link !== undefined) {
      this.show(link); // the answer tells whether it was revoked or replaced
    } else if (event.name === "session.expiring") {
      this.#refreshAhead();
    }
  }

  // --- opening and refreshing -------------------------------------------------------------------

  #refreshAhead(): void {
    const { session } = this;
    if (session !== undefined && this.#renewing === undefined && session.canRefresh(this.#options.clock.now())) {
      this.#start(false);
    }
  }

  #start(must: boolean): void {
    const renewing = this.#renew(must).finally(() => {
      this.#renewing = undefined;
      this.#setGood();
    });
    renewing.catch(() => undefined); // if nobody waited, the next call tries again and is told
    this.#renewing = renewing;
    this.#setGood();
  }

  /** Get a new token. If it need not be, for the old one is good, give up at the first difficulty. */
  async #renew(isMust: boolean): Promise<void> {
    const { clock, getLink, random } = this.#options;
    const { signal } = this.#closing;
    const renewal = { must: isMust, backoff: new Backoff(random), done: new Set<string>(), lost: 0 };
    for (;;) {
      const link = await getLink(signal);
      await link.waitReady(signal);
      if (!link.ready) {
        continue;
      }
      const [method, params] = this.#nextRequest(link);
      const sentAt = clock.now();
      const call = link.request(method, params, NO_TOKEN, undefined, sentAt + ANSWER_TIMEOUT_MS);
      let result: unknown;
      try {
        result = await this.#answerOf(call);
      } catch (error) {
        if (error instanceof ConnectionClosed && !signal.aborted) {
          renewal.lost += 1;
          if (renewal.lost > MAX_LOST) {
            throw error;
          }
          renewal.must ||= method === "session.refresh"; // the old token may be dead by now
          if (clock.now() - sentAt > REFRESH_GRACE_MS) {
            this.session?.dropRefreshToken();
          }
        } else if (error instanceof CallError && !signal.aborted) {
          if (!(await this.#goesOnAfter(error, method, link, renewal))) {
            return;
          }
        } else {
          throw error;
        }
        continue;
      }
      this.#opened(result, link);
      if (this.#device !== undefined && method === "session.open") {
        link.proved = true;
      } else if (this.#device !== undefined && !link.proved) {
        this.#show(link);
      }
      return;
    }
  }

  /** Whether to ask again; false if the old token will do. Rejects with the error if there is no way on. */
  async #goesOnAfter(
    error: CallError,
    method: string,
    link: Link,
    renewal: { must: boolean; backoff: Backoff; done: Set<string> },
  ): Promise<boolean> {
    const { clock } = this.#options;
    const { signal } = this.#closing;
    const then = whatNext(error);
    const isFirst = !renewal.done.has(then);
    renewal.done.add(then);
    if (then === "later" && renewal.must) {
      await sleep(clock, renewal.backoff.next(retryAfterMs(error.details)), signal);
      return true;
    }
    if (then === "at_once" && isFirst) {
      return true;
    }
    if (then === "attach" && isFirst) {
      try {
        await this.attach(link, this.token, signal);
      } catch (refused) {
        if (!(refused instanceof CallError)) {
          throw refused;
        } // whatever it is, the next answer tells it, too
      }
      return true;
    }
    if (method === "session.refresh" && this.#goesOnWithoutRefresh(error)) {
      renewal.must = true;
      return true;
    }
    if (!renewal.must && !SESSION_IS_OVER.has(error.code)) {
      this.#setTimer(this.#nextAhead());
      return false;
    }
    if (ENDED_BY_REFUSAL.has(error.code)) {
      this.#giveUp(error);
    }
    throw error;
  }

  /** The answer, unless this client is closed before it comes. */
  async #answerOf(call: PendingCall): Promise<unknown> {
    const { signal } = this.#closing;
    try {
      return await unlessAborted(call.answer, signal);
    } finally {
      if (signal.aborted) {
        call.link.abandon(call, signal.reason as Error);
      }
    }
  }

  #nextRequest(link: Link): [string, Params] {
    const { clock, credentials, client } = this.#options;
    if (this.session?.canRefresh(clock.now())) {
      return ["session.refresh", { refresh_token: this.session.refreshTokenBytes, client }];
    }
    return ["session.open", { ...credentials?.params(link), client }];
  }

  /**
   * Whether to open a session instead: the refresh token is past its life, may be spent, or belongs to the certificate
   * before.
   */
  #goesOnWithoutRefresh(error: CallError): boolean {
    const isAnothers = whatNext(error) === "reopen" && this.#options.credentials?.kind === "tls";
    if (error.code !== Code.TOKEN_EXPIRED && !MAYBE_RUN.has(error.code) && !isAnothers) {
      return false;
    }
    this.session?.dropRefreshToken();
    return true;
  }

  /** When to try again to refresh ahead: after a quarter to a half of the time that is left. */
  #nextAhead(): number {
    const now = this.#options.clock.now();
    const left = this.session === undefined ? 0 : this.session.goodUntil - now;
    return now + Math.max(left * (0.25 + this.#options.random() / 4), MIN_AHEAD_INTERVAL_MS);
  }

  #opened(result: unknown, link: Link): void {
    const { clock, random } = this.#options;
    const now = clock.now();
    const serverWall = clock.wall() + Number(link.clockOffset);
    const session = new ClientSession(result, { serverWall, now, jitter: random() });
    link.sessionEnded(this.token);
    this.session = session;
    this.token = session.tokenBytes;
    this.#setTimer(session.canRefresh(now) ? session.refreshAt : FOREVER);
  }

  #setTimer(at: number): void {
    this.#timer?.cancel();
    const { clock } = this.#options;
    if (at !== FOREVER && !this.#closing.signal.aborted) {
      // A timer may fire early if its time is beyond what timers can do.
      this.#timer = clock.after(at - clock.now(), () => (clock.now() < at ? this.#setTimer(at) : this.#refreshAhead()));
    }
  }

  // --- the end ----------------------------------------------------------------------------------

  /** End the session on the server, if that can be done now: sessions of a user are counted. */
  async close(link: Link | undefined): Promise<void> {
    this.#closing.abort(new ConnectionClosed("this client is closed", { clean: true }));
    await this.#renewing?.catch(() => undefined); // whoever waited was told
    this.#timer?.cancel();
    const { token, session } = this;
    if (session === undefined || link === undefined || !link.ready) {
      return;
    }
    this.session = undefined;
    const deadline = this.#options.clock.now() + CLOSE_TIMEOUT_MS;
    try {
      await link.request("session.close", null, token, undefined, deadline).answer;
    } catch (error) {
      if (!(error instanceof CallError || error instanceof ConnectionClosed)) {
        throw error;
      } // it ends by itself on the server; there is nothing to be done about it here
    }
  }
}
