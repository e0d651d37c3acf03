/** Logins by a scheme of the application, with a real `zcproto serve` that accepts each ticket once. */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { type Client, type ConnectOptions, LoginError, TokenRevoked, Unauthenticated } from "../src/index.js";
import { Server } from "./support/server.js";

const APP = `
from zcproto import App, CallableAuthenticator, Context

used = set()


async def redeem(user: str, ticket: int) -> str | None:
    if (user, ticket) in used:
        return None
    used.add((user, ticket))
    return user


app = App(authenticators=[CallableAuthenticator("ticket", redeem)])


@app.method("who")
def who(context: Context) -> str:
    return context.user


@app.method("used", public=True)
def number_of_used() -> int:
    return len(used)
`;

let server: Server;
let issued = 0;
const clients: Client[] = [];

before(async () => {
  server = new Server("[sessions]\nper_user = 100\n");
  writeFileSync(join(server.home, "tickets.py"), APP);
  await server.start("tickets:app");
});

after(async () => {
  await Promise.all(clients.map((client) => client.close()));
  await server.remove();
});

function ticketOf(user: string) {
  issued += 1;
  return { scheme: "ticket", user, ticket: issued };
}

async function connected(options: ConnectOptions): Promise<Client> {
  const client = await server.connect(options);
  clients.push(client);
  return client;
}

test("session is opened, kept over a reconnect, and opened again after a revocation", async () => {
  const client = await connected({ login: () => Promise.resolve(ticketOf("ada")) });
  assert.equal(await client.call("who"), "ada");
  const first = client.session?.id;
  client.cut();
  assert.equal(await client.call("who", {}, { idempotencyKey: "after the cut" }), "ada");
  assert.equal(client.session?.id, first);
  await client.call("session.revoke", { all: true });
  await assert.rejects(client.call("who"), TokenRevoked);
  await client.openSession();
  assert.equal(await client.call("who"), "ada");
  assert.notEqual(client.session?.id, first);
  assert.equal(await client.call("used"), 2);
});

test("two users of one connection have a login each", async () => {
  const gateway = await connected({});
  await using ada = await gateway.sessionFor({ login: () => ticketOf("ada") });
  await using bob = await gateway.sessionFor({ login: ticketOf("bob") });
  assert.deepEqual(await Promise.all([ada.call("who"), bob.call("who")]), ["ada", "bob"]);
});

test("used ticket is refused, and an error of the function reaches the application", async () => {
  const login = ticketOf("eve");
  await connected({ login });
  await assert.rejects(connected({ login }), Unauthenticated);
  const down = new Error("the identity provider is down");
  await assert.rejects(connected({ login: () => Promise.reject(down) }), (error) => {
    assert.ok(error instanceof LoginError);
    assert.equal(error.cause, down);
    return true;
  });
});
