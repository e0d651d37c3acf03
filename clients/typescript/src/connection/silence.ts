/**
 * Whether a server has stopped answering while requests are in flight (zcp1.md, section 6.6). Times are monotonic, in
 * milliseconds.
 *
 *     QUIET_MS without a byte -> PING -> PROBE_MS without a byte -> silent -> a byte -> heard
 *
 * Only a client that can connect elsewhere checks this. A silent connection is not dead: its end is the keepalive's business.
 */

/** How long no byte arrives before a PING. */
export const QUIET_MS = 5_000;
/** How long no byte arrives after the PING before the connection is silent. */
export const PROBE_MS = 2_000;
/** A server that was heard so lately is not probed when a call times out. */
export const RECENT_MS = 1_000;
/** The slowest link that is not mistaken for a silent server. */
export const BYTES_PER_SECOND = 65_536;

export class Silence {
  /** Whether the server counts as silent now. */
  isSilent = false;
  /** When the last byte arrived. */
  heardAt: number;
  /** When the last PING was sent that asks for a byte. */
  probedAt = Number.NEGATIVE_INFINITY;
  #silentAt: number | undefined; // after a PING
  #sentBytes = 0; // since a byte arrived
  #unsentBytes = 0;

  constructor(now: number) {
    this.heardAt = now;
  }

  /** Count bytes that are written. */
  sent(bytes: number): void {
    this.#sentBytes += bytes;
  }

  /** Whether a PING was sent, and no byte has arrived since. */
  get isProbed(): boolean {
    return this.#silentAt !== undefined || this.isSilent;
  }

  /** Record that a byte arrived. Return whether the connection was silent. */
  heard(now: number): boolean {
    const wasSilent = this.isSilent;
    this.heardAt = now;
    this.#silentAt = undefined;
    this.#sentBytes = 0;
    this.isSilent = false;
    return wasSilent;
  }

  /** Return whether a PING is due because a call has timed out. */
  callTimedOut(now: number): boolean {
    return !this.isProbed && now - this.heardAt >= RECENT_MS;
  }

  /** Record that a PING is sent, behind bytes that the transport has not sent yet. */
  probe(now: number, unsentBytes: number): void {
    this.probedAt = now;
    this.#unsentBytes = unsentBytes;
    this.#silentAt = now + this.#patience;
  }

  get #patience(): number {
    return PROBE_MS + 1_000 * Math.floor(this.#sentBytes / BYTES_PER_SECOND);
  }

  /** Return what is due: a PING, or the silence of the connection; otherwise when to ask again. */
  check(now: number, unsentBytes: number): "ping" | "silent" | number {
    if (this.isSilent) {
      return "silent";
    }
    if (this.#silentAt === undefined) {
      const pingAt = this.heardAt + QUIET_MS;
      return pingAt <= now ? "ping" : pingAt;
    }
    if (this.#silentAt > now) {
      return this.#silentAt;
    }
    if (unsentBytes < this.#unsentBytes) {
      this.probe(now, unsentBytes); // the server receives, so the PING may not be there yet
      return this.check(now, unsentBytes);
    }
    this.#silentAt = undefined;
    this.isSilent = true;
    return "silent";
  }
}
