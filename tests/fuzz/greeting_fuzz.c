/* The greeting of a data connection, in the clear and under TLS: whatever a stranger says, it ends,
 * and nobody without the token gets in. */
#include "stream_impl.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t token[WS_TOKEN_BYTES] = "the token that nobody was told of, 48 bytes long";
    if (size < 1)
        return 0;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0)
        abort();
    struct ws_tokens *tokens = ws_tokens_new();
    struct ws_loss loss;
    uint8_t id[WS_TOKEN_ID_BYTES];
    if (ws_tokens_add(tokens, token, ws_now_ns() + 60000000000u) != 0)
        abort();
    if (write(ends[1], data + 1, size - 1) != (ssize_t)(size - 1) && size < 65536)
        abort();
    shutdown(ends[1], SHUT_WR);
    struct ws_conn *conn = ws_conn_new(ends[0]);
    int rc = ws_conn_accept(conn, tokens, data[0] & 1, false, 1000, id, &loss);
    if (rc == 0 && (size - 1 < 8 + sizeof(token) || memcmp(data + 9, token, sizeof(token)) != 0))
        abort();
    ws_conn_free(conn);
    ws_tokens_free(tokens);
    close(ends[1]);
    return 0;
}
