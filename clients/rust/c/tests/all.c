/* Use every function of zcproto.h, correctly and not, with the server of methods.py.
 *
 *     all HOST:PORT CA_FILE KEY_OF_ADA KEY_OF_BOB CODE HOME
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "support.h"
#include "zcproto.h"

#define THREADS 4
#define CALLS 25

static void check_values(void) {
    static const char *const texts[] = {
        "null", "true", "-9223372036854775808", "18446744073709551615", "1.5", "\"\\u0000x\"", "[1,[2]]",
        "{\"a\":{\"b\":[]}}", "1e20", "\"\\\"99999999999999999999\"", "{\"$bin\":\"00ff\"}", "{\"$float\":\"nan\"}", "{\"$float\":\"-inf\"}",
    };
    static const char *const invalid[] = {
        "", "{", "18446744073709551616", "[-9223372036854775809]", "{\"n\":99999999999999999999}",
        "{\"a\":1,\"b\":2,\"a\":3}", "[{\"a\":1,\"\\u0061\":1}]", "{\"$bin\":\"00\",\"$bin\":\"00\"}",
        "{\"$bin\":\"0\"}", "{\"$float\":\"x\"}",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
    };
    static const uint8_t bad[] = {0x81, 0x01, 0x02};
    zcp_value *value = NULL, *again = NULL;
    zcp_error *error = NULL;
    size_t size = 0;

    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        const uint8_t *bytes;
        value = json(texts[i]);
        CHECK(strcmp(zcp_value_json(value), texts[i]) == 0);
        bytes = zcp_value_msgpack(value, &size);
        EXPECT(zcp_value_from_msgpack(bytes, size, &again, &error), ZCP_OK);
        CHECK(strcmp(zcp_value_json(again), texts[i]) == 0);
        zcp_value_free(value);
        zcp_value_free(again);
    }
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++) {
        EXPECT(zcp_value_from_json(invalid[i], &value, &error), ZCP_ARGUMENT);
    }
    EXPECT(zcp_value_from_json("\"\xff\"", &value, &error), ZCP_ARGUMENT);
    EXPECT(zcp_value_from_msgpack(bad, sizeof bad, &value, &error), ZCP_ARGUMENT);
    EXPECT(zcp_value_from_msgpack(NULL, 1, &value, &error), ZCP_ARGUMENT);
}

static void check_nothing(void) {
    zcp_error *error = NULL;
    zcp_options *options = NULL;
    EXPECT(zcp_options_new(NULL, &options, &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_new("x", NULL, &error), ZCP_ARGUMENT);
    CHECK(zcp_options_new(NULL, NULL, NULL) == ZCP_ARGUMENT);
    EXPECT(zcp_options_set(NULL, "user", "x", &error), ZCP_ARGUMENT);
    EXPECT(zcp_connect(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_session_for(NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_call(NULL, "x", NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_call_start(NULL, "x", NULL, NULL, NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_session(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_open_session(NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_event(NULL, 0, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_handle(NULL, "x", NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_remove_handler(NULL, "x", &error), ZCP_ARGUMENT);
    EXPECT(zcp_endpoint(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set_login(NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_on_warning(NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_on_connected(NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_stream_open(NULL, "x", NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_stream_next(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_stream_send(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_stream_finish(NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_stream_result(NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_device_create(NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_enroll(NULL, NULL, NULL, NULL, NULL, &error), ZCP_ARGUMENT);
    CHECK(zcp_close(NULL) == ZCP_OK && zcp_close_all(NULL, 1) == ZCP_OK);
    zcp_cut(NULL);
    CHECK(zcp_value_json(NULL) == NULL && zcp_value_msgpack(NULL, NULL) == NULL);
    CHECK(zcp_error_code(NULL) == ZCP_OK && zcp_error_message(NULL) == NULL && zcp_error_details(NULL) == NULL);
    CHECK(zcp_error_is_clean(NULL) == 0 && zcp_code_name(1000) == NULL);
    CHECK(zcp_server_call_method(NULL) == NULL && zcp_server_call_user(NULL) == NULL);
    CHECK(zcp_server_call_params(NULL) == NULL);
    zcp_server_call_reply(NULL, NULL);
    zcp_server_call_fail(NULL, 1, NULL);
    zcp_pending_cancel(NULL);
    zcp_pending_free(NULL);
    zcp_value_free(NULL);
    zcp_error_free(NULL);
    zcp_options_free(NULL);
    zcp_stream_cancel(NULL);
    zcp_stream_free(NULL);
}

static void check_version(void) {
    char numbers[32];
    snprintf(numbers, sizeof numbers, "%d.%d.%d", ZCP_VERSION_MAJOR, ZCP_VERSION_MINOR, ZCP_VERSION_PATCH);
    CHECK(strcmp(zcp_version(), ZCP_VERSION) == 0 && strcmp(numbers, ZCP_VERSION) == 0);
#if ZCP_VERSION_NUMBER < ZCP_MAKE_VERSION(0, 1, 0) || ZCP_VERSION_NUMBER >= ZCP_MAKE_VERSION(1000, 0, 0)
#error "the version is not a number"
#endif
}

static void check_options(const char *key) {
    char addresses[256];
    zcp_client *client;
    zcp_error *error = NULL;
    zcp_options *options = options_for("ada", "wrong key");
    EXPECT(zcp_options_set(options, "colour", "red", &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set(options, "verify", "maybe", &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set(options, "max_calls", "-1", &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set(options, "user", "\xff", &error), ZCP_ARGUMENT);
    refused(options, ZCP_UNAUTHENTICATED);
    options = options_for("ada", key);
    EXPECT(zcp_options_set(options, "pins", "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", &error), ZCP_OK);
    CHECK(zcp_connect(options, &client, &error) == ZCP_TLS);
    CHECK(strcmp(zcp_value_json(zcp_error_details(error)), "{\"failure\":\"pin_mismatch\"}") == 0);
    zcp_error_free(error);
    zcp_options_free(options);
    options = options_for("ada", key);
    EXPECT(zcp_options_set(options, "server_hostname", "another.example", &error), ZCP_OK);
    refused(options, ZCP_TLS);
    options = options_for(NULL, NULL);
    EXPECT(zcp_options_set(options, "device", "/nonexistent", &error), ZCP_OK);
    refused(options, ZCP_ARGUMENT); /* without a name */
    options = options_for(NULL, NULL);
    EXPECT(zcp_options_set(options, "device", "/nonexistent", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "device_name", "x", &error), ZCP_OK);
    refused(options, ZCP_CERTIFICATE);
    options = options_for("ada", key);
    EXPECT(zcp_options_set(options, "max_frame", "0", &error), ZCP_OK);
    refused(options, ZCP_CONFIG);
    /* A server that is down, and one that is not. */
    CHECK((size_t)snprintf(addresses, sizeof addresses, "localhost:1,%s", address) < sizeof addresses);
    EXPECT(zcp_options_new(addresses, &options, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "address_order", "sorted", &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set(options, "address_order", "listed", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "max_connections", "many", &error), ZCP_ARGUMENT);
    EXPECT(zcp_options_set(options, "max_connections", "2", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "ca_file", ca_file, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "home", home, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "connect_timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    client = connected(options);
    CHECK(zcp_close(client) == ZCP_OK);
    EXPECT(zcp_options_new("localhost:1", &options, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "ca_file", ca_file, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "start_timeout_ms", "0", &error), ZCP_OK);
    refused(options, ZCP_CANNOT_CONNECT);
}

static void on_notice(void *data, const char *text) {
    record(data, 0, text);
}

static char *content_of(const char *path) {
    FILE *file = fopen(path, "r");
    char *text = calloc(1, 65536);
    CHECK(file != NULL && text != NULL && fread(text, 1, 65535, file) > 0);
    fclose(file);
    return text;
}

/* The CA as text, a callback of the options for each of their kinds, and where the client is. */
static void check_trust_and_notices(const char *key) {
    zcp_error *error = NULL;
    zcp_options *options = NULL;
    zcp_client *client = NULL;
    zcp_value *endpoint = NULL;
    struct outcome warning = {0}, connected = {0};
    char *pem = content_of(ca_file);

    EXPECT(zcp_options_new(address, &options, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "ca_pem", "no PEM", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "home", home, &error), ZCP_OK);
    EXPECT(zcp_connect(options, &client, &error), ZCP_CERTIFICATE);
    EXPECT(zcp_options_set(options, "ca_pem", pem, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "connect_timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "user", "ada", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "key", key, &error), ZCP_OK);
    EXPECT(zcp_options_on_warning(options, on_notice, &warning, &error), ZCP_OK);
    EXPECT(zcp_options_on_connected(options, on_notice, &connected, &error), ZCP_OK);
    EXPECT(zcp_connect(options, &client, &error), ZCP_OK);
    await_done(&connected);
    CHECK(strncmp(connected.text, address, strlen(address)) == 0);
    EXPECT(zcp_endpoint(client, &endpoint, &error), ZCP_OK);
    CHECK(strstr(zcp_value_json(endpoint), connected.text) != NULL);
    zcp_value_free(endpoint);
    CHECK(zcp_close(client) == ZCP_OK);
    CHECK(!warning.is_done);

    EXPECT(zcp_options_set(options, "pins", "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", &error), ZCP_OK);
    EXPECT(zcp_options_on_connected(options, NULL, NULL, &error), ZCP_OK);
    EXPECT(zcp_connect(options, &client, &error), ZCP_TLS);
    CHECK(strstr(warning.text, "is the only pin") != NULL);
    EXPECT(zcp_options_on_warning(options, NULL, NULL, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "system_store", "true", &error), ZCP_OK);
    EXPECT(zcp_connect(options, &client, &error), ZCP_CONFIG); /* two sources of CAs */
    zcp_options_free(options);
    free(pem);
}

static void check_calls(zcp_client *client) {
    zcp_error *error = NULL;
    zcp_value *result = NULL, *params = json("{\"n\":1,\"b\":{\"$bin\":\"00\"}}");
    zcp_call_options options = {0};
    int code;

    options.idempotency_key = "order-7";
    options.traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    EXPECT(zcp_call(client, "echo", params, &options, &result, &error), ZCP_OK);
    CHECK(strstr(zcp_value_json(result), "{\"$bin\":\"00\"}") != NULL);
    zcp_value_free(result);
    result = NULL;
    code = zcp_call(client, "find", NULL, NULL, &result, &error);
    CHECK(strcmp(zcp_value_json(zcp_error_details(error)), "{\"size\":3}") == 0);
    expect(code, ZCP_NOT_FOUND, error);
    CHECK(result == NULL);
    CHECK(zcp_call(client, "find", NULL, NULL, &result, NULL) == ZCP_NOT_FOUND);
    EXPECT(zcp_call(client, "no.such", NULL, NULL, &result, &error), ZCP_UNIMPLEMENTED);
    EXPECT(zcp_call(client, "No Such", NULL, NULL, &result, &error), ZCP_INVALID_ARGUMENT);
    EXPECT(zcp_call(client, NULL, NULL, NULL, &result, &error), ZCP_ARGUMENT);
    EXPECT(zcp_call(client, "echo", params, NULL, NULL, &error), ZCP_ARGUMENT);
    zcp_value_free(params);
    params = json("[1]");
    EXPECT(zcp_call(client, "echo", params, NULL, &result, &error), ZCP_INVALID_ARGUMENT);
    zcp_value_free(params);
    params = json("{\"ms\":60000}");
    options.timeout_ms = 50;
    options.idempotency_key = NULL;
    EXPECT(zcp_call(client, "rest", params, &options, &result, &error), ZCP_DEADLINE_EXCEEDED);
    zcp_value_free(params);
    EXPECT(zcp_session(client, &result, &error), ZCP_OK);
    CHECK(strstr(zcp_value_json(result), "\"user\":\"ada\"") != NULL);
    zcp_value_free(result);
    EXPECT(zcp_open_session(client, &error), ZCP_OK);
    EXPECT(zcp_event(client, 10, &result, &error), ZCP_END);
}

static void on_done(void *data, zcp_value *result, zcp_error *error) {
    record(data, zcp_error_code(error), result == NULL ? NULL : zcp_value_json(result));
    zcp_value_free(result);
    zcp_error_free(error);
}

/* A callback that does what it must not, and closes the client. */
struct closing {
    zcp_client *client;
    struct outcome outcome;
};

static void on_done_close(void *data, zcp_value *result, zcp_error *error) {
    struct closing *closing = data;
    zcp_value *again = NULL;
    int code = zcp_call(closing->client, "echo", NULL, NULL, &again, NULL);
    CHECK(result != NULL && error == NULL && again == NULL);
    zcp_value_free(result);
    CHECK(zcp_close(closing->client) == ZCP_OK);
    record(&closing->outcome, code, NULL);
}

static void check_callbacks(zcp_client *client, const char *key) {
    zcp_error *error = NULL;
    zcp_pending *pending = NULL;
    zcp_value *params = json("{\"n\":1}"), *rest = json("{\"ms\":60000}");
    struct outcome first = {0}, second = {0}, third = {0};
    struct closing closing = {0};
    zcp_client *other;

    EXPECT(zcp_call_start(client, "echo", params, NULL, NULL, &first, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_call_start(client, "echo", params, NULL, on_done, &first, &pending, &error), ZCP_OK);
    await_done(&first);
    CHECK(first.code == ZCP_OK && strcmp(first.text, "{\"n\":1}") == 0);
    zcp_pending_cancel(pending);
    zcp_pending_free(pending);
    EXPECT(zcp_call_start(client, "rest", rest, NULL, on_done, &second, &pending, &error), ZCP_OK);
    zcp_pending_cancel(pending);
    zcp_pending_free(pending);
    await_done(&second);
    CHECK(second.code == ZCP_CANCELLED);

    /* A call that waits when its client is closed. */
    other = connected(options_for("ada", key));
    EXPECT(zcp_call_start(other, "rest", rest, NULL, on_done, &third, NULL, &error), ZCP_OK);
    CHECK(zcp_close(other) == ZCP_OK);
    await_done(&third);
    CHECK(third.code == ZCP_CLOSED);

    closing.client = connected(options_for("ada", key));
    EXPECT(zcp_call_start(closing.client, "echo", params, NULL, on_done_close, &closing, NULL, &error), ZCP_OK);
    await_done(&closing.outcome);
    CHECK(closing.outcome.code == ZCP_ARGUMENT);
    zcp_value_free(params);
    zcp_value_free(rest);
}

static void *cancel_stream(void *data) {
    zcp_stream_cancel(data);
    return NULL;
}

static void check_streams(zcp_client *client) {
    zcp_error *error = NULL;
    zcp_stream *stream = NULL;
    zcp_value *item = NULL, *result = NULL, *params = json("{\"n\":100}");
    zcp_stream_options options = {0};
    int count = 0, code;

    options.timeout_ms = options.item_timeout_ms = 300000;
    options.window_items = 7;
    options.traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    EXPECT(zcp_stream_open(client, "count", params, &options, &stream, &error), ZCP_OK);
    while ((code = zcp_stream_next(stream, &item, &error)) == ZCP_OK) {
        CHECK(atoi(zcp_value_json(item)) == count++);
        zcp_value_free(item);
    }
    expect(code, ZCP_END, error);
    CHECK(count == 100);
    EXPECT(zcp_stream_result(stream, &result, &error), ZCP_OK);
    CHECK(strcmp(zcp_value_json(result), "{\"sent\":100}") == 0);
    zcp_value_free(result);
    zcp_stream_free(stream);

    /* Left early. */
    EXPECT(zcp_stream_open(client, "count", params, NULL, &stream, &error), ZCP_OK);
    EXPECT(zcp_stream_next(stream, &item, &error), ZCP_OK);
    zcp_value_free(item);
    zcp_stream_free(stream);
    zcp_value_free(params);

    EXPECT(zcp_stream_open(client, "total", NULL, NULL, &stream, &error), ZCP_OK);
    for (count = 1; count <= 10; count++) {
        item = json("7");
        EXPECT(zcp_stream_send(stream, item, &error), ZCP_OK);
        zcp_value_free(item);
    }
    EXPECT(zcp_stream_finish(stream, &error), ZCP_OK);
    EXPECT(zcp_stream_result(stream, &result, &error), ZCP_OK);
    CHECK(strcmp(zcp_value_json(result), "70") == 0);
    zcp_value_free(result);
    zcp_stream_free(stream);

    /* Cancelled by another thread. */
    EXPECT(zcp_stream_open(client, "total", NULL, NULL, &stream, &error), ZCP_OK);
    {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, cancel_stream, stream) == 0);
        EXPECT(zcp_stream_next(stream, &item, &error), ZCP_CANCELLED);
        CHECK(pthread_join(thread, NULL) == 0);
    }
    zcp_stream_free(stream);

    EXPECT(zcp_stream_open(client, "no.such", NULL, NULL, &stream, &error), ZCP_OK);
    EXPECT(zcp_stream_next(stream, &item, &error), ZCP_UNIMPLEMENTED);
    zcp_stream_free(stream);
}

static void *answer_later(void *data) {
    zcp_server_call *call = data;
    const char *params = zcp_value_json(zcp_server_call_params(call));
    CHECK(strcmp(zcp_server_call_method(call), "approve") == 0 && strcmp(zcp_server_call_user(call), "ada") == 0);
    if (strstr(params, "yes") != NULL) {
        zcp_value *result = json("true");
        zcp_server_call_reply(call, result);
        zcp_value_free(result);
    } else if (strstr(params, "nil") != NULL) {
        zcp_server_call_reply(call, NULL);
    } else {
        zcp_server_call_fail(call, ZCP_PERMISSION_DENIED, "no");
    }
    return NULL;
}

static void on_call(void *data, zcp_server_call *call) {
    pthread_t thread;
    ++*(int *)data;
    CHECK(pthread_create(&thread, NULL, answer_later, call) == 0);
    CHECK(pthread_detach(thread) == 0);
}

/* A handler without an answer yet when it is removed. */
struct held {
    zcp_client *client;
    zcp_server_call *call;
    struct outcome outcome;
};

static void on_held_call(void *data, zcp_server_call *call) {
    struct held *held = data;
    held->call = call;
    record(&held->outcome, zcp_remove_handler(held->client, "approve", NULL), NULL);
}

static void check_removed_handler(zcp_client *client) {
    zcp_error *error = NULL;
    zcp_value *params = json("{\"method\":\"approve\",\"text\":\"x\"}"), *result = NULL;
    struct held *held = calloc(1, sizeof *held);
    struct outcome answer = {0};

    CHECK(held != NULL);
    held->client = client;
    EXPECT(zcp_handle(client, "approve", on_held_call, held, &error), ZCP_OK); /* replaces the other one */
    EXPECT(zcp_call_start(client, "ask", params, NULL, on_done, &answer, NULL, &error), ZCP_OK);
    await_done(&held->outcome);
    CHECK(held->outcome.code == ZCP_ARGUMENT); /* in a callback */
    EXPECT(zcp_remove_handler(client, "approve", &error), ZCP_OK);
    zcp_server_call_fail(held->call, ZCP_NOT_FOUND, NULL);
    free(held); /* the handler does not run any more */
    await_done(&answer);
    CHECK(answer.code == ZCP_OK && strcmp(answer.text, "\"NOT_FOUND\"") == 0);
    EXPECT(zcp_call(client, "ask", params, NULL, &result, &error), ZCP_OK);
    CHECK(strcmp(zcp_value_json(result), "\"UNAVAILABLE\"") == 0);
    zcp_value_free(params);
    zcp_value_free(result);
}

static void check_server_calls(zcp_client *client) {
    static const char *const cases[][2] = {
        {"{\"method\":\"approve\",\"text\":\"yes\"}", "true"},
        {"{\"method\":\"approve\",\"text\":\"nil\"}", "null"},
        {"{\"method\":\"approve\",\"text\":\"no\"}", "\"PERMISSION_DENIED\""},
    };
    zcp_error *error = NULL;
    int count = 0;

    EXPECT(zcp_handle(client, "approve", NULL, NULL, &error), ZCP_ARGUMENT);
    EXPECT(zcp_handle(client, "approve", on_call, &count, &error), ZCP_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        zcp_value *params = json(cases[i][0]), *result = NULL;
        EXPECT(zcp_call(client, "ask", params, NULL, &result, &error), ZCP_OK);
        CHECK(strcmp(zcp_value_json(result), cases[i][1]) == 0);
        zcp_value_free(params);
        zcp_value_free(result);
    }
    CHECK(count == 3);
    check_removed_handler(client);
}

static void *call_often(void *data) {
    for (int i = 0; i < CALLS; i++) {
        zcp_value *params = json("{\"n\":1}"), *result = NULL;
        zcp_error *error = NULL;
        EXPECT(zcp_call(data, "echo", params, NULL, &result, &error), ZCP_OK);
        CHECK(strcmp(zcp_value_json(result), "{\"n\":1}") == 0);
        zcp_value_free(params);
        zcp_value_free(result);
    }
    return NULL;
}

static void check_threads(zcp_client *client) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, call_often, client) == 0);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

/* A thread in zcp_call, whose method calls a handler of the same client. */
struct waiting {
    zcp_client *client;
    zcp_server_call *call;
    struct outcome asked, ended;
};

static void on_asked(void *data, zcp_server_call *call) {
    struct waiting *waiting = data;
    waiting->call = call;
    record(&waiting->asked, ZCP_OK, NULL);
}

static void *call_and_wait(void *data) {
    struct waiting *waiting = data;
    zcp_value *result = NULL;
    record(&waiting->ended, zcp_call(waiting->client, "hold", NULL, NULL, &result, NULL), NULL);
    return NULL;
}

static void check_close_while_a_thread_waits(const char *key) {
    struct waiting waiting = {.client = connected(options_for("ada", key))};
    zcp_error *error = NULL;
    pthread_t thread;
    EXPECT(zcp_handle(waiting.client, "hold", on_asked, &waiting, &error), ZCP_OK);
    CHECK(pthread_create(&thread, NULL, call_and_wait, &waiting) == 0);
    await_done(&waiting.asked); /* so the thread is in zcp_call */
    CHECK(zcp_close(waiting.client) == ZCP_OK);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(waiting.ended.code == ZCP_CLOSED);
    zcp_server_call_reply(waiting.call, NULL);
}

static void check_users(zcp_client *client, const char *key) {
    zcp_error *error = NULL;
    zcp_client *session = NULL;
    zcp_value *result = NULL;
    zcp_options *options = options_for(NULL, NULL);
    EXPECT(zcp_session_for(client, options, &session, &error), ZCP_ARGUMENT);
    zcp_options_free(options);
    options = options_for("bob", key);
    EXPECT(zcp_session_for(client, options, &session, &error), ZCP_OK);
    zcp_options_free(options);
    EXPECT(zcp_session(session, &result, &error), ZCP_OK);
    CHECK(strstr(zcp_value_json(result), "\"user\":\"bob\"") != NULL);
    zcp_value_free(result);
    CHECK(zcp_close(session) == ZCP_OK);
}

/* The API key as a scheme of an application. */
static zcp_value *log_in(void *data) {
    char text[256];
    CHECK((size_t)snprintf(text, sizeof text, "{\"scheme\":\"api_key\",\"user\":\"ada\",\"key\":\"%s\"}", (char *)data)
          < sizeof text);
    return json(text);
}

static zcp_value *log_in_later(void *data) {
    ++*(int *)data;
    return NULL;
}

static void check_logins(char *key) {
    zcp_error *error = NULL;
    zcp_client *client;
    zcp_options *options = options_for(NULL, NULL);
    int count = 0;

    EXPECT(zcp_options_set_login(options, log_in_later, &count, &error), ZCP_OK);
    refused(options, ZCP_UNKNOWN);
    CHECK(count == 1);
    options = options_for("ada", key);
    EXPECT(zcp_options_set_login(options, log_in, key, &error), ZCP_OK);
    refused(options, ZCP_ARGUMENT); /* two kinds of credentials */
    options = options_for(NULL, NULL);
    EXPECT(zcp_options_set_login(options, log_in, key, &error), ZCP_OK);
    client = connected(options);
    zcp_cut(client);
    check_calls(client);
    CHECK(zcp_close(client) == ZCP_OK);
}

static void check_devices(const char *code) {
    zcp_error *error = NULL;
    zcp_value *user = NULL;
    zcp_options *options;
    zcp_client *client;
    char file[512], name[32];

    snprintf(name, sizeof name, "laptop-%ld", (long)getpid());
    CHECK((size_t)snprintf(file, sizeof file, "%s/laptop.key", home) < sizeof file);
    EXPECT(zcp_device_create(file, &error), ZCP_OK);
    EXPECT(zcp_device_create(file, &error), ZCP_CERTIFICATE); /* it exists */
    options = options_for(NULL, NULL);
    EXPECT(zcp_enroll(options, "0000-0000", file, name, &user, &error), ZCP_UNAUTHENTICATED);
    EXPECT(zcp_enroll(options, code, file, name, &user, &error), ZCP_OK);
    CHECK(strcmp(zcp_value_json(user), "\"ada\"") == 0);
    zcp_value_free(user);
    EXPECT(zcp_options_set(options, "device", file, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "device_name", name, &error), ZCP_OK);
    client = connected(options);
    check_calls(client);
    CHECK(zcp_close(client) == ZCP_OK);
}

int main(int count, char **arguments) {
    zcp_client *client;
    if (count != 7)
        return 2;
    address = arguments[1];
    ca_file = arguments[2];
    home = arguments[6];
    check_values();
    check_nothing();
    check_version();
    check_options(arguments[3]);
    check_trust_and_notices(arguments[3]);
    client = connected(options_for("ada", arguments[3]));
    check_calls(client);
    check_streams(client);
    check_server_calls(client);
    check_threads(client);
    check_close_while_a_thread_waits(arguments[3]);
    check_users(client, arguments[4]);
    check_callbacks(client, arguments[3]);
    CHECK(zcp_close(client) == ZCP_OK);
    check_logins(arguments[3]);
    check_devices(arguments[5]);
    puts("all");
    return 0;
}
