/**
 * Hosts that were seen with an `sts` policy: until it ends, they are not connected to with verification off.
 *
 * RFC 6797 for native clients. Rules: learned over verified connections only; `max_age` 0 forgets; a policy with
 * `include_subdomains` holds for names below the host; addresses have none. The file is JSON, mode 0600, the same that
 * the Python client keeps, and replaced in one step. It is bounded: the policies that end first make room. One that
 * cannot be read is never taken for empty.
 *
 * Node has no lock on files that Python's clients heed. So what was written is read again: an entry that another process
 * has overwritten meanwhile is written once more.
 */

import { randomBytes } from "node:crypto";
import { mkdir, open, readFile, rename, stat, unlink } from "node:fs/promises";
import { isIP } from "node:net";
import { basename, dirname, join } from "node:path";
import { printable } from "../client/printable.js";
import type { StsPolicy } from "../connection/welcome.js";
import { ConfigError, TlsError } from "../errors.js";

export const MAX_HOSTS = 1_000;
const MAX_FILE_SIZE = 1_048_576;
const MAX_AGE_S = 10 * 365 * 86_400;
const REWRITE_AFTER_S = 86_400; // each connection moves a policy's end; the file is written when it moves by more
const MAX_WRITES = 3;

/** Until when (seconds since the Unix epoch) verification is a must, and whether for subdomains too. */
interface Policy {
  readonly until: number;
  readonly include_subdomains: boolean;
}

type Hosts = Map<string, Policy>;

const writing = new Map<string, Promise<unknown>>(); // the clients of this process take turns at a file

export class KnownHosts {
  readonly path: string;

  constructor(path: string) {
    this.path = path;
  }

  /** Take in the policy that a host sent over a verified connection. Rejects with errors of the file system, ConfigError. */
  async learn(host: string, sts: StsPolicy, wall: number): Promise<void> {
    if (isIP(host)) {
      return;
    }
    const before = writing.get(this.path) ?? Promise.resolve();
    const turn = before.then(() => this.#learn(host, sts, Math.floor(wall / 1000)));
    const settled = turn.catch(() => undefined); // it is told to this caller, not to the next
    writing.set(this.path, settled);
    try {
      await turn;
    } finally {
      if (writing.get(this.path) === settled) {
        writing.delete(this.path);
      }
    }
  }

  async #learn(host: string, sts: StsPolicy, now: number): Promise<void> {
    const maxAge = Math.min(sts.max_age, MAX_AGE_S);
    const policy = { until: now + maxAge, include_subdomains: sts.include_subdomains };
    for (let writes = 0; writes < MAX_WRITES; writes++) {
      const hosts = await this.#read();
      if (isKnown(hosts.get(host), policy, maxAge, now)) {
        return;
      }
      for (const [name, known] of hosts) {
        if (known.until <= now) {
          hosts.delete(name);
        }
      }
      if (maxAge > 0) {
        hosts.set(host, policy);
      } else {
        hosts.delete(host);
      }
      await this.#write(bounded(hosts));
    }
  }

  /** Rejects with TlsError if a policy forbids to connect to a host with verification off. */
  async require(host: string, wall: number): Promise<void> {
    if (isIP(host)) {
      return;
    }
    const now = Math.floor(wall / 1000);
    let hosts: Hosts;
    try {
      hosts = await this.#read();
    } catch (error) {
      throw new TlsError("sts_policy", `verification stays on: ${(error as Error).message}`, { cause: error });
    }
    const labels = host.split(".");
    for (let start = 0; start < labels.length; start++) {
      const name = labels.slice(start).join(".");
      const known = hosts.get(name);
      if (known !== undefined && known.until > now && (start === 0 || known.include_subdomains)) {
        const days = Math.floor((known.until - now) / 86_400) + 1;
        throw new TlsError(
          "sts_policy",
          `${name} demanded verified connections, for ${days} more days; verification cannot be off (remembered in` +
            ` ${printable(this.path)})`,
        );
      }
    }
  }

  async #read(): Promise<Hosts> {
    let text: string;
    try {
      if ((await stat(this.path)).size > MAX_FILE_SIZE) {
        throw this.#unreadable("it is too large");
      }
      text = await readFile(this.path, "utf8");
    } catch (error) {
      if (error instanceof ConfigError) {
        throw error;
      }
      const { code = "unreadable" } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") {
        return new Map();
      }
      throw this.#unreadable(code, error);
    }
    try {
      const { hosts } = JSON.parse(text) as { hosts: Record<string, unknown> };
      return new Map(Object.entries(hosts).map(([name, entry]) => [name, policyOf(entry)]));
    } catch (error) {
      throw this.#unreadable("its content is damaged", error);
    }
  }

  #unreadable(what: string, cause?: unknown): ConfigError {
    const fault = `${printable(this.path)}: ${what}; mend it, or remove it to forget its hosts`;
    return new ConfigError([fault], { cause });
  }

  async #write(hosts: Hosts): Promise<void> {
    const sorted = [...hosts].sort(([a], [b]) => (a < b ? -1 : 1));
    const text = `${JSON.stringify({ hosts: Object.fromEntries(sorted) }, null, 1)}\n`;
    await mkdir(dirname(this.path), { mode: 0o700, recursive: true });
    const temporary = join(dirname(this.path), `.${basename(this.path)}.${randomBytes(8).toString("hex")}`);
    const file = await open(temporary, "wx", 0o600);
    try {
      try {
        await file.writeFile(text);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(temporary, this.path);
    } catch (error) {
      await unlink(temporary);
      throw error;
    }
  }
}

/** Whether the file says so already, near enough. */
function isKnown(known: Policy | undefined, policy: Policy, maxAge: number, now: number): boolean {
  if (known === undefined || maxAge === 0) {
    return known === undefined && maxAge === 0;
  }
  const isNear = Math.abs(known.until - policy.until) < Math.min(REWRITE_AFTER_S, Math.max(1, Math.floor(maxAge / 2)));
  return isNear && known.until > now && known.include_subdomains === policy.include_subdomains;
}

function bounded(hosts: Hosts): Hosts {
  const latest = [...hosts].sort(([, a], [, b]) => b.until - a.until).slice(0, MAX_HOSTS);
  return new Map(latest);
}

function policyOf(entry: unknown): Policy {
  const { until, include_subdomains: subdomains } = entry as Record<string, unknown>;
  if (!Number.isSafeInteger(until) || typeof subdomains !== "boolean") {
    throw new Error("wrong types");
  }
  return { until: until as number, include_subdomains: subdomains };
}
