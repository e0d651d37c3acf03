/*
 * A client of zcproto: calls over TLS 1.3, with sessions, streams of items and calls from the server.
 *
 * Rules of the whole interface:
 *
 * - Functions that can fail return ZCP_OK, an error of the protocol (1 to 16, 64 to 70), or an error of this side (below
 *   0). If the last parameter, `error`, is not NULL, it gets an object that describes the error, or NULL after ZCP_OK.
 * - Texts are UTF-8 and end with a zero byte. A text or object that a function returns as const belongs to the object it
 *   came from, and is valid as long as that. All other objects belong to the caller, who frees each by the function of
 *   its type; each of these accepts NULL.
 * - All functions can be called from any thread, and a client by several at the same time. Where a type permits less, its
 *   description says so. An object must not be used while or after it is freed.
 * - Functions that wait must not be called in a callback; they return ZCP_ARGUMENT there. Callbacks run in a thread of
 *   this library, and must return soon: other calls wait for it. They must not wait for a lock that is held during a
 *   function that ends them, such as zcp_close.
 * - After fork, the child must not use objects of the parent.
 */

#ifndef ZCPROTO_H
#define ZCPROTO_H

#include <stddef.h>
#include <stdint.h>

/**
 * The version of this header. zcp_version returns that of the library.
 */
#define ZCP_VERSION "0.1.0"
#define ZCP_VERSION_MAJOR 0
#define ZCP_VERSION_MINOR 1
#define ZCP_VERSION_PATCH 0

/**
 * A version as a number, to compare: #if ZCP_VERSION_NUMBER >= ZCP_MAKE_VERSION(0, 2, 0)
 */
#define ZCP_MAKE_VERSION(major, minor, patch) ((major) << 16 | (minor) << 8 | (patch))
#define ZCP_VERSION_NUMBER ZCP_MAKE_VERSION(ZCP_VERSION_MAJOR, ZCP_VERSION_MINOR, ZCP_VERSION_PATCH)

/**
 * Success.
 */
#define ZCP_OK 0

/**
 * The call was cancelled.
 */
#define ZCP_CANCELLED 1

/**
 * An error without further information, or with an unknown code.
 */
#define ZCP_UNKNOWN 2

/**
 * The body, the method's name, params or meta are invalid.
 */
#define ZCP_INVALID_ARGUMENT 3

/**
 * The timeout of the call has passed. It may have run.
 */
#define ZCP_DEADLINE_EXCEEDED 4

/**
 * There is no such thing.
 */
#define ZCP_NOT_FOUND 5

/**
 * The thing exists already.
 */
#define ZCP_ALREADY_EXISTS 6

/**
 * The user is not allowed to do this.
 */
#define ZCP_PERMISSION_DENIED 7

/**
 * Too many requests, sessions or attempts.
 */
#define ZCP_RESOURCE_EXHAUSTED 8

/**
 * The state does not permit this.
 */
#define ZCP_FAILED_PRECONDITION 9

/**
 * The operation was aborted.
 */
#define ZCP_ABORTED 10

/**
 * A value is out of range.
 */
#define ZCP_OUT_OF_RANGE 11

/**
 * There is no such method.
 */
#define ZCP_UNIMPLEMENTED 12

/**
 * A fault of the server, or an answer that cannot be read.
 */
#define ZCP_INTERNAL 13

/**
 * Not now: the server is draining or a part of it is down.
 */
#define ZCP_UNAVAILABLE 14

/**
 * The answer was delayed for too long. The call may have run.
 */
#define ZCP_DATA_LOSS 15

/**
 * There is no session, or the credentials are wrong.
 */
#define ZCP_UNAUTHENTICATED 16

/**
 * The peer violated the protocol.
 */
#define ZCP_PROTOCOL_ERROR 64

/**
 * A frame is longer than the limit.
 */
#define ZCP_FRAME_TOO_LARGE 65

/**
 * A frame has the wrong salt, or a counter that did not grow.
 */
#define ZCP_REPLAYED 66

/**
 * The timestamp of a frame is off by more than the tolerance.
 */
#define ZCP_STALE_TIMESTAMP 67

/**
 * The token has expired.
 */
