/* ask.c: call the method `echo` of a server, then again with a callback.
 *
 *     ask HOST:PORT CA_FILE USER KEY
 */
#include <stdio.h>
#include <stdlib.h>
#include <pthread.h>
#include "zcproto.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* Print an error, free it, and end the program. */
static void fail(const char *what, zcp_error *error) {
    fprintf(stderr, "%s: %s: %s\n", what, zcp_code_name(zcp_error_code(error)), zcp_error_message(error));
    zcp_error_free(error);
    exit(1);
}

/* Runs in a thread of the library. */
static void on_done(void *data, zcp_value *result, zcp_error *error) {
    if (error != NULL)
        fail("callback", error);
    printf("%s\n", zcp_value_json(result));
    zcp_value_free(result);
    pthread_mutex_lock(&lock);
    *(int *)data = 1;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

int main(int count, char **arguments) {
    zcp_error *error = NULL;
    zcp_options *options = NULL;
    zcp_client *client = NULL;
    zcp_value *params = NULL, *result = NULL;
    int is_done = 0;

    if (count != 5) {
        fprintf(stderr, "usage: %s HOST:PORT CA_FILE USER KEY\n", arguments[0]);
        return 2;
    }
    if (zcp_options_new(arguments[1], &options, &error) || zcp_options_set(options, "ca_file", arguments[2], &error)
        || zcp_options_set(options, "user", arguments[3], &error) || zcp_options_set(options, "key", arguments[4], &error))
        fail("options", error);
    if (zcp_connect(options, &client, &error))
        fail("connect", error);
    zcp_options_free(options);

    if (zcp_value_from_json("{\"word\": \"hello\"}", &params, &error) || zcp_call(client, "echo", params, NULL, &result, &error))
        fail("echo", error);
    printf("%s\n", zcp_value_json(result));
    zcp_value_free(result);

    if (zcp_call_start(client, "echo", params, NULL, on_done, &is_done, NULL, &error))
        fail("echo", error);
    zcp_value_free(params);
    pthread_mutex_lock(&lock);
    while (!is_done)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);

    zcp_close(client);
    return 0;
}
