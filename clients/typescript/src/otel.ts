/**
 * Traces by OpenTelemetry: a span around each call, each stream and each handler of a client.
 *
 *     import { openTelemetry } from "@zcproto/client/otel";
 *     const client = await connect("host:7443", { user: "ada", key, tracing: openTelemetry() });
 *
 * It needs the package @opentelemetry/api. Spans follow the semantic conventions for RPC, version 1.45, as those of the server
 * and of the Python client do. Params, results, users, tokens and messages of unexpected errors are in no span.
 */

import {
  type Context,
  context,
  isSpanContextValid,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  SpanStatusCode,
  type TracerProvider,
  trace,
} from "@opentelemetry/api";
import type { OutgoingCall, ServerCall, Tracing } from "./client/types.js";
import { CallError, type CodeName } from "./errors.js";
import { VERSION } from "./version.js";

const SYSTEM = "zcproto";
const SCOPE = "@zcproto/client";
const SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0";
const TRACEPARENT = /^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})$/;
/** The flags of a `traceparent` that are passed on: sampled, random. */
const KNOWN_FLAGS = 0x03;
/** The codes that are errors of a handler's span; the others are the affair of its caller. */
const HANDLER_FAULTS: ReadonlySet<CodeName> = new Set([
  "UNKNOWN",
  "DEADLINE_EXCEEDED",
  "UNIMPLEMENTED",
  "INTERNAL",
  "UNAVAILABLE",
  "DATA_LOSS",
]);

export interface OpenTelemetryOptions {
  /** Makes the spans: by default the global one. */
  readonly tracerProvider?: TracerProvider | undefined;
}

/** Return what follows the traces of a client, for the option `tracing` of `connect`. */
export function openTelemetry(options: OpenTelemetryOptions = {}): Tracing {
  const tracer = () =>
    (options.tracerProvider ?? trace.getTracerProvider()).getTracer(SCOPE, VERSION, { schemaUrl: SCHEMA_URL });

  return {
    call(call: OutgoingCall, send) {
      const { method, traceparent, endpoint } = call;
      const parent = traceparent === undefined ? context.active() : contextOf(traceparent);
      const attributes = {
        "rpc.system.name": SYSTEM,
        "rpc.method": method,
        ...(endpoint === undefined ? {} : { "server.address": endpoint.host, "server.port": endpoint.port }),
      };
      const span = tracer().startSpan(method, { kind: SpanKind.CLIENT, attributes }, parent);
      return within(span, parent, () => send(traceparentOf(span) ?? traceparent), codeOfCall);
    },

    handle(call: ServerCall, run) {
      const { method, traceparent, signal } = call;
      const parent = contextOf(traceparent);
      const attributes = { "rpc.system.name": SYSTEM, "rpc.method": method };
      const span = tracer().startSpan(method, { kind: SpanKind.SERVER, attributes }, parent);
      return within(span, parent, run, (error) => codeOfHandler(error, signal), HANDLER_FAULTS);
    },
  };
}

/** Return the context with a caller's span; an empty one without a valid `traceparent`. */
function contextOf(traceparent: string | undefined): Context {
  const [, traceId, spanId, flags] = TRACEPARENT.exec(traceparent ?? "") ?? [];
  if (traceId === undefined || spanId === undefined || flags === undefined) {
    return ROOT_CONTEXT;
  }
  const traceFlags = Number.parseInt(flags, 16) & KNOWN_FLAGS;
  return trace.setSpanContext(ROOT_CONTEXT, { traceId, spanId, traceFlags, isRemote: true });
}

function traceparentOf(span: Span): string | undefined {
  const { traceId, spanId, traceFlags } = span.spanContext();
  return isSpanContextValid(span.spanContext())
    ? `00-${traceId}-${spanId}-${traceFlags.toString(16).padStart(2, "0")}`
    : undefined;
}

/** Run work within a span, and end it. `faults` are the codes that make it an error; without them all do. */
async function within<Result>(
  span: Span,
  parent: Context,
  work: () => Promise<Result>,
  codeOf: (error: unknown) => CodeName | undefined,
  faults?: ReadonlySet<CodeName>,
): Promise<Result> {
  try {
    const result = await context.with(trace.setSpan(parent, span), work);
    span.setAttribute("rpc.status_code", "OK");
    return result;
  } catch (error) {
    record(span, error, codeOf(error), faults);
    throw error;
  } finally {
    span.end();
  }
}

function record(span: Span, error: unknown, code: CodeName | undefined, faults?: ReadonlySet<CodeName>): void {
  if (code !== undefined) {
    span.setAttribute("rpc.status_code", code);
    if (faults?.has(code) === false) {
      return;
    }
  }
  const name = error instanceof Error ? error.name : typeof error;
  span.setAttribute("error.type", code ?? name);
  if (error instanceof CallError) {
    span.setStatus({ code: SpanStatusCode.ERROR, message: error.message });
  } else {
    span.setStatus({ code: SpanStatusCode.ERROR, message: name });
    span.addEvent("exception", { "exception.type": name });
  }
}

function codeOfCall(error: unknown): CodeName | undefined {
  return error instanceof CallError ? error.codeName : undefined;
}

function codeOfHandler(error: unknown, signal: AbortSignal): CodeName {
  if (signal.aborted) {
    return "CANCELLED";
  }
  return error instanceof CallError ? error.codeName : "INTERNAL";
}
