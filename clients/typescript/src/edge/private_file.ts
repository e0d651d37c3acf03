/** Key files: refused if other users can access them, created with mode 0600. */

import { constants, type FileHandle, open, unlink } from "node:fs/promises";
import { geteuid } from "node:process";
import { escapeText } from "../client/text.js";
import { CertificateError } from "../errors.js";

const MAX_KEY_FILE = 65_536;
const OTHERS = 0o077;

/** Read a file that only this user can access. Checks the opened file, not the path. Rejects with CertificateError. */
export async function readPrivate(path: string): Promise<Buffer> {
  let file: FileHandle;
  try {
    // O_NONBLOCK: do not wait for the writer of a FIFO. Windows has neither.
    file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  } catch (error) {
    throw unusable(path, `cannot be read: ${codeOf(error)}; check the path`, error);
  }
  try {
    const status = await file.stat();
    if (!status.isFile()) {
      throw unusable(path, "is not a regular file; check the path");
    }
    const me = geteuid?.();
    if (me !== undefined && status.uid !== 0 && status.uid !== me) {
      throw unusable(path, `is owned by another user (uid ${status.uid}); change its owner to uid ${me}`);
    }
    if (me !== undefined && (status.mode & OTHERS) !== 0) {
      const mode = (status.mode & 0o7777).toString(8).padStart(4, "0");
      throw unusable(
        path,
        `is accessible by other users (mode ${mode}); run chmod 600 on it, or create a new key if another user may have` +
          " read it",
      );
    }
    if (status.size > MAX_KEY_FILE) {
      throw unusable(path, "is too large for a key; check the path");
    }
    return await file.readFile();
  } finally {
    await file.close();
  }
}

/** Write a new file of mode 0600 and flush it to disk. Rejects with CertificateError. */
export async function writePrivate(path: string, content: string): Promise<void> {
  let file: FileHandle;
  try {
    file = await open(path, "wx", 0o600);
  } catch (error) {
    const what =
      codeOf(error) === "EEXIST"
        ? "already exists; load it, or use another path"
        : `cannot be written: ${codeOf(error)}; check the path`;
    throw unusable(path, what, error);
  }
  try {
    await file.writeFile(content);
    await file.sync();
  } catch (error) {
    await unlink(path);
    throw unusable(path, `cannot be written: ${codeOf(error)}`, error);
  } finally {
    await file.close();
  }
}

export function unusable(path: string, what: string, cause?: unknown): CertificateError {
  return new CertificateError(`${escapeText(path)}: ${what}`, cause === undefined ? undefined : { cause });
}

function codeOf(error: unknown): string {
  return (error as NodeJS.ErrnoException).code ?? "an error";
}
