/* Connections: the socket, the greeting, sending and receiving. TLS is in stream_tls.c. */
#define _GNU_SOURCE
#include "stream_conn.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define GREETING_VERSION 1u
#define PARTS_AT_ONCE 1024u /* IOV_MAX */
/* What waits unsent in the kernel cannot be paused any more; this is 2.6 ms at 100 MB/s. */
#define UNSENT_BYTES (256 << 10)

struct hello {
    char magic[4]; /* "WSH1" */
    uint32_t version;
    uint8_t token[WS_TOKEN_BYTES];
};

struct welcome {
    char magic[4]; /* "WSW1" */
    uint32_t version;
};

int ws_lose(struct ws_loss *loss, int error, const char *text) {
    loss->error = error;
    if (error != 0)
        snprintf(loss->text, sizeof(loss->text), "%s (%s)", text, strerror(error));
    else
        snprintf(loss->text, sizeof(loss->text), "%s", text);
    return -1;
}

const char *ws_token_complaint(enum ws_token_verdict verdict) {
    switch (verdict) {
    case WS_TOKEN_USED:
        return "its token has been used before";
    case WS_TOKEN_EXPIRED:
        return "its token has expired";
    default:
        return "it has no valid token";
    }
}

static void set_option(int fd, int level, int name, int value) {
    /* Not for unix sockets, and none of them is needed for the bytes to be right. */
    (void)setsockopt(fd, level, name, &value, sizeof(value));
}

struct ws_conn *ws_conn_new(int fd) {
    struct ws_conn *conn = calloc(1, sizeof(*conn));
    if (conn == NULL) {
        close(fd);
        return NULL;
    }
    conn->fd = fd;
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES);
    /* A peer that vanished without a word is noticed within 10 + 4 * 5 s, idle or not (tcp(7)). */
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
    set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30000);
    return conn;
}

void ws_conn_free(struct ws_conn *conn) {
    if (conn == NULL)
        return;
    ws_tls_free(conn);
    close(conn->fd);
    explicit_bzero(conn->token, sizeof(conn->token));
    free(conn);
}

void ws_conn_cut(struct ws_conn *conn) {
    conn->cut = true;
    shutdown(conn->fd, SHUT_RDWR);
}

int ws_conn_await(struct ws_conn *conn, short events, uint64_t deadline_ns, struct ws_loss *loss) {
    struct pollfd one = {conn->fd, events, 0};
    for (;;) {
        uint64_t now = ws_now_ns();
        if (now >= deadline_ns)
            return ws_lose(loss, ETIMEDOUT, "it did not greet in time");
        int ready = poll(&one, 1, (int)((deadline_ns - now) / 1000000) + 1);
        if (ready > 0)
            return 0;
        if (ready < 0 && errno != EINTR)
            return ws_lose(loss, errno, "the connection failed");
    }
}

/* Send or receive a part of the greeting: on a socket that does not block, within the deadline. */
static int greet(struct ws_conn *conn, bool sending, void *data, size_t size, uint64_t deadline_ns,
                 struct ws_loss *loss) {
    for (size_t done = 0; done < size;) {
        char *at = (char *)data + done;
        ssize_t some;
        bool again = false;
        if (conn->ssl != NULL) {
            size_t moved = 0;
            int rc = sending ? SSL_write_ex(conn->ssl, at, size - done, &moved)
                             : SSL_read_ex(conn->ssl, at, size - done, &moved);
            int error = rc == 1 ? SSL_ERROR_NONE : SSL_get_error(conn->ssl, rc);
            again = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
            some = rc == 1 ? (ssize_t)moved : error == SSL_ERROR_ZERO_RETURN ? 0 : -1;
        } else {
            some = sending ? send(conn->fd, at, size - done, MSG_NOSIGNAL)
                           : recv(conn->fd, at, size - done, 0);
            again = some < 0 && (errno == EAGAIN || errno == EINTR);
        }
        if (some > 0)
            done += (size_t)some;
        else if (!again)
            return ws_lose(loss, some == 0 || conn->ssl != NULL ? 0 : errno,
                           "it hung up during the greeting");
        else if (ws_conn_await(conn, sending ? POLLOUT : POLLIN, deadline_ns, loss) != 0)
            return -1;
    }
    return sending && conn->ssl != NULL ? ws_tls_flush(conn, loss) : 0;
}

