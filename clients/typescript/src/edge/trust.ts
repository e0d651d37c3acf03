/**
 * Which servers are believed: those of a CA file or of Node's own list of CAs, those with a pin, or both; and the
 * certificate that is shown to those that ask for one.
 *
 * Trust is one of three:
 *
 * - by CA: node:tls checks chain and dates; the name is checked here, and pins, if any, come on top;
 * - by pins alone: the pin stands for the chain, and dates and name are checked here;
 * - none at all (`verify` off): whoever asked for that has to say so.
 */

import { X509Certificate } from "node:crypto";
import { readFile } from "node:fs/promises";
import { isIP } from "node:net";
import { createSecureContext, type SecureContextOptions, type TLSSocket } from "node:tls";
import { printable } from "../client/printable.js";
import { CertificateError, ConfigError, TlsError } from "../errors.js";
import { tlsError } from "./failure.js";
import { CERTIFICATE_PREFIX, certificatePin, keyPin, parsePins } from "./pins.js";
import { readPrivate } from "./private_file.js";

export const ALPN = "zcp/1";
const SUITES = ["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"];
const SHOWN_PINS = 8;
const PEM_CERTIFICATE = /-----BEGIN CERTIFICATE-----[\s\S]+?-----END CERTIFICATE-----/g;

export type Passphrase = string | (() => string);

export interface TrustOptions {
  readonly caFile?: string | undefined;
  readonly pins?: Iterable<string> | string | undefined;
  readonly systemStore?: boolean | undefined;
  readonly verify?: boolean | undefined;
  readonly certificate?: string | undefined;
  readonly keyFile?: string | undefined;
  readonly keyPassphrase?: Passphrase | undefined;
  readonly onWarning: (message: string) => void;
}

export class Trust {
  readonly verify: boolean;
  readonly hasCertificate: boolean;
  readonly #pins: ReadonlySet<string>;
  readonly #options: TrustOptions;
  readonly #byCa: boolean;

