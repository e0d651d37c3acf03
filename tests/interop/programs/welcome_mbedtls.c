/* A client with Mbed TLS: welcome PORT NAME [CA file]. It writes the first bytes that the server sends.
   Exits with 3 if the server's certificate is refused. */

#include <stdio.h>
#include <stdlib.h>

#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/error.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>
#include <psa/crypto.h>

static void fail(const char *what, int error, int code)
{
    char text[200];
    mbedtls_strerror(error, text, sizeof text);
    fprintf(stderr, "%s: %s\n", what, text);
    exit(code);
}

int main(int argc, char **argv)
{
    const char *protocols[] = {"zcp/1", NULL};
    char problem[400];
    unsigned char start[8];
    size_t size = 0;
    mbedtls_net_context net;
    mbedtls_entropy_context entropy;
    mbedtls_ctr_drbg_context random;
    mbedtls_ssl_config config;
    mbedtls_ssl_context tls;
    mbedtls_x509_crt ca;
    int error;

    if (argc < 3)
        return 2;
    mbedtls_net_init(&net);
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&random);
    mbedtls_ssl_config_init(&config);
    mbedtls_ssl_init(&tls);
    mbedtls_x509_crt_init(&ca);
    if (psa_crypto_init() != PSA_SUCCESS)
        return 2;
    if ((error = mbedtls_ctr_drbg_seed(&random, mbedtls_entropy_func, &entropy, NULL, 0)) != 0)
        fail("random", error, 2);
    if (argc > 3 && (error = mbedtls_x509_crt_parse_file(&ca, argv[3])) != 0)
        fail("CA file", error, 4);
    if ((error = mbedtls_net_connect(&net, "127.0.0.1", argv[1], MBEDTLS_NET_PROTO_TCP)) != 0)
        fail("connect", error, 2);
    if ((error = mbedtls_ssl_config_defaults(&config, MBEDTLS_SSL_IS_CLIENT, MBEDTLS_SSL_TRANSPORT_STREAM,
                                             MBEDTLS_SSL_PRESET_DEFAULT)) != 0)
        fail("defaults", error, 2);
    mbedtls_ssl_conf_min_tls_version(&config, MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_ca_chain(&config, &ca, NULL);
    mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &random);
    if ((error = mbedtls_ssl_conf_alpn_protocols(&config, protocols)) != 0
        || (error = mbedtls_ssl_setup(&tls, &config)) != 0
        || (error = mbedtls_ssl_set_hostname(&tls, argv[2])) != 0)
        fail("setup", error, 2);
    mbedtls_ssl_set_bio(&tls, &net, mbedtls_net_send, mbedtls_net_recv, NULL);
    if ((error = mbedtls_ssl_handshake(&tls)) != 0) {
        unsigned flags = mbedtls_ssl_get_verify_result(&tls);
        if (flags == 0 || flags == (unsigned) -1)
            fail("handshake", error, 2);
        mbedtls_x509_crt_verify_info(problem, sizeof problem, "", flags);
        fputs(problem, stderr);
        return 3;
    }
    while (size < sizeof start) {
        error = mbedtls_ssl_read(&tls, start + size, sizeof start - size);
        if (error == MBEDTLS_ERR_SSL_RECEIVED_NEW_SESSION_TICKET)
            continue;
        if (error <= 0)
            fail("read", error, 2);
        size += (size_t) error;
    }
    fwrite(start, 1, sizeof start, stdout);
    return 0;
}
