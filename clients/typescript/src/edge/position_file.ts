/** Positions of durable streams by their ids, in a file of mode 0600 that is replaced as a whole. */

import { open, readFile, rename } from "node:fs/promises";
import type { Positions } from "../client/stream.js";

const VERSION = 1;
/** The positions of older streams are dropped: a server keeps runs for an hour. */
const MAX_POSITIONS = 1_000;

export class PositionFile implements Positions {
  readonly #path: string;
  readonly #positions: Map<string, number>;
  #isChanged = false;
  #writing: Promise<void> = Promise.resolve();

  private constructor(path: string, positions: Map<string, number>) {
    this.#path = path;
    this.#positions = positions;
  }

  /** Read a file. One that is missing or damaged counts as empty. */
  static async load(path: string): Promise<PositionFile> {
    return new PositionFile(path, new Map(await readPositions(path)));
  }

  position(id: string): number {
    return this.#positions.get(id) ?? 0;
  }

  async keep(id: string, position: number): Promise<boolean> {
    if (this.position(id) !== position) {
      this.#positions.delete(id);
      this.#positions.set(id, position); // the newest is the last one
      for (const oldest of [...this.#positions.keys()].slice(0, -MAX_POSITIONS)) {
        this.#positions.delete(oldest);
      }
      this.#isChanged = true;
    }
    this.#writing = this.#writing.then(() => this.#write()); // one write for all streams that wait
    await this.#writing;
    return !this.#isChanged;
  }

  async #write(): Promise<void> {
    if (!this.#isChanged) {
      return;
    }
    this.#isChanged = false;
    const content = JSON.stringify({ version: VERSION, streams: Object.fromEntries(this.#positions) });
    try {
      const staged = `${this.#path}.new`;
      const file = await open(staged, "w", 0o600);
      try {
        await file.writeFile(content);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(staged, this.#path);
    } catch {
      this.#isChanged = true; // the caller tries again
    }
  }
}

async function readPositions(path: string): Promise<[string, number][]> {
  try {
    const { streams } = JSON.parse(await readFile(path, "utf8")) as { streams: Record<string, unknown> };
    return Object.entries(streams).filter((entry): entry is [string, number] => {
      return Number.isSafeInteger(entry[1]) && (entry[1] as number) >= 0;
    });
  } catch {
    return [];
  }
}