  /** Throws ConfigError for what contradicts itself, TlsError for a malformed pin. */
  constructor(options: TrustOptions) {
    const { caFile, pins = [], systemStore = false, verify = true, certificate } = options;
    this.#options = options;
    this.#pins = parsePins(pins);
    this.verify = verify;
    this.hasCertificate = certificate !== undefined;
    this.#byCa = verify && (caFile !== undefined || systemStore || this.#pins.size === 0);
    if (!verify && (caFile !== undefined || this.#pins.size > 0 || systemStore)) {
      throw new ConfigError(["verify: false: leave out caFile, pins and systemStore, or leave it on"]);
    }
    if (caFile !== undefined && systemStore) {
      throw new ConfigError(["caFile and systemStore: trust one of them"]);
    }
    if (certificate === undefined && (options.keyFile !== undefined || options.keyPassphrase !== undefined)) {
      throw new ConfigError(["keyFile and keyPassphrase belong to a certificate: give it, too"]);
    }
    const [pin] = this.#pins;
    if (pin !== undefined && this.#pins.size === 1) {
      const what = pin.startsWith(CERTIFICATE_PREFIX) ? "certificate" : "key";
      options.onWarning(
        `${pin} is the only pin: when the server's ${what} is renewed or lost, this client is locked out until its` +
          " pins are changed; add the pin of the server's next key as a backup",
      );
    }
  }

  /**
   * The options of `tls.connect` that follow from it. Reads the disk: of a certificate that was renewed the next
   * connection makes use. Rejects with CertificateError.
   */
  async tlsOptions(): Promise<{ secureContext: ReturnType<typeof createSecureContext>; rejectUnauthorized: boolean }> {
    const { caFile, certificate, keyFile = certificate, keyPassphrase } = this.#options;
    const options: SecureContextOptions = {
      minVersion: "TLSv1.3",
      maxVersion: "TLSv1.3",
      ciphers: SUITES.join(":"),
    };
    if (this.#byCa && caFile !== undefined) {
      options.ca = certificatesOf(caFile, await read(caFile));
    }
    if (certificate !== undefined && keyFile !== undefined) {
      options.cert = await read(certificate);
      options.key = await readPrivate(keyFile);
      if (keyPassphrase !== undefined) {
        options.passphrase = typeof keyPassphrase === "string" ? keyPassphrase : keyPassphrase();
      }
    }
    try {
      return { secureContext: createSecureContext(options), rejectUnauthorized: this.#byCa };
    } catch (error) {
      throw new CertificateError(
        `${printable(certificate ?? caFile ?? "")}: certificate and key cannot be used: ${(error as Error).message}`,
        { cause: error },
      );
    }
  }

  /** What is wrong with a completed handshake, if anything is: parameters, name, pins, dates. */
  judge(socket: TLSSocket, certificate: X509Certificate | undefined, host: string, wall: number): TlsError | undefined {
    if (socket.getProtocol() !== "TLSv1.3" || !SUITES.includes(socket.getCipher().standardName)) {
      return tlsError("wrong_parameters");
    }
    if (socket.alpnProtocol !== ALPN) {
      return tlsError("no_application_protocol");
    }
    if (certificate === undefined) {
      return new TlsError("certificate_untrusted", "the server has shown no certificate");
    }
    if (!this.verify) {
      return undefined;
    }
    return (
      this.#judgePins(certificate) ??
      (this.#byCa ? undefined : judgeDates(certificate, wall)) ??
      judgeName(certificate, host)
    );
  }

  #judgePins(certificate: X509Certificate): TlsError | undefined {
    if (this.#pins.size === 0) {
      return undefined;
    }
    const [key, whole] = [keyPin(certificate), certificatePin(certificate)];
    if (this.#pins.has(key) || this.#pins.has(whole)) {
      return undefined;
    }
    const expected = [...this.#pins].sort();
    const more = expected.length > SHOWN_PINS ? ` or ${expected.length - SHOWN_PINS} more` : "";
    return new TlsError(
      "pin_mismatch",
      `the server shows none of the pins that are expected of it. It shows ${key} (its key) and ${whole} (the whole` +
        ` certificate); expected: ${expected.slice(0, SHOWN_PINS).join(" or ")}${more}. If its operator confirms that` +
        " the key was changed, give the new pin in place of the old one; else somebody may be in between",
    );
  }
}

function judgeDates(certificate: X509Certificate, wall: number): TlsError | undefined {
  if (!(wall >= Date.parse(certificate.validFrom))) {
    return new TlsError("certificate_expired", `valid only from ${certificate.validFrom} on`);
  }
  if (!(wall <= Date.parse(certificate.validTo))) {
    return new TlsError("certificate_expired", `expired at ${certificate.validTo}`);
  }
  return undefined;
}

/** RFC 9525 section 6: only subject alternative names count, of the kind that was asked for. */
function judgeName(certificate: X509Certificate, host: string): TlsError | undefined {
  const matches = isIP(host)
    ? certificate.checkIP(host)
    : certificate.checkHost(host, { subject: "never", partialWildcards: false });
  return matches === undefined
    ? new TlsError("certificate_name_mismatch", `the certificate is not for "${printable(host)}"`)
    : undefined;
}

async function read(file: string): Promise<Buffer> {
  try {
    return await readFile(file);
  } catch (error) {
    const { code = "unreadable" } = error as NodeJS.ErrnoException;
    throw new CertificateError(`${printable(file)}: cannot be read: ${code}; check the path`, { cause: error });
  }
}

/** The certificates in a PEM file; node:tls would take one that holds none, and trust nobody. */
function certificatesOf(file: string, pem: Buffer): string[] {
  const found = pem.toString("latin1").match(PEM_CERTIFICATE);
  try {
    const certificates = (found ?? []).map((text) => new X509Certificate(text).toString());
    if (certificates.length > 0) {
      return certificates;
    }
  } catch (error) {
    throw new CertificateError(`${printable(file)}: holds a certificate that cannot be read`, { cause: error });
  }
  throw new CertificateError(`${printable(file)}: holds no certificate in PEM; name the file of the CA`);
}
