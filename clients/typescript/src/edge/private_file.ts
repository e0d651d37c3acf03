/** Files with keys: read only if they are their owner's alone, written for their owner alone. */

import { constants, type FileHandle, open, unlink } from "node:fs/promises";
import { geteuid } from "node:process";
import { printable } from "../client/printable.js";
import { CertificateError } from "../errors.js";

const MAX_KEY_FILE = 65_536;
const OTHERS = 0o077;

/** What is in a file that is this user's alone. It is looked at after it was opened. Rejects with CertificateError. */
export async function readPrivate(path: string): Promise<Buffer> {
  let file: FileHandle;
  try {
    // O_NONBLOCK is for a FIFO, which would wait for a writer. Windows has neither.
    file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  } catch (error) {
    throw unusable(path, `cannot be read: ${codeOf(error)}; check the path`, error);
  }
  try {
    const status = await file.stat();
    if (!status.isFile()) {
      throw unusable(path, "is not a regular file; name the file of the key");
    }
    const me = geteuid?.();
    if (me !== undefined && status.uid !== 0 && status.uid !== me) {
      throw unusable(path, `belongs to another user (uid ${status.uid}); give it to this one (uid ${me})`);
    }
    if (me !== undefined && (status.mode & OTHERS) !== 0) {
      const mode = (status.mode & 0o7777).toString(8).padStart(4, "0");
      throw unusable(
        path,
        `others can read or change this key (mode ${mode}); run chmod 600 on it, or make a new key if somebody has` +
          " read it",
      );
    }
    if (status.size > MAX_KEY_FILE) {
      throw unusable(path, "is too large for a key; name the file of the key");
    }
    return await file.readFile();
  } finally {
    await file.close();
  }
}

/** A new file of mode 0600, on the disk with its content, or none. Rejects with CertificateError. */
export async function writePrivate(path: string, content: string): Promise<void> {
  let file: FileHandle;
  try {
    file = await open(path, "wx", 0o600);
  } catch (error) {
    const what =
      codeOf(error) === "EEXIST"
        ? "is there already; load it, or name another file"
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
  return new CertificateError(`${printable(path)}: ${what}`, cause === undefined ? undefined : { cause });
}

function codeOf(error: unknown): string {
  return (error as NodeJS.ErrnoException).code ?? "an error";
}
