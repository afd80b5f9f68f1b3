/* TLS 1.3 with a pre-shared key: the one-time token that the target gave to the source over gRPC,
 * which knew both by their certificates. So both ends are proven by the handshake, no certificate
 * is looked at again, and who has no token gets no further than the ClientHello (RFC 8446, 2.2).
 * The key exchange is still ephemeral: a token that leaks later opens nothing (psk_dhe_ke, 4.2.9).
 */
#include "stream_conn.h"

#include <errno.h>
#include <openssl/err.h>
#include <poll.h>
#include <string.h>

/* AES first: it has instructions of its own. Both hash with SHA-256, as the key asks for. */
#define CIPHERS "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
/* Records of 16 KiB written in one system call. They are read one by one: OpenSSL 3.0 moves all
 * that it has read ahead to the front of its buffer before each record (ssl3_read_n). */
#define WRITE_BYTES (64 << 10)

static const unsigned char AES_128_GCM[] = {0x13, 0x01};

static SSL_SESSION *make_session(SSL *ssl, const uint8_t *secret) {
    SSL_SESSION *session = SSL_SESSION_new();
    if (session != NULL && SSL_SESSION_set1_master_key(session, secret, WS_TOKEN_SECRET_BYTES) &&
        SSL_SESSION_set_cipher(session, SSL_CIPHER_find(ssl, AES_128_GCM)) &&
        SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION))
        return session;
    SSL_SESSION_free(session);
    return NULL;
}

/* Server: the key of this identity, if it is a token that was handed out and not used. */
static int find_key(SSL *ssl, const unsigned char *identity, size_t size, SSL_SESSION **session) {
    struct ws_conn *conn = SSL_get_app_data(ssl);
    *session = NULL;
    if (size != WS_TOKEN_ID_BYTES)
        return 1;
    conn->verdict = ws_tokens_spend(conn->tokens, identity, conn->token + WS_TOKEN_ID_BYTES);
    if (conn->verdict != WS_TOKEN_GOOD)
        return 1;
    memcpy(conn->token, identity, WS_TOKEN_ID_BYTES);
    *session = make_session(ssl, conn->token + WS_TOKEN_ID_BYTES);
    return *session != NULL;
}

/* Client: always the same key, for any hash (called again after a HelloRetryRequest). */
static int use_key(SSL *ssl, const EVP_MD *md, const unsigned char **identity, size_t *size,
                   SSL_SESSION **session) {
    struct ws_conn *conn = SSL_get_app_data(ssl);
    (void)md;
    *identity = conn->token;
    *size = WS_TOKEN_ID_BYTES;
    *session = make_session(ssl, conn->token + WS_TOKEN_ID_BYTES);
    return *session != NULL;
}

static SSL_CTX *make_context(bool server, bool ktls) {
    SSL_CTX *context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
    if (context == NULL)
        return NULL;
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context, CIPHERS);
    /* No tickets: each token is for one connection, and the target may not speak out of turn. */
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | (ktls ? SSL_OP_ENABLE_KTLS : 0));
    SSL_CTX_set_mode(context, SSL_MODE_AUTO_RETRY);
    /* A server without a certificate can only agree on a pre-shared key; a client that trusts no
     * authority takes nothing else either. */
    SSL_CTX_set_verify(context, server ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, NULL);
    if (server)
        SSL_CTX_set_psk_find_session_callback(context, find_key);
    else
        SSL_CTX_set_psk_use_session_callback(context, use_key);
    return context;
}

static int handshake_failed(struct ws_conn *conn, bool server, struct ws_loss *loss) {
    unsigned long code = ERR_get_error();
    ERR_clear_error();
    if (server && ERR_GET_REASON(code) != SSL_R_WRONG_VERSION_NUMBER &&
        ERR_GET_REASON(code) != SSL_R_HTTP_REQUEST && conn->verdict != WS_TOKEN_GOOD && code != 0)
        return ws_lose(loss, 0, ws_token_complaint(conn->verdict));
    const char *reason = code == 0 ? "it hung up" : ERR_reason_error_string(code);
    char text[160];
    snprintf(text, sizeof(text), "no TLS could be agreed on: %s",
             reason == NULL ? "unknown reason" : reason);
    return ws_lose(loss, 0, text);
}