#define ZCP_TOKEN_EXPIRED 68

/**
 * The token was revoked.
 */
#define ZCP_TOKEN_REVOKED 69

/**
 * The session made room for a newer one.
 */
#define ZCP_SESSION_REPLACED 70

/**
 * The options are invalid or contradictory. Nothing was started.
 */
#define ZCP_CONFIG -1

/**
 * A certificate or a key is unusable.
 */
#define ZCP_CERTIFICATE -2

/**
 * The TLS handshake failed, or the server is not trusted.
 */
#define ZCP_TLS -3

/**
 * Connecting failed: unknown host, refused, unreachable, or timeout.
 */
#define ZCP_CANNOT_CONNECT -4

/**
 * The connection ended. A call that was in flight may have run.
 */
#define ZCP_CLOSED -5

/**
 * A parameter is invalid: NULL, not UTF-8, out of range, or not allowed here.
 */
#define ZCP_ARGUMENT -6

/**
 * A fault of this library. Please report it.
 */
#define ZCP_PANIC -7

/**
 * There is nothing more: the stream has no further item, or no event has come in time.
 */
#define ZCP_END -8

/**
 * A connection to a server, with a session. It reconnects, and any number of threads can use it at the same time. One of them can
 * close it while others wait: their functions return ZCP_CLOSED, and zcp_event ZCP_END. A function must have begun to wait
 * before another thread closes the client; one that begins afterwards uses freed memory.
 */
typedef struct zcp_client zcp_client;

/**
 * The description of an error.
 */
typedef struct zcp_error zcp_error;

/**
 * How to reach and verify a server, and how to open a session there. Use it in one thread at a time.
 */
typedef struct zcp_options zcp_options;

/**
 * A call that was started, with which it can be cancelled.
 */
typedef struct zcp_pending zcp_pending;

/**
 * A call from the server. Answer it once, from any thread, by `zcp_server_call_reply` or `zcp_server_call_fail`; both free
 * it. An answer to a call that the server has withdrawn has no effect.
 */
typedef struct zcp_server_call zcp_server_call;

/**
 * A stream of items. One thread at a time can take items while another one sends items.
 */
typedef struct zcp_stream zcp_stream;

/**
 * A value: params, the result of a call, or an item of a stream. It never changes.
 */
typedef struct zcp_value zcp_value;

/**
 * Options of one call. All zero is the default.
 */
typedef struct zcp_call_options {
    /**
     * The time for the call, retries included, in milliseconds; 0 for the default of the client.
     */
    uint64_t timeout_ms;
    /**
     * NULL, or 1 to 64 characters: the server runs calls with the same key once, so the call is repeated if its answer is lost.
     */
    const char *idempotency_key;
    /**
     * NULL, or W3C Trace Context.
     */
    const char *traceparent;
} zcp_call_options;

/**
 * The callback at the end of a call that was started. It runs once, in a thread of this library. Either `error` is NULL, or
 * `result` is. The callback frees both.
 */
typedef void (*zcp_done)(void *data, struct zcp_value *result, struct zcp_error *error);

/**
 * The function that handles calls from the server. It runs in a thread of this library and must return soon; the call can be
 * answered later, by another thread.
 */
typedef void (*zcp_handler)(void *data, struct zcp_server_call *call);

/**
 * The function that logs in by a scheme of the server's application: it returns a map with `scheme` and its fields, which the
 * library frees, or NULL on failure.
 */
typedef struct zcp_value *(*zcp_login)(void *data);

/**
 * Receives a text, which is valid during the call.
 */
typedef void (*zcp_notice)(void *data, const char *text);

/**
 * Options of one stream. All zero is the default.
 */
typedef struct zcp_stream_options {
    /**
     * The time for the whole stream in milliseconds; 0 for no limit.
     */
    uint64_t timeout_ms;
    /**
     * The time to wait for one item in milliseconds; 0 for no limit.
     */
    uint64_t item_timeout_ms;
    /**
     * How many items the server may send before the application takes one; 0 for 64.
     */
    uint64_t window_items;
    /**
     * How many bytes the server may send before the application takes an item; 0 for 262,144.
     */
    uint64_t window_bytes;
    /**
     * NULL, or W3C Trace Context.
     */
    const char *traceparent;
} zcp_stream_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Return the version of the library, such as "0.1.0". ZCP_VERSION is that of the header.
 */
