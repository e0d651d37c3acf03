/** Parses WELCOME and GOAWAY. All required keys are validated. */

import { Code, ProtocolError } from "../errors.js";
import { MessageError } from "../wire/body.js";
import { MIN_LENGTH, VERSION } from "../wire/frame.js";
import { decodeMap, isInt, isMap } from "../wire/message.js";

/** The policy of RFC 6797 for native clients. `max_age` is in seconds. */
export interface StsPolicy {
  readonly max_age: number;
  readonly include_subdomains: boolean;
}

/** The settings of the server; there may be more keys. */
export interface Welcome {
  readonly server: string;
  readonly versions: readonly number[];
  readonly max_frame: number;
  readonly max_streams: number;
  readonly idle_timeout_ms: number;
  readonly tolerance_ms: number;
  readonly sts: StsPolicy;
  readonly streams?: StreamLimits;
  readonly calls?: CallLimits;
  readonly [more: string]: unknown;
}

/** The limits of streams of items, if the server has them. */
export interface StreamLimits {
  readonly max_open: number;
  readonly max_item: number;
  /** Whether streams may be durable. */
  readonly durable?: boolean;
}

/** The limits of calls from the server, if it has them. */
export interface CallLimits {
  readonly max: number;
}

const MINIMUM = { max_frame: MIN_LENGTH, max_streams: 1, idle_timeout_ms: 0, tolerance_ms: 0 };
/** Maps that may be absent, and the least value of each required key. */
const EXTENSIONS = { streams: { max_open: 0, max_item: MIN_LENGTH }, calls: { max: 0 } };

/** Parse WELCOME (zcp1.md, sections 6.2 and 18.3). Throws ProtocolError. */
export function readWelcome(body: Buffer, maxDepth: number): Welcome {
  const fields = readMap("WELCOME", body, maxDepth);
  requireKey("server", typeof fields["server"] === "string");
  requireKey("versions", Array.isArray(fields["versions"]));
  requireLimits(fields, MINIMUM);
  const { sts } = fields;
  requireKey("sts", isMap(sts));
  const { max_age: maxAge, include_subdomains: subdomains } = sts as Record<string, unknown>;
  requireKey("sts.max_age", isInt(maxAge) && maxAge >= 0);
  requireKey("sts.include_subdomains", typeof subdomains === "boolean");
  if (!(fields["versions"] as unknown[]).includes(VERSION)) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: the server does not support version 1");
  }
  for (const [name, minimum] of Object.entries(EXTENSIONS)) {
    if (name in fields) {
      requireKey(name, isMap(fields[name]));
      requireLimits(fields[name] as Record<string, unknown>, minimum, `${name}.`);
    }
  }
  const { durable = false } = (fields["streams"] ?? {}) as Record<string, unknown>;
  requireKey("streams.durable", typeof durable === "boolean");
  const welcome = decodeMap(body, maxDepth) as unknown as Welcome;
  // Limits beyond the exact range of a number are never reached.
  const numbers = (map: object, minimum: object) =>
    Object.fromEntries(Object.keys(minimum).map((key) => [key, Number(map[key as keyof typeof map])]));
  const extensions = Object.entries(EXTENSIONS).flatMap(([name, minimum]) => {
    const map = welcome[name] as object | undefined;
    return map === undefined ? [] : [[name, { ...map, ...numbers(map, minimum) }]];
  });
  return {
    ...welcome,
    ...numbers(welcome, MINIMUM),
    ...Object.fromEntries(extensions),
    sts: { ...welcome.sts, max_age: Number(maxAge) },
  };
}

function requireLimits(fields: Record<string, unknown>, minimum: Record<string, number>, prefix = ""): void {
  for (const [key, least] of Object.entries(minimum)) {
    const value = fields[key];
    requireKey(prefix + key, isInt(value) && value >= least);
  }
}

/** Parse GOAWAY (zcp1.md, section 6.7). Throws ProtocolError. */
export function readGoAway(body: Buffer, maxDepth: number): { reason: string; retryAfterMs: number } {
  const { reason, retry_after_ms: retryAfterMs } = readMap("GOAWAY", body, maxDepth);
  if (typeof reason !== "string" || !isInt(retryAfterMs) || retryAfterMs < 0) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "GOAWAY must have a reason and retry_after_ms");
  }
  return { reason, retryAfterMs: Number(retryAfterMs) };
}

function readMap(kind: string, body: Buffer, maxDepth: number): Record<string, unknown> {
  try {
    return decodeMap(body, maxDepth, "apart");
  } catch (error) {
    if (error instanceof MessageError) {
      throw new ProtocolError(Code.PROTOCOL_ERROR, `${kind} is invalid: ${error.message}`);
    }
    throw error;
  }
}

function requireKey(key: string, isValid: boolean): void {
  if (!isValid) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, `WELCOME: ${key} is missing, too small or of the wrong type`);
  }
}
