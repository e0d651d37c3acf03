/**
 * Where a client connects next, without I/O: time, randomness and the resolver's answers in, attempts out.
 *
 * Decides: the order of attempts, when the next one begins beside those under way (RFC 8305), how long an endpoint rests
 * after a failure, and which error a round without success rejects with.
 * Rules: each endpoint has a backoff of its own, and one that has not failed is tried without a delay. The delays start again
 * once a connection has lasted STABLE_AFTER_MS: a server that answers and ends each one must not make its clients reconnect
 * many times a second. The endpoint of the last connection comes first unless it rests; the others come in random order, so
 * that the clients of a server that went down spread evenly, or as listed. The addresses of one name alternate by family.
 * An endpoint is tried once in a round. While an attempt has no TCP connection, the next one begins after ATTEMPT_DELAY_MS;
 * then the server has HANDSHAKE_DELAY_MS, since a fleet that is merely slow must not get several times the handshakes.
 * Must not know: sockets, TLS, sessions and calls.
 */

import { CannotConnect, TlsError, type ZcprotoError } from "../errors.js";
import { type Address, addressText, type Endpoint, endpointText } from "./address.js";
import { Backoff, type Random } from "./backoff.js";
import { isTransient } from "./retry.js";

/** The delay between attempts while there is no TCP connection, as recommended by RFC 8305 section 8. */
export const ATTEMPT_DELAY_MS = 250;
/** The delay from a TCP connection to the next attempt, while there is no WELCOME. */
export const HANDSHAKE_DELAY_MS = 2_000;
/** How long the first name that is resolved waits for those before it. */
export const RESOLUTION_DELAY_MS = 50;
/** How long a connection must last to count as a success. */
export const STABLE_AFTER_MS = 5_000;
/** The longest delay between two attempts to connect to a server that is starting. */
export const MAX_START_DELAY_MS = 1_000;
/** Endpoints of a round: a resolver may return any number. */
export const MAX_ENDPOINTS = 64;
/** Endpoints whose backoff is kept: a name may resolve to others each time. */
export const MAX_KNOWN = 256;

const NEVER = Number.POSITIVE_INFINITY;

/** GOAWAY arrived in the same read as WELCOME. */
export class GoingAway extends CannotConnect {}

interface Health {
  readonly backoff: Backoff;
  restsUntil: number;
  /** The error of the last attempt. */
  error: ZcprotoError | undefined;
}

export interface EndpointsOptions {
  readonly addresses: readonly Address[];
  /** Whether to try addresses in random order instead of as listed. */
  readonly isRandom: boolean;
  readonly random: Random;
}

/** The endpoints of a client, and when each can be tried. */
export class Endpoints {
  /** Why the last attempt failed, or the last connection was lost. */
  lastError: ZcprotoError | undefined;
  hasConnected = false;
  readonly #options: EndpointsOptions;
  readonly #health = new Map<string, Health>();
  /** What was to be tried in the last round: endpoints, and addresses that cannot be resolved. */
  #listed: string[] = [];
  /** The addresses that were not resolved by its end. */
  #unlisted = new Set<string>();
  #last: Endpoint | undefined;
  #stableAt = NEVER;

  constructor(options: EndpointsOptions) {
    this.#options = options;
  }