const char *zcp_version(void);

/**
 * Connect to a server, and open a session if the options have credentials. Waits for that.
 */
int32_t zcp_connect(const struct zcp_options *options, struct zcp_client **client, struct zcp_error **error);

/**
 * Open a session of another user on the connection of a client, with the credentials of the options; their other settings are
 * not used. The session is a client of its own. Waits for that.
 */
int32_t zcp_session_for(const struct zcp_client *client,
                        const struct zcp_options *options,
                        struct zcp_client **session,
                        struct zcp_error **error);

/**
 * Call a method and wait for its result. `params` is a map, or NULL for none; `options` is NULL or options.
 */
int32_t zcp_call(const struct zcp_client *client,
                 const char *method,
                 const struct zcp_value *params,
                 const struct zcp_call_options *options,
                 struct zcp_value **result,
                 struct zcp_error **error);

/**
 * Start to call a method; `done` is called with `data` and the result or an error. If this function fails, it is not called.
 * `pending` is NULL, or gets an object that can cancel the call; free it before or after the call has ended.
 */
int32_t zcp_call_start(const struct zcp_client *client,
                       const char *method,
                       const struct zcp_value *params,
                       const struct zcp_call_options *options,
                       zcp_done done,
                       void *data,
                       struct zcp_pending **pending,
                       struct zcp_error **error);

/**
 * Cancel a call that was started: its callback gets ZCP_CANCELLED, unless the call has ended already.
 */
void zcp_pending_cancel(const struct zcp_pending *pending);

/**
 * Free the object of a call that was started. The call goes on.
 */
void zcp_pending_free(struct zcp_pending *pending);

/**
 * Return the session as a map with `id`, `user` and `expires_at` (milliseconds since 1970), or nil without one.
 */
int32_t zcp_session(const struct zcp_client *client,
                    struct zcp_value **session,
                    struct zcp_error **error);

/**
 * Return where the client is connected, such as `a.example:7443 (192.0.2.1)`, or nil without a connection.
 */
int32_t zcp_endpoint(const struct zcp_client *client, struct zcp_value **endpoint, struct zcp_error **error);

/**
 * Open a new session, as after ZCP_TOKEN_REVOKED or ZCP_SESSION_REPLACED. Waits for it.
 */
int32_t zcp_open_session(const struct zcp_client *client, struct zcp_error **error);

/**
 * Cut the connections of a client like a network failure, for tests. The client reconnects.
 */
void zcp_cut(const struct zcp_client *client);

/**
 * Wait for the next event of the server, as an array of name and data; at most `timeout_ms`, then ZCP_END.
 */
int32_t zcp_event(const struct zcp_client *client,
                  uint64_t timeout_ms,
                  struct zcp_value **event,
                  struct zcp_error **error);

/**
 * Close a client and its connection, or a session of `zcp_session_for` alone, and free it. Calls that were started end with
 * ZCP_CLOSED. Then no handler of it runs any more, and no callback of its options. In a callback it does not wait for that. NULL
 * is accepted.
 */
int32_t zcp_close(struct zcp_client *client);

/**
 * Close `count` clients and sessions and free them, as by `zcp_close`, with one wait for all of them: thousands of sessions on one
 * connection end together. NULL is accepted for `clients` and for each of them.
 */
int32_t zcp_close_all(struct zcp_client *const *clients,
                      size_t count);

/**
 * Create the key of a device in a new file, which only its owner can read.
 */
int32_t zcp_device_create(const char *file, struct zcp_error **error);

/**
 * Enrol a device with a code of `zcproto pair`, under a name. The options need no credentials. `user` gets the name of the
 * user to whom the device belongs from now on. Waits for that.
 */
int32_t zcp_enroll(const struct zcp_options *options,
                   const char *code,
                   const char *file,
                   const char *name,
                   struct zcp_value **user,
                   struct zcp_error **error);

/**
 * Return the code of an error; ZCP_OK for NULL.
 */
int32_t zcp_error_code(const struct zcp_error *error);

