/**
 * Which servers are trusted, and the client certificate.
 *
 * There are three modes:
 *
 * - CA: node:tls verifies chain and validity period, this module the name and additional pins;
 * - pins only: a pin replaces the chain, this module verifies validity period and name;
 * - `verify: false`: nothing is verified.
 */

import { X509Certificate } from "node:crypto";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { isIP } from "node:net";
import { createSecureContext, type SecureContextOptions, type TLSSocket } from "node:tls";
import { escapeText } from "../client/text.js";
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
  readonly caFile: string | undefined;
  readonly hasCertificate: boolean;
  readonly #pins: ReadonlySet<string>;
  readonly #options: TrustOptions;
  readonly #byCa: boolean;

  /** Throws ConfigError for contradictory options, TlsError for a malformed pin. */
  constructor(options: TrustOptions) {
    const { caFile, pins = [], systemStore = false, verify = true, certificate } = options;
    this.#options = options;
    this.#pins = parsePins(pins);
    this.verify = verify;
    this.caFile = caFile;
    this.hasCertificate = certificate !== undefined;
    this.#byCa = verify && (caFile !== undefined || systemStore || this.#pins.size === 0);
    if (!verify && (caFile !== undefined || this.#pins.size > 0 || systemStore)) {
      throw new ConfigError(["verify: false contradicts caFile, pins and systemStore; leave out one or the other"]);
    }
    if (caFile !== undefined && systemStore) {
      throw new ConfigError(["caFile and systemStore exclude each other; give one of them"]);
    }
    if (certificate === undefined && (options.keyFile !== undefined || options.keyPassphrase !== undefined)) {
      throw new ConfigError(["keyFile and keyPassphrase require a certificate; give it, too"]);
    }
    const [pin] = this.#pins;
    if (pin !== undefined && this.#pins.size === 1) {
      const what = pin.startsWith(CERTIFICATE_PREFIX) ? "certificate" : "key";
      options.onWarning(
        `${pin} is the only pin: after the server's ${what} has changed, this client cannot connect; add the pin of the` +
          " server's next key as a backup",
      );
    }
  }

  /** Whether there is no file at `caFile`. */
  isCaMissing(): boolean {
    return this.caFile !== undefined && !existsSync(this.caFile);
  }

  /**
   * Return options for `tls.connect`. Reads the files each time, so that the next connection uses a renewed certificate.
   * Rejects with CertificateError.
   */
  async tlsOptions(): Promise<{ secureContext: ReturnType<typeof createSecureContext>; rejectUnauthorized: boolean }> {
    const { caFile, certificate, keyFile = certificate, keyPassphrase } = this.#options;
    const options: SecureContextOptions = {
      minVersion: "TLSv1.3",
      maxVersion: "TLSv1.3",
      ciphers: SUITES.join(":"),
    };
    if (this.#byCa && caFile !== undefined) {
      if (this.isCaMissing()) {
        throw new CertificateError(
          `${escapeText(caFile)}: does not exist; copy the CA of the server to this path (zcproto cert export-ca writes it),` +
            " or check the path",
        );
      }
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
        `${escapeText(certificate ?? caFile ?? "")}: cannot use certificate and key: ${(error as Error).message}`,
        { cause: error },
      );
    }
  }

  /** Verify a completed handshake: parameters, pins, validity period and name. Return the error, if any. */
  verifyServer(
    socket: TLSSocket,
    certificate: X509Certificate | undefined,
    host: string,
    wall: number,
  ): TlsError | undefined {
    if (socket.getProtocol() !== "TLSv1.3" || !SUITES.includes(socket.getCipher().standardName)) {
      return tlsError("wrong_parameters");
    }
    if (socket.alpnProtocol !== ALPN) {
      return tlsError("no_application_protocol");
    }
    if (certificate === undefined) {
      return new TlsError("certificate_untrusted", "the server sent no certificate");
    }
    if (!this.verify) {
      return undefined;
    }
    return (
      this.#checkPins(certificate) ??
      (this.#byCa ? undefined : checkValidity(certificate, wall)) ??
      checkName(certificate, host)
    );
  }

  #checkPins(certificate: X509Certificate): TlsError | undefined {
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
      `the server does not match any pin. It has ${key} (key) and ${whole} (certificate); expected:` +
        ` ${expected.slice(0, SHOWN_PINS).join(" or ")}${more}. If the operator confirms that the key has changed, replace` +
        " the pin; otherwise the connection may be intercepted",
    );
  }
}

function checkValidity(certificate: X509Certificate, wall: number): TlsError | undefined {
  if (!(wall >= Date.parse(certificate.validFrom))) {
    return new TlsError("certificate_expired", `not valid before ${certificate.validFrom}`);
  }
  if (!(wall <= Date.parse(certificate.validTo))) {
    return new TlsError("certificate_expired", `expired at ${certificate.validTo}`);
  }
  return undefined;
}

/** Check the subject alternative names only (RFC 9525 section 6). */
function checkName(certificate: X509Certificate, host: string): TlsError | undefined {
  const matches = isIP(host)
    ? certificate.checkIP(host)
    : certificate.checkHost(host, { subject: "never", partialWildcards: false });
  return matches === undefined
    ? new TlsError("certificate_name_mismatch", `the certificate is not for "${escapeText(host)}"`)
    : undefined;
}

async function read(file: string): Promise<Buffer> {
  try {
    return await readFile(file);
  } catch (error) {
    const { code = "unreadable" } = error as NodeJS.ErrnoException;
    throw new CertificateError(`${escapeText(file)}: cannot be read: ${code}; check the path`, { cause: error });
  }
}

/** Parse the certificates of a PEM file. node:tls would accept a file without any, and then trust no server. */
function certificatesOf(file: string, pem: Buffer): string[] {
  const found = pem.toString("latin1").match(PEM_CERTIFICATE);
  try {
    const certificates = (found ?? []).map((text) => new X509Certificate(text).toString());
    if (certificates.length > 0) {
      return certificates;
    }
  } catch (error) {
    throw new CertificateError(`${escapeText(file)}: has an invalid certificate; replace the file`, { cause: error });
  }
  throw new CertificateError(`${escapeText(file)}: has no certificate in PEM; check the path of the CA file`);
}
