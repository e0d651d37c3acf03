/** WELCOME as a client reads it: every key of the contract must be there, and may be believed afterwards. */

import { Code, ProtocolError } from "../errors.js";
import { MessageError } from "../wire/body.js";
import { MIN_LENGTH, VERSION } from "../wire/frame.js";
import { decodeMap, isInt, isMap } from "../wire/message.js";

/** The policy of RFC 6797 for native clients. `max_age` is in seconds. */
export interface StsPolicy {
  readonly max_age: number;
  readonly include_subdomains: boolean;
}

/** What the server says of itself; there may be more keys than these. */
export interface Welcome {
  readonly server: string;
  readonly versions: readonly number[];
  readonly max_frame: number;
  readonly max_streams: number;
  readonly idle_timeout_ms: number;
  readonly tolerance_ms: number;
  readonly sts: StsPolicy;
  readonly [more: string]: unknown;
}

const LEAST = { max_frame: MIN_LENGTH, max_streams: 1, idle_timeout_ms: 0, tolerance_ms: 0 };

/** Throws ProtocolError if the body is not as the contract says. */
export function readWelcome(body: Buffer, maxDepth: number): Welcome {
  const said = readMap("WELCOME", body, maxDepth);
  demand("server", typeof said["server"] === "string");
  demand("versions", Array.isArray(said["versions"]));
  for (const [key, least] of Object.entries(LEAST)) {
    const value = said[key];
    demand(key, isInt(value) && value >= least);
  }
  const { sts } = said;
  demand("sts", isMap(sts));
  const { max_age: maxAge, include_subdomains: subdomains } = sts as Record<string, unknown>;
  demand("sts.max_age", isInt(maxAge) && maxAge >= 0);
  demand("sts.include_subdomains", typeof subdomains === "boolean");
  if (!(said["versions"] as unknown[]).includes(VERSION)) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "WELCOME: the server does not speak version 1");
  }
  const welcome = decodeMap(body, maxDepth) as unknown as Welcome;
  // A limit beyond what a number holds exactly is none.
  const limits = Object.keys(LEAST).map((key) => [key, Number(welcome[key])]);
  return { ...welcome, ...Object.fromEntries(limits), sts: { ...welcome.sts, max_age: Number(maxAge) } };
}

/** The map of a GOAWAY: its reason, and when to come back. Throws ProtocolError. */
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
      throw new ProtocolError(Code.PROTOCOL_ERROR, `${kind} cannot be read: ${error.message}`);
    }
    throw error;
  }
}

function demand(key: string, isRight: boolean): void {
  if (!isRight) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, `WELCOME: ${key} is missing, too small or of the wrong type`);
  }
}
