/** Runs `zcproto serve` of this repository as a process. */

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { appendFileSync, existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { type ConnectOptions, connect } from "../../src/connect.js";

/** The folder of package.json; this file runs in dist/test/support. */
export const PACKAGE = join(dirname(fileURLToPath(import.meta.url)), "../../..");
export const ROOT = join(PACKAGE, "../..");
const START_TIMEOUT_MS = 60_000;

/** The Python that has zcproto: ZCPROTO_PYTHON, that of the repository's environment, or the system's. */
export function python(): string {
  const local = join(ROOT, ".venv/bin/python");
  return process.env["ZCPROTO_PYTHON"] ?? (existsSync(local) ? local : "python3");
}

/** An environment with zcproto of this repository and a shared folder for its bytecode. */
function environment(): NodeJS.ProcessEnv {
  const { PYTHONDONTWRITEBYTECODE: _, ...inherited } = process.env;
  return { ...inherited, PYTHONPATH: ROOT, PYTHONPYCACHEPREFIX: join(PACKAGE, "dist/pycache") };
}

export class Server {
  readonly home = mkdtempSync(join(tmpdir(), "zcproto-client-"));
  readonly config = join(this.home, "config.toml");
  #process: ChildProcess | undefined;
  #log = "";
  #port = 0;

  constructor(config = "") {
    // RSA keys take seconds to generate.
    appendFileSync(this.config, `[certificates]\nkey_types = ["ecdsa-p256"]\n${config}`, { mode: 0o600 });
  }

  get caFile(): string {
    return join(this.home, "certs/ca.crt");
  }

  get address(): string {
    return `localhost:${this.#port}`;
  }

  get port(): number {
    return this.#port;
  }

  get log(): string {
    return this.#log;
  }

  /** Run a command and return its output. */
  run(...command: string[]): string {
    const env = environment();
    const stdio = ["ignore", "pipe", "ignore"] as const;
    return execFileSync(python(), ["-m", "zcproto", "--home", this.home, ...command], {
      env,
      encoding: "utf8",
      stdio: [...stdio],
    });
  }

  /** Add a user and return its key. */
  addUser(name: string): string {
    return this.run("user", "add", name).trim();
  }

  /** Start the server, on the same port as before. */
  async start(app?: string): Promise<this> {
    const command = ["-m", "zcproto", "--home", this.home, "serve", "--port", String(this.#port)];
    const child = spawn(python(), [...command, ...(app === undefined ? [] : [app])], {
      cwd: this.home,
      env: environment(),
      stdio: ["ignore", "pipe", "pipe"],
    });
    this.#process = child;
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#log += text;
    });
    const signal = AbortSignal.timeout(START_TIMEOUT_MS);
    const [line] = (await Promise.race([
      once(createInterface(child.stdout), "line", { signal }),
      once(child, "close").then(() => [`it exited: ${this.#log}`]),
    ])) as [string];
    const port = /^zcproto: listening on .*:(\d+)$/.exec(line)?.[1];
    if (port === undefined) {
      throw new Error(`the server did not start: ${line}\n${this.#log}`);
    }
    this.#port = Number(port);
    return this;
  }

  /** Stop the server by a signal and wait for its exit. */
  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    const child = this.#process;
    if (child !== undefined && child.exitCode === null && child.signalCode === null) {
      const ended = once(child, "exit");
      child.kill(signal);
      await ended;
    }
  }

  kill(signal: NodeJS.Signals): void {
    this.#process?.kill(signal);
  }

  /** Connect to the server with its CA and a separate home folder. */
  connect(options: ConnectOptions = {}) {
    const trusted = options.pins === undefined && options.verify === undefined ? { caFile: this.caFile } : {};
    return connect(this.address, { ...trusted, home: join(this.home, "client"), ...options });
  }

  async remove(): Promise<void> {
    await this.stop("SIGKILL");
    rmSync(this.home, { recursive: true, force: true });
  }
}
