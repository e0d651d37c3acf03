/** `node client_grpc.js ADDRESS CA_FILE CALLS`: print figures as JSON. */

import { readFileSync } from "node:fs";
import { Client, credentials } from "@grpc/grpc-js";
import { type Echo, METHOD } from "./grpc.js";
import { measure } from "./measure.js";

const [address = "", caFile = "", calls] = process.argv.slice(2);
const client = new Client(address, credentials.createSsl(readFileSync(caFile)));
const { path, requestSerialize, responseDeserialize } = METHOD;

function echo(value: Echo): Promise<Echo> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + 30_000 };
    client.makeUnaryRequest(path, requestSerialize, responseDeserialize, value, options, (error, response) => {
      if (error !== null || response === undefined) {
        reject(error ?? new Error("no response"));
      } else {
        resolve(response);
      }
    });
  });
}

const figures = await measure(async (number) => {
  const response = await echo({ text: "hello, world", number });
  if (response.number !== number) {
    throw new Error("wrong response");
  }
}, Number(calls));
client.close();
console.log(JSON.stringify(figures));
