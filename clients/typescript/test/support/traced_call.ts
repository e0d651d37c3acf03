/**
 * One traced call, for tests of whole traces: `node traced_call.js ADDRESS USER KEY CA METHOD`. Prints the ids of its span.
 *
 * The test runner runs it without arguments, too.
 */

import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from "@opentelemetry/sdk-trace-base";
import { connect } from "../../src/index.js";
import { openTelemetry } from "../../src/otel.js";

const [address, user, key, caFile, method = ""] = process.argv.slice(2);
if (address !== undefined) {
  const exporter = new InMemorySpanExporter();
  const tracerProvider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] });
  const client = await connect(address, { user, key, caFile, tracing: openTelemetry({ tracerProvider }) });
  const result = await client.call(method);
  await client.close();
  const [span] = exporter.getFinishedSpans();
  console.log(JSON.stringify({ result, ...span?.spanContext() }));
}
