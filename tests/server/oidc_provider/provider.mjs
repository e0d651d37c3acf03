// An OpenID provider at a port of this machine: node provider.mjs CERTIFICATE KEY. It prints its issuer.
//
// Commands on standard input, each answered by a line:
//   rotate                    publish a new key before the old one, and sign with it
//   approve USERCODE ACCOUNT  let a device log in, as a person would in a browser
import { generateKeyPairSync } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:https";
import { createInterface } from "node:readline";
import Provider from "oidc-provider";

console.info = console.warn = () => {}; // its advice; standard output has the answers
const [certificate, key] = process.argv.slice(2);
const RESOURCES = { "https://zcproto.example": "zcproto", "https://other.example": "other" };
const DEVICE = "urn:ietf:params:oauth:grant-type:device_code";
const keys = [];
let provider;

function rotate(issuer) {
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  keys.unshift({ ...privateKey.export({ format: "jwk" }), kid: `key-${keys.length}`, alg: "ES256", use: "sig" });
  provider = new Provider(issuer, {
    jwks: { keys: keys.slice(0, 2) },
    clients: [
      {
        client_id: "robot",
        client_secret: "the-secret-of-the-robot-0123456789",
        grant_types: ["client_credentials"],
        redirect_uris: [],
        response_types: [],
        token_endpoint_auth_method: "client_secret_post",
      },
      {
        client_id: "cli",
        application_type: "native",
        grant_types: [DEVICE, "refresh_token"],
        redirect_uris: [],
        response_types: [],
        token_endpoint_auth_method: "none",
      },
    ],
    clientDefaults: { id_token_signed_response_alg: "ES256" },
    enabledJWA: { idTokenSigningAlgValues: ["ES256"] },
    scopes: ["openid", "offline_access"],
    findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
    extraTokenClaims: () => ({ roles: ["billing", "unknown"] }),
    issueRefreshToken: () => true,
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      deviceFlow: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => "https://zcproto.example",
        useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource) => ({
          scope: "call",
          audience: RESOURCES[resource],
          accessTokenTTL: 600,
          accessTokenFormat: "jwt",
          jwt: { sign: { alg: "ES256" } },
        }),
      },
    },
  });
  provider.on("server_error", (ctx, error) => console.error(error));
}

async function approve(userCode, accountId) {
  const code = await provider.DeviceCode.findByUserCode(userCode.replace(/\W/g, ""));
  const grant = new provider.Grant({ accountId, clientId: code.clientId });
  grant.addOIDCScope("openid offline_access");
  grant.addResourceScope("https://zcproto.example", "call");
  Object.assign(code, {
    accountId,
    grantId: await grant.save(),
    scope: "openid offline_access call",
    resource: "https://zcproto.example",
    authTime: Math.floor(Date.now() / 1000),
    claims: {},
    sessionUid: "session",
  });
  await code.save();
}

const server = createServer({ cert: readFileSync(certificate), key: readFileSync(key) }, (request, response) =>
  provider.callback()(request, response),
);
server.listen(0, "127.0.0.1", () => {
  const issuer = `https://localhost:${server.address().port}`;
  rotate(issuer);
  console.log(issuer);
  createInterface({ input: process.stdin }).on("line", async (line) => {
    const [command, ...rest] = line.split(" ");
    await (command === "rotate" ? rotate(issuer) : approve(...rest));
    console.log("done");
  });
});
