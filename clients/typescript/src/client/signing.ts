/**
 * The messages that a device signs (zcp1.md, sections 9.4 and 9.5).
 *
 * They include the connection's salt and the SHA-256 of the server's certificate (DER), so a signature is useless on
 * another connection or when relayed through another server.
 */

import { type Token, tokenBytes } from "../wire/frame.js";

/** The properties of a connection that a signature is bound to. */
export interface Channel {
  readonly salt: bigint;
  readonly leaf: Buffer;
}

/** Return the message for `session.open`. */
export function openMessage({ salt, leaf }: Channel, device: string): Buffer {
  return Buffer.concat([Buffer.from("zcp/1 open\0"), saltBytes(salt), leaf, Buffer.from(device)]);
}

/** Return the message for `session.attach`. */
export function attachMessage({ salt, leaf }: Channel, token: Token): Buffer {
  return Buffer.concat([Buffer.from("zcp/1 attach\0"), saltBytes(salt), leaf, tokenBytes(token)]);
}

function saltBytes(salt: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(salt);
  return bytes;
}
