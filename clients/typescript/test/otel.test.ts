/** Spans of the client with OpenTelemetry's SDK, and a real `zcproto serve`. */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, afterEach, before, test } from "node:test";
import { context, SpanKind, SpanStatusCode, trace } from "@opentelemetry/api";
import { AsyncLocalStorageContextManager } from "@opentelemetry/context-async-hooks";
import {
  BasicTracerProvider,
  InMemorySpanExporter,
  type ReadableSpan,
  SimpleSpanProcessor,
} from "@opentelemetry/sdk-trace-base";
import { type Client, ConnectionClosed, NotFound } from "../src/index.js";
import { openTelemetry } from "../src/otel.js";
import { Server } from "./support/server.js";

const APP = `
from zcproto import App, Context, NotFound

app = App()


@app.method
def parent(context: Context) -> str | None:
    return context.traceparent


@app.method
def fail() -> None:
    raise NotFound("no such thing")


@app.method
async def parents(context: Context, n: int):
    for _ in range(n):
        yield context.traceparent


@app.method
async def ask(context: Context) -> str:
    return await context.client.call("approve", traceparent=context.traceparent)
`;
const TRACE_ID = "0af7651916cd43dd8448eb211c80319c";
const PARENT = `00-${TRACE_ID}-b7ad6b7169203331-01`;

const exporter = new InMemorySpanExporter();
const tracerProvider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] });
const tracing = openTelemetry({ tracerProvider });
let server: Server;
let client: Client;

before(async () => {
  context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable());
  server = new Server();
  writeFileSync(join(server.home, "traced.py"), APP);
  const key = server.addUser("ada");
  await server.start("traced:app");
  client = await server.connect({ user: "ada", key, tracing });
});

after(async () => {
  await client.close();
  await server.remove();
  context.disable();
});

afterEach(() => exporter.reset());

/** Return the only span that has ended. */
function onlySpan(): ReadableSpan {
  const [span, ...more] = exporter.getFinishedSpans();
  assert.ok(span !== undefined && more.length === 0, "there is one span");
  return span;
}

function headerOf(span: ReadableSpan): string {
  const { traceId, spanId } = span.spanContext();
  return `00-${traceId}-${spanId}-01`;
}

test("call is a span, which the server gets as parent", async () => {
  const parent = await client.call("parent");
  const span = onlySpan();
  assert.equal(parent, headerOf(span));
  assert.equal(span.kind, SpanKind.CLIENT);
  assert.equal(span.name, "parent");
  assert.deepEqual(span.attributes, {
    "rpc.system.name": "zcproto",
    "rpc.method": "parent",
    "rpc.status_code": "OK",
    "server.address": "localhost",
    "server.port": server.port,
  });
  assert.equal(span.status.code, SpanStatusCode.UNSET);
});

test("current span is the parent, and a given traceparent before it", async () => {
  const tracer = tracerProvider.getTracer("test");
  const outer = tracer.startSpan("outer");
  await context.with(trace.setSpan(context.active(), outer), async () => {
    await client.call("parent");
    await client.call("parent", {}, { traceparent: PARENT });
  });
  const [first, second] = exporter.getFinishedSpans();
  assert.equal(first?.parentSpanContext?.spanId, outer.spanContext().spanId);
  assert.equal(second?.spanContext().traceId, TRACE_ID);
  assert.equal(second?.parentSpanContext?.spanId, PARENT.slice(36, 52));
});

test("malformed traceparent begins a trace", async () => {
  await client.call("parent", {}, { traceparent: `ff${PARENT.slice(2)}` });
  assert.equal(onlySpan().parentSpanContext, undefined);
});

test("error of the server is the span's, with its code", async () => {
  await assert.rejects(client.call("fail"), NotFound);
  const span = onlySpan();
  assert.equal(span.attributes["rpc.status_code"], "NOT_FOUND");
  assert.equal(span.attributes["error.type"], "NOT_FOUND");
  assert.deepEqual(span.status, { code: SpanStatusCode.ERROR, message: "no such thing" });
  assert.deepEqual(span.events, []);
});

test("call without an answer has the name of its error, and nothing that it says", async () => {
  const failed = tracing.call({ method: "lost", traceparent: undefined, endpoint: undefined, isStream: false }, () =>
    Promise.reject(new ConnectionClosed("key=secret")),
  );
  await assert.rejects(failed, ConnectionClosed);
  const span = onlySpan();
  assert.equal(span.attributes["error.type"], "ConnectionClosed");
  assert.equal(span.attributes["rpc.status_code"], undefined);
  assert.equal(span.attributes["server.address"], undefined);
  assert.doesNotMatch(JSON.stringify([span.status, span.events, span.attributes]), /secret/);
});

test("stream is one span to its end", async () => {
  const parents: unknown[] = [];
  for await (const parent of client.stream("parents", { n: 3 })) {
    parents.push(parent);
  }
  const header = headerOf(onlySpan());
  assert.deepEqual(parents, [header, header, header]);
});

test("handler is a span, a child of the server's", async () => {
  await client.handle("approve", (_, { traceparent }) => traceparent);
  const parent = await client.call("ask");
  const spans = exporter.getFinishedSpans();
  const handler = spans.find(({ kind }) => kind === SpanKind.SERVER);
  const call = spans.find(({ kind, name }) => kind === SpanKind.CLIENT && name === "ask");
  assert.ok(handler !== undefined && call !== undefined);
  assert.equal(handler.name, "approve");
  assert.equal(handler.parentSpanContext?.spanId, call.spanContext().spanId);
  assert.equal(parent, headerOf(call));
});

test("failed handler is an error of the client, a refused call is not", async () => {
  const { signal } = new AbortController();
  const call = { method: "approve", user: "ada", deadlineMs: 1_000, traceparent: PARENT, signal };
  await assert.rejects(
    tracing.handle(call, () => Promise.reject(new NotFound("no"))),
    NotFound,
  );
  await assert.rejects(
    tracing.handle(call, () => Promise.reject(new TypeError("password=x"))),
    TypeError,
  );
  const aborted = { ...call, signal: AbortSignal.abort() };
  await assert.rejects(tracing.handle(aborted, () => Promise.reject(new Error("gone"))));
  const [refused, failed, withdrawn] = exporter.getFinishedSpans();
  assert.equal(refused?.status.code, SpanStatusCode.UNSET);
  assert.equal(refused?.attributes["rpc.status_code"], "NOT_FOUND");
  assert.deepEqual(failed?.status, { code: SpanStatusCode.ERROR, message: "TypeError" });
  assert.equal(failed?.attributes["error.type"], "INTERNAL");
  assert.deepEqual(
    failed?.events.map(({ name, attributes }) => [name, attributes]),
    [["exception", { "exception.type": "TypeError" }]],
  );
  assert.equal(withdrawn?.attributes["rpc.status_code"], "CANCELLED");
  assert.equal(withdrawn?.status.code, SpanStatusCode.UNSET);
});

test("without an SDK a given traceparent is passed on", async () => {
  const sent: (string | undefined)[] = [];
  const call = { method: "parent", traceparent: PARENT, endpoint: undefined, isStream: false };
  const record = (traceparent: string | undefined) => Promise.resolve(sent.push(traceparent));
  await openTelemetry().call(call, record);
  await openTelemetry().call({ ...call, traceparent: undefined }, record);
  assert.deepEqual(sent, [PARENT, undefined]);
});
