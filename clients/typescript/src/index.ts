/** Client of zcproto. */

export type { CallOptions, Client } from "./client/client.js";
export { EventStream, type ServerEvent } from "./client/event_stream.js";
export type { ClientSession } from "./client/session.js";
export { type ConnectOptions, connect, enroll, type TrustedServerOptions } from "./connect.js";
export type { StsPolicy, Welcome } from "./connection/welcome.js";
export { Device } from "./edge/device.js";
export * from "./errors.js";
export { VERSION } from "./version.js";
export type { Params } from "./wire/message.js";
