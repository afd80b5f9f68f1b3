/* The inside of a connection. Private to stream_*.c. */
#ifndef WARMSYNC_STREAM_CONN_H
#define WARMSYNC_STREAM_CONN_H

#include "stream_impl.h"

#include <openssl/ssl.h>

struct ws_conn {
    int fd;
    SSL *ssl; /* NULL: in the clear */
    SSL_CTX *context;
    unsigned patience_seconds;
    _Atomic bool cut;
    /* For the handshake's callbacks. */
    struct ws_tokens *tokens;
    enum ws_token_verdict verdict;
    uint8_t token[WS_TOKEN_BYTES];
};

/* Shake hands, as a client (`token` is set) or as a server (`tokens` is). Non-blocking socket. */
int ws_tls_open(struct ws_conn *conn, bool server, bool ktls, uint64_t deadline_ns,
                struct ws_loss *loss);
void ws_tls_free(struct ws_conn *conn);
int ws_tls_send(struct ws_conn *conn, const void *data, size_t size, struct ws_loss *loss);
int ws_tls_flush(struct ws_conn *conn, struct ws_loss *loss);
/* Bytes received, 0 at the end of the stream, or -1. */
ssize_t ws_tls_receive(struct ws_conn *conn, void *data, size_t size, struct ws_loss *loss);

/* Wait for an event of poll(2) until the deadline. 0, or -1 with `loss`. */
int ws_conn_await(struct ws_conn *conn, short events, uint64_t deadline_ns, struct ws_loss *loss);

const char *ws_token_complaint(enum ws_token_verdict verdict);

#endif