/**
 * Return the message of an error: what failed, and how to fix it. Return NULL for NULL.
 */
const char *zcp_error_message(const struct zcp_error *error);

/**
 * Return the details of an error, a map that can be empty. It belongs to the error. Return NULL for NULL. Those of ZCP_TLS have
 * `failure`, such as `certificate_expired` or `pin_mismatch`; those of ZCP_CLOSED have `code` after an error of the protocol.
 */
const struct zcp_value *zcp_error_details(const struct zcp_error *error);

/**
 * Return 1 if the connection ended cleanly, 0 after a reset or a truncation and for any other error.
 */
int32_t zcp_error_is_clean(const struct zcp_error *error);

/**
 * Return the name of a code, such as NOT_FOUND. Return NULL for an unknown code.
 */
const char *zcp_code_name(int32_t code);

/**
 * Free an error.
 */
void zcp_error_free(struct zcp_error *error);

/**
 * Let the server call a method of this client. `handler` gets each call with `data`, until it is replaced or removed, or the client
 * is closed. Waits until the server can call it. After a reconnect the client registers its methods again.
 */
int32_t zcp_handle(const struct zcp_client *client,
                   const char *method,
                   zcp_handler handler,
                   void *data,
                   struct zcp_error **error);

/**
 * Handle a method no longer. Afterwards the handler does not run, also if this function fails because the server could not be
 * notified; calls that it has not answered can still be answered. Waits for that.
 */
int32_t zcp_remove_handler(const struct zcp_client *client,
                           const char *method,
                           struct zcp_error **error);

/**
 * Return the name of the method that is called. Return NULL for NULL.
 */
const char *zcp_server_call_method(const struct zcp_server_call *call);

/**
 * Return the user whose session is called. Return NULL for NULL.
 */
const char *zcp_server_call_user(const struct zcp_server_call *call);

/**
 * Return the params, a map. They belong to the call. Return NULL for NULL.
 */
const struct zcp_value *zcp_server_call_params(const struct zcp_server_call *call);

/**
 * Answer a call from the server, and free it. `result` is a value, or NULL for nil; it still belongs to the caller.
 */
void zcp_server_call_reply(struct zcp_server_call *call,
                           const struct zcp_value *result);

/**
 * Fail a call from the server, and free it. `code` is one of 1 to 16, others become ZCP_UNKNOWN; `message` is a text or NULL.
 */
void zcp_server_call_fail(struct zcp_server_call *call,
                          int32_t code,
                          const char *message);

/**
 * Make options for the server at an address: `host`, `host:port` or `[::1]:port`; the port is 7443 by default. Several servers that
 * share their sessions are separated by commas, at most 32: when one fails or goes away, the client uses another one at once.
 */
int32_t zcp_options_new(const char *address,
                        struct zcp_options **options,
                        struct zcp_error **error);

/**
 * Set an option. Values are text, numbers and times in decimal.
 *
 * - `address_order`: `random` by default, or `listed` for a primary server and its backups
 * - `user`, `key`: open the session by an API key
 * - `device`, `device_name`: open the session by an enrolled device, with its key file
 * - `certificate`, `key_file`: show a client certificate; without other credentials it opens the session
 * - `ca_file`: trust the CAs of this PEM file; without any CAs and pins, those of the system
 * - `ca_pem`: trust the CAs in this text in PEM
 * - `pins`: `sha256/BASE64` of the server's key; several are separated by spaces
 * - `system_store`: `true` trusts the CAs of the system, in addition to pins
 * - `server_hostname`: the name to verify in the certificate, instead of the host
 * - `verify`: `false` trusts any server
 * - `open_session`: `false` opens no session on connect
 * - `timeout_ms`: default timeout of calls, 30,000 by default
 * - `connect_timeout_ms`: timeout of one attempt to connect, 10,000 by default
 * - `start_timeout_ms`: how long to wait for a server that is starting, 10,000 by default
 * - `client`: the application as product/version
 * - `home`: the folder of the file of hosts that require verification; `~/.zeroclaw` by default
 * - `max_calls`: how many calls from the server are handled at once, 16 by default
 * - `max_connections`: connections to a server at once, 1 by default, at most 64; a further one is made while calls wait because
 *   the server allows no more of them in flight on the others
 * - `max_frame`: the largest frame accepted from the server, 1,048,576 bytes by default
 * - `key_log`: append the secrets of TLS to this file, for debugging
 */
