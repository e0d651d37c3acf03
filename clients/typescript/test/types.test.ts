/** What compiles: the build fails if a type is too narrow or too wide. */

import { test } from "node:test";
import type { Client, LoginParams, Params, StreamOptions } from "../src/index.js";

interface Order {
  readonly id: number;
  readonly note?: string;
}

interface PasswordLogin {
  readonly scheme: "password";
  readonly user: string;
}

test("types of params, results and logins", () => {
  const client = undefined as unknown as Client | undefined;
  const order: Order = { id: 7 };
  const record: Record<string, unknown> = { id: 7 };
  const login: PasswordLogin = { scheme: "password", user: "ada" };
  const jobs: StreamOptions<Order> = { reopen: (last) => last };
  const accepted: (Params | null)[] = [order, record, { id: 7, more: [1] }, {}, null];
  const logins: LoginParams[] = [login, { scheme: "password", user: "ada" }];

  void client?.call<Order>("order.place", order).then(({ id }) => id.toFixed());
  void client?.call("order.place", { id: 7, more: { deep: true } });
  void client?.stream<Order, number>("jobs", order, jobs).result.then((count) => count.toFixed());
  void client?.sessionFor({ login });

  // @ts-expect-error a list is not a map
  accepted.push([1, 2]);
  // @ts-expect-error bytes are no map
  accepted.push(new Uint8Array(1));
  // @ts-expect-error params are an object
  accepted.push("text");
  // @ts-expect-error a login names its scheme
  logins.push({ user: "ada" });
});
