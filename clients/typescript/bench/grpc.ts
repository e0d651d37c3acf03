/** The echo method for grpc-js, with msgpack bodies and a deadline for a fair comparison. */

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