int ws_tls_open(struct ws_conn *conn, bool server, bool ktls, uint64_t deadline_ns,
                struct ws_loss *loss) {
    ERR_clear_error();
    conn->context = make_context(server, ktls);
    conn->ssl = conn->context == NULL ? NULL : SSL_new(conn->context);
    if (conn->ssl == NULL || SSL_set_fd(conn->ssl, conn->fd) != 1)
        return ws_lose(loss, ENOMEM, "TLS cannot be set up");
    SSL_set_app_data(conn->ssl, conn);
    if (server)
        SSL_set_accept_state(conn->ssl);
    else
        SSL_set_connect_state(conn->ssl);
    for (;;) {
        int rc = SSL_do_handshake(conn->ssl);
        if (rc == 1)
            break;
        int error = SSL_get_error(conn->ssl, rc);
        if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
            return handshake_failed(conn, server, loss);
        if (ws_conn_await(conn, error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, deadline_ns,
                          loss) != 0)
            return -1;
    }
    /* A session counts as resumed when the pre-shared key was used. */
    if (!SSL_session_reused(conn->ssl))
        return ws_lose(loss, 0, "no TLS could be agreed on: the token was not used");
    if (BIO_get_ktls_send(SSL_get_wbio(conn->ssl)) <= 0) {
        BIO *buffer = BIO_new(BIO_f_buffer());
        if (buffer == NULL || BIO_set_write_buffer_size(buffer, WRITE_BYTES) != 1) {
            BIO_free(buffer);
            return ws_lose(loss, ENOMEM, "TLS cannot be set up");
        }
        BIO *socket = SSL_get_wbio(conn->ssl);
        BIO_up_ref(socket);
        SSL_set0_wbio(conn->ssl, BIO_push(buffer, socket));
    }
    return 0;
}

void ws_tls_free(struct ws_conn *conn) {
    SSL_free(conn->ssl);
    SSL_CTX_free(conn->context);
}

static int failed(struct ws_conn *conn, int rc, const char *what, struct ws_loss *loss) {
    int saved = errno, error = SSL_get_error(conn->ssl, rc);
    unsigned long code = ERR_get_error();
    ERR_clear_error();
    if (error == SSL_ERROR_WANT_WRITE || error == SSL_ERROR_WANT_READ) {
        loss->error = EAGAIN;
        return -1;
    }
    if (error == SSL_ERROR_SYSCALL || code == 0)
        return ws_lose(loss, saved, what);
    char text[160];
    const char *reason = ERR_reason_error_string(code);
    snprintf(text, sizeof(text), "%s: %s", what, reason == NULL ? "unknown reason" : reason);
    return ws_lose(loss, EPROTO, text);
}

int ws_tls_send(struct ws_conn *conn, const void *data, size_t size, struct ws_loss *loss) {
    size_t sent = 0;
    ERR_clear_error();
    int rc = SSL_write_ex(conn->ssl, data, size, &sent);
    return rc == 1 && sent == size ? 0 : failed(conn, rc, "sending failed", loss);
}

int ws_tls_flush(struct ws_conn *conn, struct ws_loss *loss) {
    BIO *out = SSL_get_wbio(conn->ssl);
    while (BIO_flush(out) <= 0) {
        if (!BIO_should_retry(out) || conn->cut)
            return ws_lose(loss, errno, "sending failed");
        /* The greeting's socket does not block; later this means that patience has ended. */
        if (conn->patience_seconds != 0) {
            loss->error = EAGAIN;
            return -1;
        }
        if (ws_conn_await(conn, POLLOUT, ws_now_ns() + 5000000000u, loss) != 0)
            return -1;
    }
    return 0;
}

ssize_t ws_tls_receive(struct ws_conn *conn, void *data, size_t size, struct ws_loss *loss) {
    size_t received = 0;
    ERR_clear_error();
    int rc = SSL_read_ex(conn->ssl, data, size, &received);
    if (rc == 1)
        return (ssize_t)received;
    int error = SSL_get_error(conn->ssl, rc);
    if (error == SSL_ERROR_ZERO_RETURN ||
        (error == SSL_ERROR_SSL &&
         ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING)) {
        ERR_clear_error();
        return 0;
    }
    return failed(conn, rc, "receiving failed", loss);
}
