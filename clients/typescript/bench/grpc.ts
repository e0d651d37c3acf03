/** The same echo with grpc-js: msgpack bodies, so that both pay the same for them, and a deadline, as ours has one. */

import { decode, encode } from "@msgpack/msgpack";

export interface Echo {
  readonly text: string;
  readonly number: number;
}

const write = (value: Echo) => Buffer.from(encode(value));
const read = (bytes: Buffer) => decode(bytes) as Echo;

export const METHOD = {
  path: "/bench.Echo/Echo",
  requestStream: false,
  responseStream: false,
  requestSerialize: write,
  requestDeserialize: read,
  responseSerialize: write,
  responseDeserialize: read,
} as const;