  /** When the next round can begin. An address that the last one has not resolved can be tried at any time. */
  get dueAt(): number {
    return this.#listed.length === 0 || this.#unlisted.size > 0
      ? -NEVER
      : Math.min(...this.#listed.map((name) => this.#of(name).restsUntil));
  }

  /** Whether nothing listens at one of the endpoints. */
  get isRefused(): boolean {
    return this.#errors().some((error) => error instanceof CannotConnect && error.refused);
  }

  /** Whether there may be another endpoint than this one. */
  hasOther(endpoint: Endpoint): boolean {
    return this.otherDueAt(endpoint) < NEVER;
  }

  /** When another endpoint than this one can be tried; Infinity without one. */
  otherDueAt(endpoint: Endpoint): number {
    const others = this.#listed.filter((name) => name !== endpointText(endpoint));
    return this.#unlisted.size > 0 ? -NEVER : Math.min(...others.map((name) => this.#of(name).restsUntil));
  }

  /** Begin a round: resolve the addresses in its `order`, and make its attempts, none of them at `except`. */
  beginRound(except?: Endpoint): Round {
    const order = [...this.#options.addresses];
    this.#shuffle(order);
    const last = this.#last === undefined ? undefined : addressText(this.#last);
    putFirst(order, (address) => addressText(address) === last);
    this.#listed = [];
    this.#unlisted = new Set(order.map(addressText));
    return new Round(this, order, except);
  }

  /** Record the connection that the client uses from now on. */
  connected(endpoint: Endpoint, now: number): void {
    this.#last = endpoint;
    this.#stableAt = now + STABLE_AFTER_MS;
    const health = this.#of(endpointText(endpoint));
    health.restsUntil = -NEVER;
    health.error = undefined;
    if (!this.hasConnected) {
      this.hasConnected = true;
      for (const { backoff } of this.#health.values()) {
        backoff.reset(); // waiting for the start does not delay the first reconnect
      }
    }
  }

  /** Let the endpoint of the connection rest that was lost, or whose server goes away. */
  lost(endpoint: Endpoint, now: number, retryAfterMs: number): void {
    const health = this.#of(endpointText(endpoint));
    if (now >= this.#stableAt) {
      health.backoff.reset();
    }
    this.#stableAt = NEVER;
    rest(health, now + health.backoff.next(retryAfterMs));
  }

  /** Let an endpoint rest after a failed attempt. */
  failed(endpoint: Endpoint, error: ZcprotoError, now: number, retryAfterMs = 0): void {
    this.#failed(endpointText(endpoint), error, now, retryAfterMs);
  }

  #failed(name: string, error: ZcprotoError, now: number, retryAfterMs: number): void {
    const health = this.#of(name);
    health.error = error;
    this.lastError = error;
    const delay = health.backoff.next();
    rest(health, now + retryAfterMs + (this.hasConnected ? delay : Math.min(delay, MAX_START_DELAY_MS)));
  }

  /**
   * Return the error of a round without success, or undefined if another round may have success: before the first
   * connection while a server may be starting, until `startsUntil`; later unless all endpoints have failed permanently.
   */
  failure(startsUntil: number): ZcprotoError | undefined {
    const errors = this.#errors();
    const permanent = errors.find(isPermanent);
    if (this.hasConnected) {
      if (!errors.every(isPermanent)) {
        return undefined;
      }
      for (const name of this.#listed) {
        this.#of(name).restsUntil = -NEVER; // the next call tries again
      }
      return permanent;
    }
    if (errors.includes(undefined)) {
      return undefined; // not all were tried
    }
    const isStarting = errors.some(mayBeStarting) && this.dueAt < startsUntil;
    const other = errors.find((error) => !mayBeStarting(error)) ?? this.lastError;
    return permanent ?? (isStarting ? undefined : other);
  }

  #errors(): (ZcprotoError | undefined)[] {
    return this.#listed.map((name) => this.#of(name).error);
  }

  /** Return what is known of an endpoint, which counts as used. */
  #of(name: string): Health {
    const health = this.#health.get(name) ?? {
      backoff: new Backoff(this.#options.random),
      restsUntil: -NEVER,
      error: undefined,
    };
    this.#health.delete(name);
    this.#health.set(name, health);
    if (this.#health.size > MAX_KNOWN) {
      const [oldest] = this.#health.keys();
      this.#health.delete(oldest as string);
    }
    return health;
  }

  // --- called by a round -------------------------------------------------------------------------

  /** Return when an endpoint can be tried. */
  restsUntil(endpoint: Endpoint): number {
    return this.#health.get(endpointText(endpoint))?.restsUntil ?? -NEVER;
  }

  /** List the endpoints of an address, in the order of their attempts. */
  listResolved(address: Address, ips: readonly string[]): Endpoint[] {
    this.#unlisted.delete(addressText(address));
    const unique = [...new Set(ips)];
    const isFirst = (ip: string) => ip.includes(":") === unique[0]?.includes(":");
    const families = [unique.filter(isFirst), unique.filter((ip) => !isFirst(ip))];
    for (const family of families) {
      this.#shuffle(family);
    }
    const alternating = unique.flatMap((_, at) => families.flatMap((family) => family.slice(at, at + 1)));
    const found = alternating.map((ip) => ({ ...address, ip }));
    const last = this.#last === undefined ? undefined : endpointText(this.#last);
    putFirst(found, (endpoint) => endpointText(endpoint) === last);
    found.splice(Math.max(0, MAX_ENDPOINTS - this.#listed.length));
    this.#listed.push(...found.map(endpointText));
    return found;
  }

  listUnresolved(address: Address, error: ZcprotoError, now: number): void {
    this.#unlisted.delete(addressText(address));
    this.#listed.push(addressText(address));
    this.#failed(addressText(address), error, now, 0);
  }

  /** Bring items into random order (Fisher-Yates), if that is wanted. */
  #shuffle(items: unknown[]): void {
    const { isRandom, random } = this.#options;
    for (let last = items.length - 1; isRandom && last > 0; last--) {
      const at = Math.floor(random() * (last + 1));
      [items[at], items[last]] = [items[last], items[at]];
    }
  }
}

