// Connects with Node's tls and prints the first bytes of the server's first frame.
//
//     node welcome.mjs PORT NAME [CA_FILE]
//
// Without a CA file it trusts Node's bundled authorities. Exit code 3: the handshake failed.

import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import { checkServerIdentity, connect } from "node:tls";

const HEADER_BYTES = 8;
const TIMEOUT_MS = 900_000;
const REFUSED = 3;

const [port, name, caFile] = process.argv.slice(2);
let handshaking = false;
let received = Buffer.alloc(0);

function fail(error) {
  console.error(`${error.code ?? ""} ${error.message}`);
  process.exit(handshaking ? REFUSED : 1);
}

const connection = connect({
  host: "127.0.0.1",
  port: Number(port),
  servername: isIP(name) ? "" : name, // an address is never sent as a server name (RFC 6066 section 3)
  checkServerIdentity: (_, certificate) => checkServerIdentity(name, certificate),
  ca: caFile === undefined ? undefined : readFileSync(caFile),
  minVersion: "TLSv1.3",
  ALPNProtocols: ["zcp/1"],
});
connection.setTimeout(TIMEOUT_MS, () => {
  handshaking = false; // a timeout is not a refusal
  fail(new Error("no answer in time"));
});
connection.on("error", fail);
connection.on("connect", () => {
  handshaking = true;
});
connection.on("secureConnect", () => {
  handshaking = false;
  if (connection.alpnProtocol !== "zcp/1") fail(new Error(`agreed on ${connection.alpnProtocol}`));
});
connection.on("end", () => fail(new Error("closed before the header was received")));
connection.on("data", (data) => {
  received = Buffer.concat([received, data]);
  if (received.length < HEADER_BYTES) return;
  process.stdout.write(received.subarray(0, HEADER_BYTES));
  connection.removeAllListeners("end");
  connection.end();
});
