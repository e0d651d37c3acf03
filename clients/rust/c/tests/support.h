/* What all.c checks with: outcomes of callbacks, codes of errors, and clients of the server. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "zcproto.h"

/* No call waits for it: a busy machine, and valgrind, may take long. */
#define TIMEOUT_MS "300000"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

static const char *address, *ca_file, *home;

/* What callbacks have received. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

struct outcome {
    int is_done;
    int code;
    char text[256];
};

static void record(struct outcome *outcome, int code, const char *text) {
    pthread_mutex_lock(&lock);
    CHECK(!outcome->is_done);
    outcome->is_done = 1;
    outcome->code = code;
    snprintf(outcome->text, sizeof outcome->text, "%s", text == NULL ? "" : text);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void await_done(struct outcome *outcome) {
    pthread_mutex_lock(&lock);
    while (!outcome->is_done)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* Check the code of an error, its name and message, and free it. */
static void expect(int code, int wanted, zcp_error *error) {
    if (code != wanted) {
        fprintf(stderr, "code %d instead of %d: %s\n", code, wanted, error == NULL ? "" : zcp_error_message(error));
        exit(1);
    }
    CHECK(zcp_error_code(error) == wanted);
    CHECK(zcp_code_name(code) != NULL);
    CHECK((error == NULL) == (wanted == ZCP_OK));
    CHECK(error == NULL || strlen(zcp_error_message(error)) > 0);
    zcp_error_free(error);
}

/* Check the code of a function that stores its error in `error`. */
#define EXPECT(call, wanted) \
    do { \
        int code_of_call = (call); \
        expect(code_of_call, wanted, error); \
        error = NULL; \
    } while (0)

static zcp_value *json(const char *text) {
    zcp_value *value = NULL;
    zcp_error *error = NULL;
    EXPECT(zcp_value_from_json(text, &value, &error), ZCP_OK);
    return value;
}

static zcp_options *options_for(const char *user, const char *key) {
    zcp_options *options = NULL;
    zcp_error *error = NULL;
    EXPECT(zcp_options_new(address, &options, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "connect_timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "ca_file", ca_file, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "home", home, &error), ZCP_OK);
    if (user != NULL) {
        EXPECT(zcp_options_set(options, "user", user, &error), ZCP_OK);
        EXPECT(zcp_options_set(options, "key", key, &error), ZCP_OK);
    }
    return options;
}

static zcp_client *connected(zcp_options *options) {
    zcp_client *client = NULL;
    zcp_error *error = NULL;
    EXPECT(zcp_connect(options, &client, &error), ZCP_OK);
    zcp_options_free(options);
    return client;
}

static void refused(zcp_options *options, int wanted) {
    zcp_client *client = NULL;
    zcp_error *error = NULL;
    int code = zcp_connect(options, &client, &error);
    expect(code, wanted, error);
    CHECK(client == NULL);
    zcp_options_free(options);
}

#endif
