/** Certificate pins: SHA-256 of the public key (RFC 7469 section 2.4) or of the whole certificate. */

import { createHash, type X509Certificate } from "node:crypto";
import { printable } from "../client/printable.js";
import { TlsError } from "../errors.js";

export const KEY_PREFIX = "sha256/";
export const CERTIFICATE_PREFIX = "cert-sha256/";
export const MAX_PINS = 64;
const DIGEST_SIZE = 32;

/** The pin of a certificate's public key: `sha256/` and base64 of the SHA-256 of its SubjectPublicKeyInfo. */
export function keyPin(certificate: X509Certificate): string {
  const spki = certificate.publicKey.export({ type: "spki", format: "der" });
  return KEY_PREFIX + createHash("sha256").update(spki).digest("base64");
}

/** The pin of a whole certificate: `cert-sha256/` and base64 of the SHA-256 of its DER. */
export function certificatePin(certificate: X509Certificate): string {
  return CERTIFICATE_PREFIX + createHash("sha256").update(certificate.raw).digest("base64");
}

/**
 * Check the form of pins. Throws TlsError naming the one that is malformed: never ignore a pin.
 *
 * One text may hold several, between commas or white space; a text without any is malformed, too.
 */
export function parsePins(pins: Iterable<string> | string): ReadonlySet<string> {
  const listed = typeof pins === "string" ? pins.split(/[\s,]+/).filter((pin) => pin !== "") : [...pins];
  if (typeof pins === "string" && listed.length === 0) {
    listed.push(pins);
  }
  const parsed = new Set(listed);
  if (parsed.size > MAX_PINS) {
    throw new TlsError("pin_malformed", `more than ${MAX_PINS} pins`);
  }
  for (const pin of parsed) {
    if (!isPin(pin)) {
      const shown = printable(String(pin), 80);
      throw new TlsError("pin_malformed", `"${shown}" is not sha256/BASE64 or cert-sha256/BASE64`);
    }
  }
  return parsed;
}

function isPin(pin: unknown): boolean {
  if (typeof pin !== "string") {
    return false;
  }
  const slash = pin.indexOf("/") + 1;
  const digest = Buffer.from(pin.slice(slash), "base64");
  // Pins are compared as text: one that decodes alike but is written otherwise would never match.
  const isCanonical = digest.length === DIGEST_SIZE && digest.toString("base64") === pin.slice(slash);
  return isCanonical && [KEY_PREFIX, CERTIFICATE_PREFIX].includes(pin.slice(0, slash));
}
