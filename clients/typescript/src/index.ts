/** Client of zcproto. */

export type { Address, Endpoint } from "./client/address.js";
export type { Client } from "./client/client.js";
export { EventStream, type ServerEvent } from "./client/event_stream.js";
export type { ClientSession, LoginParams, LoginSource } from "./client/session.js";
export type { ResumeOptions, Stream, StreamOptions } from "./client/stream.js";
export type { Handler, OutgoingCall, ServerCall, SessionOptions, Tracing } from "./client/types.js";
export type { CallOptions, DurableStream, UserClient } from "./client/user_client.js";
export { type ConnectOptions, connect, enroll, type TrustedServerOptions } from "./connect.js";
export type { CallLimits, StreamLimits, StsPolicy, Welcome } from "./connection/welcome.js";
export { Device } from "./edge/device.js";
export * from "./errors.js";
export { VERSION } from "./version.js";
export type { Credit, Params } from "./wire/message.js";
