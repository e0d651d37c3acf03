/* Close sessions together, and then nothing.
 *
 *     close HOST:PORT HOME SESSIONS
 */
#include <stdio.h>
#include <stdlib.h>
#include "support.h"
#include "zcproto.h"

int main(int count, char **arguments) {
    zcp_error *error = NULL;
    zcp_options *options = NULL;
    zcp_client *clients[65] = {NULL};
    size_t sessions;
    if (count != 4)
        return 2;
    sessions = (size_t)atoi(arguments[3]);
    CHECK(sessions < 64); /* and NULL */
    EXPECT(zcp_options_new(arguments[1], &options, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "home", arguments[2], &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "connect_timeout_ms", TIMEOUT_MS, &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "verify", "false", &error), ZCP_OK);
    EXPECT(zcp_connect(options, &clients[0], &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "user", "ada", &error), ZCP_OK);
    EXPECT(zcp_options_set(options, "key", "key", &error), ZCP_OK);
    for (size_t i = 1; i <= sessions; i++)
        EXPECT(zcp_session_for(clients[0], options, &clients[i], &error), ZCP_OK);
    zcp_options_free(options);
    CHECK(zcp_close_all(clients, sessions + 2) == ZCP_OK);
    CHECK(zcp_close_all(NULL, 1) == ZCP_OK && zcp_close_all(clients, 0) == ZCP_OK);
    puts("closed");
    return 0;
}
