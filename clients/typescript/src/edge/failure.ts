/** Maps errors of node:tls to TlsError. */

import type { TLSSocket } from "node:tls";
import { TlsError, type TlsFailure } from "../errors.js";

const MESSAGES: Readonly<Partial<Record<TlsFailure, string>>> = {
  disconnected: "the server closed the connection during the TLS handshake; it may be full or shutting down",
  not_tls: "the server at this address does not use TLS; check host and port",
  unsupported_version: "the server does not support TLS 1.3",
  no_shared_parameters:
    "the server supports no cipher suite, key-exchange group or signature algorithm of this client; its log has the cause",
  no_application_protocol: "the server uses TLS but does not support zcp/1; check host and port",
  wrong_parameters: "the server selected a TLS version or cipher suite that is not allowed",
  peer_rejected_certificate: "the server refused the certificate of this client; see the log of the server",
  certificate_required:
    "the server requires a client certificate; get one from its operator and pass it as `certificate` with its `keyFile`",
};

// Reasons of OpenSSL (include/openssl/sslerr.h). Since 3.2 some have the prefix SSL/TLS instead of SSLV3.
const BY_REASON = new Map<string, TlsFailure>([
  ["WRONG_VERSION_NUMBER", "not_tls"],
  ["PACKET_LENGTH_TOO_LONG", "not_tls"],
  ["UNSUPPORTED_PROTOCOL", "unsupported_version"],
  ["TLSV1_ALERT_PROTOCOL_VERSION", "unsupported_version"],
  ["SSLV3_ALERT_HANDSHAKE_FAILURE", "no_shared_parameters"],
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

const UNTRUSTED_CURE = "get the CA of the server (zcproto cert export-ca), and give it as caFile";

const RESETS = new Set(["ECONNRESET", "EPIPE", "ECONNABORTED", "ETIMEDOUT"]);

/** Make a TlsError with the message for its failure. */
export function tlsError(failure: TlsFailure, cause?: unknown): TlsError {
  return new TlsError(failure, MESSAGES[failure], cause === undefined ? undefined : { cause });
}

/** Convert an error event of a TLS socket, during the handshake or after it. */
export function failureOf(error: NodeJS.ErrnoException, socket: TLSSocket, isConnected: boolean): TlsError {
  const verifyError = socket.authorizationError as unknown; // a code, although typed as Error
  if (!isConnected && verifyError) {
    const code = typeof verifyError === "string" ? verifyError : ((verifyError as NodeJS.ErrnoException).code ?? "");
    const failure = BY_VERIFY_ERROR.get(code) ?? "certificate_untrusted";
    const cure = failure === "certificate_untrusted" ? `; ${UNTRUSTED_CURE}` : "";
    return new TlsError(failure, `${error.message}${cure}`, { cause: error });
  }
  const code = error.code ?? "";
  if (code.startsWith("ERR_SSL_")) {
    const reason = code.slice("ERR_SSL_".length).replace("SSL/TLS_", "SSLV3_");
    const failure = BY_REASON.get(reason) ?? (reason.includes("_ALERT_") ? "peer_alert" : "other");
    return tlsError(failure, error);
  }
  if (RESETS.has(code)) {
    return tlsError(isConnected ? "connection_reset" : "disconnected", error);
  }
  return new TlsError("other", error.message, { cause: error });
}
