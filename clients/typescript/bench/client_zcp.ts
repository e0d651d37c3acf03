/** `node client_zcp.js ADDRESS CA_FILE USER KEY_FILE HOME CALLS`: print figures as JSON. */

import { readFileSync } from "node:fs";
import { connect } from "../src/index.js";
import { measure } from "./measure.js";

const [address = "", caFile, user, keyFile = "", home, calls] = process.argv.slice(2);
const key = readFileSync(keyFile, "utf8").trim();
const client = await connect(address, { user, key, caFile, home });
const figures = await measure(async (number) => {
  const response = await client.call<{ number: number }>("echo", { text: "hello, world", number });
  if (response.number !== number) {
    throw new Error("wrong response");
  }
}, Number(calls));
await client.close();
console.log(JSON.stringify(figures));
