/**
 * Hosts with an `sts` policy, which must not be connected to without verification until it ends (RFC 6797 for native
 * clients).
 *
 * Rules: only verified connections set a policy; `max_age` 0 removes it; `include_subdomains` extends it to subdomains;
 * addresses have no policy. The file is JSON with mode 0600, shared with the Python client and replaced atomically. Its size
 * is limited: the policies that end first are dropped. A file that cannot be parsed is an error, never treated as empty.
 *
 * Node cannot take the file lock that Python clients use. It reads the file after writing it, and writes an entry again if
 * another process has overwritten it.
 */

import { randomBytes } from "node:crypto";
import { mkdir, open, readFile, rename, stat, unlink } from "node:fs/promises";
import { isIP } from "node:net";
import { basename, dirname, join } from "node:path";
import { escapeText } from "../client/text.js";
import type { StsPolicy } from "../connection/welcome.js";
import { ConfigError, TlsError } from "../errors.js";
import { isMap } from "../wire/message.js";

export const MAX_HOSTS = 1_000;
const MAX_FILE_SIZE = 1_048_576;
const MAX_AGE_S = 10 * 365 * 86_400;
const REWRITE_AFTER_S = 86_400; // each connection extends a policy; write the file only for larger changes
const MAX_WRITES = 3;

/** The end of a policy in seconds since the Unix epoch, and whether it includes subdomains. */
interface Policy {
  readonly until: number;
  readonly include_subdomains: boolean;
}

type Hosts = Map<string, Policy>;

const writing = new Map<string, Promise<unknown>>(); // serializes the writes of this process by file

export class KnownHosts {
  readonly path: string;

  constructor(path: string) {
    this.path = path;
  }

  /** Store the policy of a host with a verified connection. Rejects with ConfigError and errors of the file system. */
  async learn(host: string, sts: StsPolicy, wall: number): Promise<void> {
    if (isIP(host)) {
      return;
    }
    const before = writing.get(this.path) ?? Promise.resolve();
    const turn = before.then(() => this.#learn(host, sts, Math.floor(wall / 1000)));
    const settled = turn.catch(() => undefined); // reported to this caller only
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

  /** Rejects with TlsError if a policy of the host requires verification. */
  async require(host: string, wall: number): Promise<void> {
    if (isIP(host)) {
      return;
    }
    const now = Math.floor(wall / 1000);
    let hosts: Hosts;
    try {
      hosts = await this.#read();
    } catch (error) {
      throw new TlsError("sts_policy", `verification cannot be disabled: ${(error as Error).message}`, {
        cause: error,
      });
    }
    const labels = host.split(".");
    for (let start = 0; start < labels.length; start++) {
      const name = labels.slice(start).join(".");
      const known = hosts.get(name);
      if (known !== undefined && known.until > now && (start === 0 || known.include_subdomains)) {
        const days = Math.floor((known.until - now) / 86_400) + 1;
        throw new TlsError(
          "sts_policy",
          `${name} requires verified connections for ${days} more days; enable verification (policy stored in` +
            ` ${escapeText(this.path)})`,
        );
      }
    }
  }

  async #read(): Promise<Hosts> {
    let text: string;
    try {
      if ((await stat(this.path)).size > MAX_FILE_SIZE) {
        throw this.#unreadable("the file is too large");
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
      const { hosts } = JSON.parse(text) as { hosts: unknown };
      if (!isMap(hosts)) {
        throw new Error("hosts is not an object");
      }
      return new Map(Object.entries(hosts).map(([name, entry]) => [name, policyOf(entry)]));
    } catch (error) {
      throw this.#unreadable("invalid content", error);
    }
  }

  #unreadable(what: string, cause?: unknown): ConfigError {
    const fault = `${escapeText(this.path)}: ${what}; repair the file, or remove it to forget its hosts`;
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

/** Return whether the stored policy is close enough to skip a write. */
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
