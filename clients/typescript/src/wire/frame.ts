/**
 * One frame: its layout and the checks of its header (zcp1.md, sections 5, 6.1 and 18.2).
 *
 * 64-bit fields are bigint, since a number is not exact above 2^53. A token is a string of 32 characters from 0 to 255, one for
 * each byte, which can be compared and used as a key. It is never displayed.
 */

import { Code, ProtocolError } from "../errors.js";

export const VERSION = 1;
export const LENGTH_SIZE = 4;
export const HEADER_SIZE = 68;
export const MIN_LENGTH = HEADER_SIZE - LENGTH_SIZE;
export const TOKEN_SIZE = 32;
export const SALT_SIZE = 8;
export const MAX_STREAM = 0xffff_ffff;
export const MAX_LENGTH = 0xffff_ffff;
export const NO_TOKEN: Token = "\0".repeat(TOKEN_SIZE);

/** 32 bytes as a latin1 string. */
export type Token = string;

export const Kind = {
  WELCOME: 0x01,
  REQUEST: 0x02,
  RESPONSE: 0x03,
  ERROR: 0x04,
  CANCEL: 0x05,
  PING: 0x06,
  PONG: 0x07,
  GOAWAY: 0x08,
  EVENT: 0x09,
  OPEN: 0x10,
  ITEM: 0x11,
  END: 0x12,
  CREDIT: 0x13,
  ACCEPTED: 0x14,
  CALL: 0x18,
  RESULT: 0x19,
  FAILURE: 0x1a,
  WITHDRAW: 0x1b,
} as const;

export type Kind = (typeof Kind)[keyof typeof Kind];

/** The receiver of a frame. */
export type Side = "client" | "server";

/** What a server announces in WELCOME: some kinds exist only with it. */
export type Extension = "streams" | "durable" | "calls";

interface KindRule {
  readonly sentTo: readonly Side[];
  readonly onStream: boolean | undefined; // undefined: stream 0 or the stream of a request
  readonly partOf?: Extension;
}

const RULES: Readonly<Record<Kind, KindRule>> = {
  [Kind.WELCOME]: { sentTo: ["client"], onStream: false },
  [Kind.REQUEST]: { sentTo: ["server"], onStream: true },
  [Kind.RESPONSE]: { sentTo: ["client"], onStream: true },
  [Kind.ERROR]: { sentTo: ["client"], onStream: undefined },
  [Kind.CANCEL]: { sentTo: ["server"], onStream: true },
  [Kind.PING]: { sentTo: ["client", "server"], onStream: false },
  [Kind.PONG]: { sentTo: ["client", "server"], onStream: false },
  [Kind.GOAWAY]: { sentTo: ["client"], onStream: false },
  [Kind.EVENT]: { sentTo: ["client"], onStream: false },
  [Kind.OPEN]: { sentTo: ["server"], onStream: true, partOf: "streams" },
  [Kind.ITEM]: { sentTo: ["client", "server"], onStream: true, partOf: "streams" },
  [Kind.END]: { sentTo: ["server"], onStream: true, partOf: "streams" },
  [Kind.CREDIT]: { sentTo: ["client", "server"], onStream: true, partOf: "streams" },
  [Kind.ACCEPTED]: { sentTo: ["client"], onStream: true, partOf: "durable" },
  [Kind.CALL]: { sentTo: ["client"], onStream: true, partOf: "calls" },
  [Kind.RESULT]: { sentTo: ["server"], onStream: true, partOf: "calls" },
  [Kind.FAILURE]: { sentTo: ["server"], onStream: true, partOf: "calls" },
  [Kind.WITHDRAW]: { sentTo: ["client"], onStream: true, partOf: "calls" },
};

/** A frame with a valid header. `body` is a view of the read buffer: copy data to keep it. */
export interface Frame {
  readonly length: number;
  readonly kind: Kind;
  readonly stream: number;
  readonly timestamp: bigint;
  readonly salt: bigint;
  readonly counter: bigint;
  readonly token: Token;
  readonly body: Buffer;
}