static void set_blocking(int fd, bool blocking) {
    int flags = fcntl(fd, F_GETFL);
    (void)fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

static uint64_t deadline_in(unsigned timeout_ms) {
    return ws_now_ns() + (uint64_t)timeout_ms * 1000000u;
}

int ws_conn_open(struct ws_conn *conn, const uint8_t token[WS_TOKEN_BYTES], bool tls, bool ktls,
                 unsigned timeout_ms, struct ws_loss *loss) {
    uint64_t deadline = deadline_in(timeout_ms);
    struct hello hello = {"WSH1", GREETING_VERSION, {0}};
    struct welcome welcome;
    memcpy(hello.token, token, WS_TOKEN_BYTES);
    memcpy(conn->token, token, WS_TOKEN_BYTES);
    set_blocking(conn->fd, false);
    int rc = tls ? ws_tls_open(conn, false, ktls, deadline, loss) : 0;
    if (rc == 0)
        rc = greet(conn, true, &hello, sizeof(hello), deadline, loss);
    if (rc == 0)
        rc = greet(conn, false, &welcome, sizeof(welcome), deadline, loss);
    explicit_bzero(&hello, sizeof(hello));
    explicit_bzero(conn->token, sizeof(conn->token));
    if (rc == 0 && (memcmp(welcome.magic, "WSW1", 4) != 0 || welcome.version != GREETING_VERSION))
        rc = ws_lose(loss, EPROTO, "its answer to the greeting is not warmsync's");
    set_blocking(conn->fd, true);
    return rc;
}

/* In the clear the hello spends the token; under TLS the handshake has done so. */
static int check_hello(struct ws_conn *conn, const struct hello *hello, struct ws_loss *loss) {
    if (memcmp(hello->magic, "WSH1", 4) != 0)
        return ws_lose(loss, 0,
                       hello->magic[0] == 0x16 ? "it speaks TLS and this agent does not"
                                               : "its greeting is not warmsync's");
    if (hello->version != GREETING_VERSION)
        return ws_lose(loss, 0, "it greets in another version of the protocol");
    if (conn->ssl == NULL) {
        memcpy(conn->token, hello->token, WS_TOKEN_ID_BYTES);
        conn->verdict = ws_tokens_spend(conn->tokens, conn->token, conn->token + WS_TOKEN_ID_BYTES);
    }
    if (conn->verdict != WS_TOKEN_GOOD)
        return ws_lose(loss, 0, ws_token_complaint(conn->verdict));
    if (CRYPTO_memcmp(hello->token, conn->token, WS_TOKEN_BYTES) != 0)
        return ws_lose(loss, 0, ws_token_complaint(WS_TOKEN_UNKNOWN));
    return 0;
}

int ws_conn_accept(struct ws_conn *conn, struct ws_tokens *tokens, bool tls, bool ktls,
                   unsigned timeout_ms, uint8_t id[WS_TOKEN_ID_BYTES], struct ws_loss *loss) {
    uint64_t deadline = deadline_in(timeout_ms);
    struct hello hello;
    struct welcome welcome = {"WSW1", GREETING_VERSION};
    conn->tokens = tokens;
    conn->verdict = WS_TOKEN_UNKNOWN;
    set_blocking(conn->fd, false);
    int rc = tls ? ws_tls_open(conn, true, ktls, deadline, loss) : 0;
    if (rc == 0)
        rc = greet(conn, false, &hello, sizeof(hello.magic), deadline, loss);
    /* Whatever else this is, it may not have the rest of a hello to send. */
    if (rc == 0 && memcmp(hello.magic, "WSH1", 4) != 0)
        rc = check_hello(conn, &hello, loss);
    if (rc == 0)
        rc =
            greet(conn, false, &hello.version, sizeof(hello) - sizeof(hello.magic), deadline, loss);
    if (rc == 0)
        rc = check_hello(conn, &hello, loss);
    if (rc == 0)
        rc = greet(conn, true, &welcome, sizeof(welcome), deadline, loss);
    memcpy(id, conn->token, WS_TOKEN_ID_BYTES);
    explicit_bzero(&hello, sizeof(hello));
    explicit_bzero(conn->token, sizeof(conn->token));
    conn->tokens = NULL;
    set_blocking(conn->fd, true);
    return rc;
}

void ws_conn_set_patience(struct ws_conn *conn, unsigned send_seconds, unsigned receive_seconds) {
    struct timeval sending = {(time_t)send_seconds, 0}, receiving = {(time_t)receive_seconds, 0};
    conn->patience_seconds = send_seconds;
    (void)setsockopt(conn->fd, SOL_SOCKET, SO_SNDTIMEO, &sending, sizeof(sending));
    (void)setsockopt(conn->fd, SOL_SOCKET, SO_RCVTIMEO, &receiving, sizeof(receiving));
}

static int send_failed(struct ws_conn *conn, int error, struct ws_loss *loss) {
    if (conn->cut)
        return ws_lose(loss, ECANCELED, "the connection was ended here");
    if (error != EAGAIN)
        return ws_lose(loss, error, "sending failed");
    char text[80];
    snprintf(text, sizeof(text), "it took nothing for %u s", conn->patience_seconds);
    return ws_lose(loss, ETIMEDOUT, text);
}

static int send_clear(struct ws_conn *conn, const struct iovec *parts, size_t count,
                      struct ws_loss *loss) {
    struct iovec rest[PARTS_AT_ONCE];
    while (count > 0) {
        size_t at_once = count < PARTS_AT_ONCE ? count : PARTS_AT_ONCE, first = 0;
        memcpy(rest, parts, at_once * sizeof(*parts));
        while (first < at_once) {
            struct msghdr message = {.msg_iov = rest + first, .msg_iovlen = at_once - first};
            ssize_t sent = sendmsg(conn->fd, &message, MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR && !conn->cut)
                continue;
            if (sent < 0)
                return send_failed(conn, errno, loss);
            for (size_t left = (size_t)sent; first < at_once; first++) {
                if (left < rest[first].iov_len) {
                    rest[first].iov_base = (char *)rest[first].iov_base + left;
                    rest[first].iov_len -= left;
                    break;
                }
                left -= rest[first].iov_len;
            }
        }
        parts += at_once;
        count -= at_once;
    }
    return 0;
}

int ws_conn_send(struct ws_conn *conn, const struct iovec *parts, size_t count,
                 struct ws_loss *loss) {
    if (conn->ssl == NULL)
        return send_clear(conn, parts, count, loss);
    for (size_t i = 0; i < count; i++)
        if (parts[i].iov_len > 0 &&
            ws_tls_send(conn, parts[i].iov_base, parts[i].iov_len, loss) != 0)
            return conn->cut || loss->error == EAGAIN ? send_failed(conn, EAGAIN, loss) : -1;
    if (ws_tls_flush(conn, loss) != 0)
        return conn->cut || loss->error == EAGAIN ? send_failed(conn, EAGAIN, loss) : -1;
    return 0;
}

static ssize_t receive_clear(struct ws_conn *conn, void *data, size_t size, struct ws_loss *loss) {
    ssize_t some;
    do
        some = recv(conn->fd, data, size, MSG_WAITALL);
    while (some < 0 && errno == EINTR && !conn->cut);
    /* Part of it may have come before the time was up: there is more then, as after a signal. */
    return some < 0 ? ws_lose(loss, errno, "receiving failed") : some;
}

int ws_conn_receive(struct ws_conn *conn, void *data, size_t size, struct ws_loss *loss) {
    for (size_t done = 0; done < size;) {
        char *at = (char *)data + done;
        ssize_t some = conn->ssl == NULL ? receive_clear(conn, at, size - done, loss)
                                         : ws_tls_receive(conn, at, size - done, loss);
        if (conn->cut)
            return ws_lose(loss, ECANCELED, "the connection was ended here");
        if (some < 0)
            return -1;
        if (some == 0)
            return ws_lose(loss, done == 0 ? 0 : EPIPE, "it closed the connection");
        done += (size_t)some;
    }
    return 0;
}

int ws_conn_check(struct ws_conn *conn, struct ws_loss *loss) {
    struct pollfd one = {conn->fd, POLLIN | POLLRDHUP, 0};
    int ready = poll(&one, 1, 0);
    if (ready == 0 || (ready < 0 && errno == EINTR))
        return 0;
    int error = 0;
    socklen_t size = sizeof(error);
    (void)getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error == 0 && (one.revents & (POLLHUP | POLLRDHUP)) == 0)
        return ws_lose(loss, EPROTO, "it spoke out of turn");
    return ws_lose(loss, error, "it closed the connection");
}

void ws_conn_describe(const struct ws_conn *conn, char *out, size_t size) {
    if (conn->ssl == NULL) {
        snprintf(out, size, "in the clear");
        return;
    }
    bool kernel = BIO_get_ktls_send(SSL_get_wbio(conn->ssl)) > 0;
    snprintf(out, size, "%s %s%s", SSL_get_version(conn->ssl),
             SSL_CIPHER_get_name(SSL_get_current_cipher(conn->ssl)),
             kernel ? ", by the kernel" : "");
}
