/* A client with wolfSSL: welcome PORT NAME [CA file]. It writes the first bytes that the server sends.
   Exits with 3 if the server's certificate is refused. */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <wolfssl/options.h>
#include <wolfssl/ssl.h>

int main(int argc, char **argv)
{
    char protocols[] = "zcp/1", text[80];
    struct sockaddr_in address = {.sin_family = AF_INET};
    unsigned char start[8];
    int size = 0;

    if (argc < 3)
        return 2;
    wolfSSL_Init();
    WOLFSSL_CTX *context = wolfSSL_CTX_new(wolfTLSv1_3_client_method());
    int error = argc > 3 ? wolfSSL_CTX_load_verify_locations(context, argv[3], NULL) : WOLFSSL_SUCCESS;
    if (error != WOLFSSL_SUCCESS) {
        fprintf(stderr, "CA file: %s\n", wolfSSL_ERR_error_string((unsigned long) error, text));
        return 4;
    }
    wolfSSL_CTX_set_verify(context, WOLFSSL_VERIFY_PEER, NULL);
    int raw = socket(AF_INET, SOCK_STREAM, 0);
    address.sin_port = htons((unsigned short) atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(raw, (struct sockaddr *) &address, sizeof address) != 0)
        return 2;
    WOLFSSL *tls = wolfSSL_new(context);
    wolfSSL_set_fd(tls, raw);
    wolfSSL_UseALPN(tls, protocols, sizeof protocols - 1, WOLFSSL_ALPN_FAILED_ON_MISMATCH);
    wolfSSL_check_domain_name(tls, argv[2]);
    if (wolfSSL_connect(tls) != WOLFSSL_SUCCESS) {
        error = wolfSSL_get_error(tls, 0);
        fprintf(stderr, "handshake: %s\n", wolfSSL_ERR_error_string((unsigned long) error, text));
        return 3;
    }
    while (size < (int) sizeof start) {
        int read = wolfSSL_read(tls, start + size, (int) sizeof start - size);
        if (read <= 0)
            return 2;
        size += read;
    }
    fwrite(start, 1, sizeof start, stdout);
    return 0;
}
