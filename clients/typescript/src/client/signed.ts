/**
 * What a device signs (the contract's section 6).
 *
 * `salt` is the connection's, `leaf` the SHA-256 of the server's certificate (DER) as it was shown there: so a signature
 * is worth nothing on another connection, or relayed through another server.
 */

import { type Token, tokenBytes } from "../wire/frame.js";

/** A connection, as what ties a proof to it. */
export interface Channel {
  readonly salt: bigint;
  readonly leaf: Buffer;
}

/** To open a session. */
export function openMessage({ salt, leaf }: Channel, device: string): Buffer {
  return Buffer.concat([Buffer.from("zcp/1 open\0"), saltBytes(salt), leaf, Buffer.from(device)]);
}

/** To use a bound token on a further connection. */
export function attachMessage({ salt, leaf }: Channel, token: Token): Buffer {
  return Buffer.concat([Buffer.from("zcp/1 attach\0"), saltBytes(salt), leaf, tokenBytes(token)]);
}

function saltBytes(salt: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(salt);
  return bytes;
}
