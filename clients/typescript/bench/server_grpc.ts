/** `node server_grpc.js CERTIFICATE KEY`: serve the echo with grpc-js and print the port. */

import { readFileSync } from "node:fs";
import { Server, ServerCredentials, type ServerUnaryCall, type sendUnaryData } from "@grpc/grpc-js";
import { type Echo, METHOD } from "./grpc.js";

const [certificate = "", key = ""] = process.argv.slice(2);
const server = new Server();
server.addService(
  { Echo: METHOD },
  {
    Echo: (call: ServerUnaryCall<Echo, Echo>, respond: sendUnaryData<Echo>) => respond(null, call.request),
  },
);
const pair = { cert_chain: readFileSync(certificate), private_key: readFileSync(key) };
server.bindAsync("localhost:0", ServerCredentials.createSsl(null, [pair]), (error, port) => {
  if (error !== null) {
    throw error;
  }
  console.log(port);
});
