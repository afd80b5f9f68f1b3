/* Connecting, waiting and asking for status. */
#define _GNU_SOURCE
#include "nbd_wire.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/* A request may ask for less than 4 GiB (NBD protocol, 32 bits), in whole blocks. */
#define ASK_BYTES (UINT64_C(1) << 31)

const char *ws_nbd_version(void) {
    struct nbd_handle *handle = nbd_create();
    const char *version = handle == NULL ? "?" : nbd_get_version(handle);
    nbd_close(handle);
    return version;
}

int ws_nbd_error(void) {
    int error = nbd_get_errno();
    /* Not EIO, which would be a bad sector. */
    return error > 0 ? -error : -ENOTCONN;
}

int ws_nbd_wait(struct nbd_handle *handle, unsigned patience_ms) {
    int rc = nbd_poll(handle, (int)patience_ms);
    if (rc == 0)
        return -ETIMEDOUT;
    return rc < 0 ? ws_nbd_error() : 0;
}

static int name(struct nbd_handle *handle, const struct ws_nbd_place *place,
                const char *const *contexts, size_t count) {
    if (nbd_set_export_name(handle, place->export) != 0)
        return ws_nbd_error();
    for (size_t i = 0; i < count; i++)
        if (nbd_add_meta_context(handle, contexts[i]) != 0)
            return ws_nbd_error();
    return 0;
}

static int greet(struct nbd_handle *handle, const struct ws_nbd_place *place) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(place->socket);
    if (length >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, place->socket, length + 1);
    if (nbd_aio_connect(handle, (struct sockaddr *)&address, sizeof(address)) != 0)
        return ws_nbd_error();
    while (nbd_aio_is_connecting(handle) == 1) {
        int rc = ws_nbd_wait(handle, place->patience_ms);
        if (rc != 0)
            return rc;
    }
    return nbd_aio_is_ready(handle) == 1 ? 0 : -ENOTCONN;
}

int ws_nbd_connect(const struct ws_nbd_place *place, const char *const *contexts, size_t count,
                   struct nbd_handle **handle) {
    *handle = nbd_create();
    if (*handle == NULL)
        return ws_nbd_error();
    int rc = name(*handle, place, contexts, count);
    rc = rc != 0 ? rc : greet(*handle, place);
    for (size_t i = 0; i < count && rc == 0; i++)
        if (nbd_can_meta_context(*handle, contexts[i]) != 1)
            rc = strcmp(contexts[i], WS_NBD_ALLOCATION) == 0 ? 0 : -ENOENT;
    if (rc != 0) {
        nbd_close(*handle);
        *handle = NULL;
    }
    return rc;
}

/* One request. Each context's extents begin at `from`; the shortest tale says how far it came. */
struct question {
    ws_nbd_tell tell;
    void *who;
    uint64_t from, end;
    uint64_t told; /* up to here by all contexts that have spoken; 0: none has */
    int rc;
    bool done;
};

static int hear(void *user, const char *context, uint64_t offset, uint32_t *entries, size_t count,
                int *error) {
    struct question *question = user;
    (void)error;
    for (size_t i = 0; i + 1 < count && offset < question->end; i += 2) {
        uint64_t length = entries[i], left = question->end - offset;
        length = length < left ? length : left;
        int rc = question->tell(question->who, context, offset, length, entries[i + 1]);
        question->rc = question->rc != 0 ? question->rc : rc;
        offset += length;
    }
    if (question->told == 0 || offset < question->told)
        question->told = offset;
    return 0;
}

static int finish(void *user, int *error) {
    struct question *question = user;
    question->done = true;
    if (*error != 0 && question->rc == 0)
        question->rc = -*error;
    return 1; /* nobody asks for it again */
}

static int ask_once(struct nbd_handle *handle, struct question *question, unsigned patience_ms) {
    nbd_extent_callback extents = {.callback = hear, .user_data = question};
    nbd_completion_callback done = {.callback = finish, .user_data = question};
    if (nbd_aio_block_status(handle, question->end - question->from, question->from, extents, done,
                             0) < 0)
        return ws_nbd_error();
    while (!question->done) {
        int rc = ws_nbd_wait(handle, patience_ms);
        /* Dropped, it has ended by now, with an error of its own. */
        if (rc != 0 && !question->done)
            return rc;
    }
    if (question->rc != 0)
        return question->rc;
    return question->told > question->from ? 0 : -EPROTO;
}

int ws_nbd_ask(struct nbd_handle *handle, uint64_t from, uint64_t end, unsigned patience_ms,
               ws_nbd_tell tell, void *who) {
    while (from < end) {
        uint64_t step = end - from < ASK_BYTES ? end - from : ASK_BYTES;
        struct question question = {.tell = tell, .who = who, .from = from, .end = from + step};
        int rc = ask_once(handle, &question, patience_ms);
        if (rc != 0)
            return rc;
        from = question.told;
    }
    return 0;
}