int32_t zcp_options_set(struct zcp_options *options,
                        const char *name,
                        const char *value,
                        struct zcp_error **error);

/**
 * Open sessions by a scheme of the server's application. The function is called for each session that is opened, in a thread of
 * this library, until `zcp_close`, and must return soon. NULL removes it.
 */
int32_t zcp_options_set_login(struct zcp_options *options,
                              zcp_login login,
                              void *data,
                              struct zcp_error **error);

/**
 * Call a function with each warning, such as that a pin has no backup. It can run in the thread that connects, and in threads of
 * this library, until `zcp_close` of the last client that was connected by these options. NULL removes it.
 */
int32_t zcp_options_on_warning(struct zcp_options *options,
                               zcp_notice notice,
                               void *data,
                               struct zcp_error **error);

/**
 * Call a function once a client has connected and opened its session, and again after each reconnect, in a thread of this library,
 * until `zcp_close`. The text says where: `a.example:7443 (192.0.2.1)`. NULL removes it.
 */
int32_t zcp_options_on_connected(struct zcp_options *options,
                                 zcp_notice notice,
                                 void *data,
                                 struct zcp_error **error);

/**
 * Free options. A client does not need them after it has connected.
 */
void zcp_options_free(struct zcp_options *options);

/**
 * Open a stream of a method. `params` is a map, or NULL for none; `options` is NULL or options. Does not wait: an error of the
 * server comes with the first item.
 */
int32_t zcp_stream_open(const struct zcp_client *client,
                        const char *method,
                        const struct zcp_value *params,
                        const struct zcp_stream_options *options,
                        struct zcp_stream **stream,
                        struct zcp_error **error);

/**
 * Wait for the next item. ZCP_END after the last one: `zcp_stream_result` has the result then.
 */
int32_t zcp_stream_next(const struct zcp_stream *stream, struct zcp_value **item, struct zcp_error **error);

/**
 * Send an item. Waits until the method asks for it.
 */
int32_t zcp_stream_send(const struct zcp_stream *stream,
                        const struct zcp_value *item,
                        struct zcp_error **error);

/**
 * Send no more items. Waits until those before were sent.
 */
int32_t zcp_stream_finish(const struct zcp_stream *stream, struct zcp_error **error);

/**
 * Wait for the result of the method. Take all items first.
 */
int32_t zcp_stream_result(const struct zcp_stream *stream,
                          struct zcp_value **result,
                          struct zcp_error **error);

/**
 * Cancel a stream unless it has ended: functions that wait for it return ZCP_CANCELLED. Can be called while other threads wait.
 */
void zcp_stream_cancel(const struct zcp_stream *stream);

/**
 * Free a stream. The method is cancelled if it has not ended.
 */
void zcp_stream_free(struct zcp_stream *stream);

/**
 * Make a value from JSON. {"$bin": "00ff"} is a bin of these bytes, and {"$float": "nan"}, "inf" or "-inf" is that float.
 * A number without a fraction and an exponent is an int, from -2^63 to 2^64 - 1; beyond that it is ZCP_ARGUMENT, and so is a
 * key that a map has twice.
 */
int32_t zcp_value_from_json(const char *json,
                            struct zcp_value **value,
                            struct zcp_error **error);

/**
 * Make a value from msgpack.
 */
int32_t zcp_value_from_msgpack(const uint8_t *bytes,
                               size_t size,
                               struct zcp_value **value,
                               struct zcp_error **error);

/**
 * Return a value as JSON, in the form of `zcp_value_from_json`. Return NULL for NULL.
 */
const char *zcp_value_json(const struct zcp_value *value);

/**
 * Return a value as msgpack, and store its number of bytes in `size`. Return NULL for NULL.
 */
const uint8_t *zcp_value_msgpack(const struct zcp_value *value, size_t *size);

/**
 * Free a value.
 */
void zcp_value_free(struct zcp_value *value);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ZCPROTO_H */