/** The attempts to connect to each endpoint once. Call `next` after everything that happens. */
export class Round {
  readonly order: readonly Address[];
  readonly #endpoints: Endpoints;
  readonly #found = new Map<Address, Endpoint[]>();
  readonly #except: string | undefined;
  readonly #tried = new Set<Endpoint>();
  #latest: Endpoint | undefined;
  /** When the next attempt begins beside the latest. */
  #nextAt = -NEVER;
  /** When to stop waiting for names that are not resolved yet. */
  #namesUntil = NEVER;

  constructor(endpoints: Endpoints, order: readonly Address[], except: Endpoint | undefined) {
    this.#endpoints = endpoints;
    this.#except = except === undefined ? undefined : endpointText(except);
    this.order = order;
  }

  /** Add the IP addresses of an address, in the resolver's order. */
  resolved(address: Address, ips: readonly string[], now: number): void {
    const found = this.#endpoints.listResolved(address, ips);
    this.#found.set(
      address,
      found.filter((endpoint) => endpointText(endpoint) !== this.#except),
    );
    this.#namesUntil = Math.min(this.#namesUntil, now + RESOLUTION_DELAY_MS);
  }

  /** Record that an address cannot be resolved. */
  unresolved(address: Address, error: ZcprotoError, now: number): void {
    this.#found.set(address, []);
    this.#endpoints.listUnresolved(address, error, now);
  }

  /** Record that an attempt has a TCP connection. */
  reached(endpoint: Endpoint, now: number): void {
    if (endpoint === this.#latest) {
      this.#nextAt = now + HANDSHAKE_DELAY_MS;
    }
  }

  /** Record that an attempt has failed. */
  failed(endpoint: Endpoint, error: ZcprotoError, now: number): void {
    if (endpoint === this.#latest) {
      this.#nextAt = -NEVER;
    }
    this.#endpoints.failed(endpoint, error, now);
  }

  /** Return the endpoint to try now, or when to ask again: Infinity if only an attempt or a name can change that. */
  next(now: number): Endpoint | number {
    let restsUntil = NEVER;
    for (const address of this.order) {
      const found = this.#found.get(address);
      if (found === undefined && now < this.#namesUntil) {
        return this.#namesUntil;
      }
      for (const endpoint of found ?? []) {
        if (this.#tried.has(endpoint)) {
          continue;
        }
        const until = this.#endpoints.restsUntil(endpoint);
        if (until > now) {
          restsUntil = Math.min(restsUntil, until);
        } else if (now < this.#nextAt) {
          return this.#nextAt;
        } else {
          this.#tried.add(endpoint);
          this.#latest = endpoint;
          this.#nextAt = now + ATTEMPT_DELAY_MS;
          return endpoint;
        }
      }
    }
    return restsUntil;
  }
}

function rest(health: Health, until: number): void {
  health.restsUntil = Math.max(health.restsUntil, until);
}

function isPermanent(error: ZcprotoError | undefined): boolean {
  return error instanceof TlsError && !isTransient(error.failure);
}

/** Return whether a server may be starting, or be replaced by a new one. */
function mayBeStarting(error: ZcprotoError | undefined): boolean {
  return error instanceof GoingAway || (error instanceof CannotConnect && error.refused);
}

/** Move the items that match to the front. */
function putFirst<T>(items: T[], matches: (item: T) => boolean): void {
  items.sort((one, other) => Number(matches(other)) - Number(matches(one)));
}
