/** Why TLS did not come about, from the errors of node:tls. */

import type { TLSSocket } from "node:tls";
import { TlsError, type TlsFailure } from "../errors.js";

const SENTENCES: Readonly<Partial<Record<TlsFailure, string>>> = {
  disconnected: "the server closed the connection before TLS was agreed: it may be full or down",
  not_tls: "what answers at this address does not speak TLS",
  unsupported_version: "the server does not speak TLS 1.3",
  no_shared_suite: "the server accepts none of the cipher suites of this protocol",
  no_application_protocol: "the server speaks TLS, but not zcp/1",
  wrong_parameters: "the server agreed on a TLS version or cipher suite that is not allowed",
  peer_rejected_certificate: "the server refused the certificate of this client; its log says why",
  certificate_required:
    "the server wants a certificate of this client, and it has none; get one from the server's operator and give it" +
    " as `certificate`, with its `keyFile`",
};

// OpenSSL's names for its reasons (include/openssl/sslerr.h). As of 3.2 they say SSL/TLS where they said SSLV3.
const BY_REASON = new Map<string, TlsFailure>([
  ["WRONG_VERSION_NUMBER", "not_tls"],
  ["PACKET_LENGTH_TOO_LONG", "not_tls"],
  ["UNSUPPORTED_PROTOCOL", "unsupported_version"],
  ["TLSV1_ALERT_PROTOCOL_VERSION", "unsupported_version"],
  ["SSLV3_ALERT_HANDSHAKE_FAILURE", "no_shared_suite"],
  ["TLSV1_ALERT_NO_APPLICATION_PROTOCOL", "no_application_protocol"],
  ["DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "bad_record"],
  ["RECORD_LAYER_FAILURE", "bad_record"],
  ["BAD_RECORD_TYPE", "bad_record"],
  ["UNEXPECTED_MESSAGE", "bad_record"],
  ["TLSV1_ALERT_UNKNOWN_CA", "peer_rejected_certificate"],
  ["SSLV3_ALERT_BAD_CERTIFICATE", "peer_rejected_certificate"],
  ["SSLV3_ALERT_CERTIFICATE_UNKNOWN", "peer_rejected_certificate"],
  ["SSLV3_ALERT_CERTIFICATE_EXPIRED", "peer_rejected_certificate"],
  ["SSLV3_ALERT_CERTIFICATE_REVOKED", "peer_rejected_certificate"],
  ["SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "peer_rejected_certificate"],
  ["TLSV1_ALERT_ACCESS_DENIED", "peer_rejected_certificate"],
  ["TLSV13_ALERT_CERTIFICATE_REQUIRED", "certificate_required"],
]);

const BY_VERIFY_ERROR = new Map<string, TlsFailure>([
  ["CERT_HAS_EXPIRED", "certificate_expired"],
  ["CERT_NOT_YET_VALID", "certificate_expired"],
  ["CERT_REVOKED", "certificate_revoked"],
]);

const RESETS = new Set(["ECONNRESET", "EPIPE", "ECONNABORTED", "ETIMEDOUT"]);

/** A TlsError with the sentence that belongs to its failure. */
export function tlsError(failure: TlsFailure, cause?: unknown): TlsError {
  return new TlsError(failure, SENTENCES[failure], cause === undefined ? undefined : { cause });
}

/** What an error event of a TLS socket means, before its handshake is complete or after. */
export function failureOf(error: NodeJS.ErrnoException, socket: TLSSocket, isAgreed: boolean): TlsError {
  const refused = socket.authorizationError as unknown; // a code; the types say Error
  if (!isAgreed && refused) {
    const code = typeof refused === "string" ? refused : ((refused as NodeJS.ErrnoException).code ?? "");
    const failure = BY_VERIFY_ERROR.get(code) ?? "certificate_untrusted";
    return new TlsError(failure, error.message, { cause: error });
  }
  const code = error.code ?? "";
  if (code.startsWith("ERR_SSL_")) {
    const reason = code.slice("ERR_SSL_".length).replace("SSL/TLS_", "SSLV3_");
    const failure = BY_REASON.get(reason) ?? (reason.includes("_ALERT_") ? "peer_alert" : "other");
    return tlsError(failure, error);
  }
  if (RESETS.has(code)) {
    return tlsError(isAgreed ? "connection_reset" : "disconnected", error);
  }
  return new TlsError("other", error.message, { cause: error });
}
