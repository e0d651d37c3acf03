/**
 * `npm run bench`: compare this client with grpc-js, each with its own server, by the same echo over TLS 1.3 and one
 * connection. The clients run alternately in separate processes; figures are medians of all rounds.
 *
 * Exit code 1 if a call takes more than half of the CPU of grpc-js. `--json FILE` writes the figures.
 */

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { parseArgs, promisify } from "node:util";
import { Server } from "../test/support/server.js";
import { DEPTHS, type Figure } from "./measure.js";

const MAX_CPU_RATIO = 0.5;
const HERE = dirname(fileURLToPath(import.meta.url));
const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "5" },
    calls: { type: "string", default: "10000" },
    json: { type: "string" },
  },
});

async function figures(program: string, ...options: string[]): Promise<Figure[]> {
  const { stdout } = await promisify(execFile)(process.execPath, [join(HERE, program), ...options]);
  return JSON.parse(stdout) as Figure[];
}

function median(numbers: number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}

function medianFigure(rounds: Figure[][], depth: number): Figure {
  const all = rounds.flat().filter((figure) => figure.depth === depth);
  return {
    depth,
    callsPerSecond: median(all.map((figure) => figure.callsPerSecond)),
    cpuMicroseconds: median(all.map((figure) => figure.cpuMicroseconds)),
  };
}

const server = new Server();
const keyFile = join(server.home, "bench.key");
writeFileSync(keyFile, server.addUser("bench"), { mode: 0o600 });
await server.start();
const certificate = ["crt", "key"].map((ending) => join(server.home, `certs/server-ecdsa.${ending}`));
const grpcServer = spawn(process.execPath, [join(HERE, "server_grpc.js"), ...certificate], {
  stdio: ["ignore", "pipe", "inherit"],
});
try {
  const [port] = (await once(createInterface(grpcServer.stdout), "line")) as [string];
  const zcproto: Figure[][] = [];
  const grpc: Figure[][] = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const clientHome = join(server.home, "client");
    const { calls } = values;
    zcproto.push(await figures("client_zcp.js", server.address, server.caFile, "bench", keyFile, clientHome, calls));
    grpc.push(await figures("client_grpc.js", `localhost:${port}`, server.caFile, calls));
  }
  const compared = DEPTHS.map((depth) => {
    const figures = { zcproto: medianFigure(zcproto, depth), grpc: medianFigure(grpc, depth) };
    return { depth, ...figures, cpuRatio: figures.zcproto.cpuMicroseconds / figures.grpc.cpuMicroseconds };
  });
  console.log(`Node ${process.version}, ${cpus()[0]?.model ?? "unknown CPU"} x ${cpus().length}`);
  console.log("depth  calls/s: zcproto  grpc-js   CPU us/call: zcproto  grpc-js  ratio");
  for (const row of compared) {
    const columns = [row.zcproto.callsPerSecond, row.grpc.callsPerSecond].map((value) => value.toFixed(0).padStart(8));
    const cpu = [row.zcproto.cpuMicroseconds, row.grpc.cpuMicroseconds].map((value) => value.toFixed(1).padStart(8));
    console.log(
      `${String(row.depth).padStart(5)}  ${" ".repeat(9)}${columns.join(" ")}${" ".repeat(14)}${cpu.join(" ")}  ${row.cpuRatio.toFixed(2)}`,
    );
  }
  if (values.json !== undefined) {
    writeFileSync(values.json, `${JSON.stringify({ node: process.version, compared, zcproto, grpc }, null, 1)}\n`);
  }
  process.exitCode = compared.every(({ cpuRatio }) => cpuRatio <= MAX_CPU_RATIO) ? 0 : 1;
} finally {
  grpcServer.kill();
  await server.remove();
}
