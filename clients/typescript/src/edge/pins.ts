/** Certificate pins: the SHA-256 of a public key (RFC 7469 section 2.4) or of a whole certificate. */

import { createHash, type X509Certificate } from "node:crypto";
import { escapeText } from "../client/text.js";
import { TlsError } from "../errors.js";

export const KEY_PREFIX = "sha256/";
export const CERTIFICATE_PREFIX = "cert-sha256/";
export const MAX_PINS = 64;
const DIGEST_SIZE = 32;

/** Return the pin of a public key: `sha256/` and base64 of the SHA-256 of its SubjectPublicKeyInfo. */
export function keyPin(certificate: X509Certificate): string {
  const spki = certificate.publicKey.export({ type: "spki", format: "der" });
  return KEY_PREFIX + createHash("sha256").update(spki).digest("base64");
}

/** Return the pin of a certificate: `cert-sha256/` and base64 of the SHA-256 of its DER. */
export function certificatePin(certificate: X509Certificate): string {
  return CERTIFICATE_PREFIX + createHash("sha256").update(certificate.raw).digest("base64");
}

/**
 * Validate pins. Throws TlsError for a malformed one: a pin is never ignored.
 *
 * A text may have several, separated by commas or white space; one without any is malformed.
 */
export function parsePins(pins: Iterable<string> | string): ReadonlySet<string> {
  const listed = typeof pins === "string" ? pins.split(/[\s,]+/).filter((pin) => pin !== "") : [...pins];
  if (typeof pins === "string" && listed.length === 0) {
    listed.push(pins);
  }
  const parsed = new Set(listed);
  if (parsed.size > MAX_PINS) {
    throw new TlsError("pin_malformed", `more than ${MAX_PINS} pins; remove old ones`);
  }
  for (const pin of parsed) {
    if (!isPin(pin)) {
      const shown = escapeText(String(pin), 80);
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
  // Pins are compared as text: another encoding of the same digest would never match.
  const isCanonical = digest.length === DIGEST_SIZE && digest.toString("base64") === pin.slice(slash);
  return isCanonical && [KEY_PREFIX, CERTIFICATE_PREFIX].includes(pin.slice(0, slash));
}