/** What a receiver accepts: kinds by number, and the largest `length` of an ITEM. */
export interface Accepted {
  readonly kinds: ReadonlySet<number>;
  readonly maxItem: number;
}

/** Return what a side accepts with some extensions. */
export function acceptedBy(receiver: Side, extensions: Iterable<Extension> = [], maxItem = MAX_LENGTH): Accepted {
  const announced = new Set(extensions);
  const kinds = Object.values(Kind).filter((kind) => {
    const { sentTo, partOf } = RULES[kind];
    return sentTo.includes(receiver) && (partOf === undefined || announced.has(partOf));
  });
  return { kinds: new Set(kinds), maxItem };
}

/** Check a length. Throws ProtocolError. */
export function checkLength(length: number, limit: number): void {
  if (length < MIN_LENGTH) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "length is below 64");
  }
  if (length > limit) {
    throw new ProtocolError(Code.FRAME_TOO_LARGE, "frame is larger than allowed here");
  }
}

/**
 * Check a received header at offset `at` and return its kind. Throws ProtocolError in the order of zcp1.md, section 5.4:
 * version, kind, flags, stream, and then the length of an ITEM. The length of a frame was checked before.
 */
export function checkHead(data: Buffer, at: number, { kinds, maxItem }: Accepted): Kind {
  if (data[at + 4] !== VERSION) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "version is not 1");
  }
  const kind = data[at + 5] as Kind;
  if (!kinds.has(kind)) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame is not allowed here");
  }
  if (data[at + 6] !== 0 || data[at + 7] !== 0) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "flags are set");
  }
  const { onStream } = RULES[kind];
  if (onStream !== undefined && onStream !== (data.readUInt32BE(at + 8) !== 0)) {
    throw new ProtocolError(Code.PROTOCOL_ERROR, "stream does not match the kind");
  }
  if (kind === Kind.ITEM && data.readUInt32BE(at) > maxItem) {
    throw new ProtocolError(Code.FRAME_TOO_LARGE, "item is larger than allowed here");
  }
  return kind;
}

/** Encode a frame. */
export function encodeFrame(
  kind: Kind,
  stream: number,
  timestamp: bigint,
  salt: bigint,
  counter: bigint,
  token: Token,
  body: Uint8Array,
): Buffer {
  const frame = Buffer.allocUnsafe(HEADER_SIZE + body.length);
  frame.writeUInt32BE(MIN_LENGTH + body.length, 0);
  frame.writeUInt32BE((VERSION << 24) | (kind << 16), 4);
  frame.writeUInt32BE(stream, 8);
  frame.writeBigUInt64BE(timestamp, 12);
  frame.writeBigUInt64BE(salt, 20);
  frame.writeBigUInt64BE(counter, 28);
  frame.write(token, 36, TOKEN_SIZE, "latin1");
  frame.set(body, HEADER_SIZE);
  return frame;
}

/** Convert 32 bytes to a token. */
export function tokenOf(bytes: Uint8Array): Token {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1");
}

/** Convert a token to its 32 bytes. */
export function tokenBytes(token: Token): Buffer {
  return Buffer.from(token, "latin1");
}

const TOKEN_TEXT = /^[A-Za-z0-9_-]{43}$/;

/** Encode a token as text: base64url without padding, 43 characters. */
export function tokenToText(token: Token): string {
  return tokenBytes(token).toString("base64url");
}

/** Decode a token from its canonical text. Return undefined for any other text. */
export function tokenFromText(text: string): Token | undefined {
  if (!TOKEN_TEXT.test(text)) {
    return undefined;
  }
  const bytes = Buffer.from(text, "base64url");
  return bytes.toString("base64url") === text ? bytes.toString("latin1") : undefined;
}
