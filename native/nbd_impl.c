/* The pool of connections, and reading through it. */
#define _GNU_SOURCE
#include "nbd_wire.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* QEMU takes up to 32 MiB in one request (NBD_MAX_BUFFER_SIZE). */
#define READ_BYTES (UINT64_C(4) << 20)

struct lane {
    struct nbd_handle *handle; /* NULL: not connected */
    unsigned epoch;            /* of the place it is connected to */
    bool busy;
};

struct ws_nbd {
    struct ws_remote remote; /* first: the one is the other */
    pthread_mutex_t lock;
    pthread_cond_t idle;
    struct ws_nbd_place place; /* its texts are ours */
    unsigned epoch;
    size_t count;
    struct lane lanes[WS_NBD_CONNECTIONS_MAX];
};

static const char *const ALLOCATION[] = {WS_NBD_ALLOCATION};

static int copy_place(struct ws_nbd_place *to, const struct ws_nbd_place *from) {
    *to = (struct ws_nbd_place){strdup(from->socket), strdup(from->export), from->patience_ms};
    if (to->socket != NULL && to->export != NULL)
        return 0;
    free((char *)to->socket);
    free((char *)to->export);
    return -ENOMEM;
}

static void free_place(struct ws_nbd_place *place) {
    free((char *)place->socket);
    free((char *)place->export);
}

static struct lane *find_idle(struct ws_nbd *nbd) {
    struct lane *found = NULL;
    for (size_t i = 0; i < nbd->count; i++) {
        struct lane *lane = &nbd->lanes[i];
        if (!lane->busy && (found == NULL || (found->handle == NULL && lane->handle != NULL)))
            found = lane;
    }
    return found;
}

static int connect_lane(struct ws_nbd *nbd, struct lane *lane, const struct ws_nbd_place *place) {
    int rc = ws_nbd_connect(place, ALLOCATION, 1, &lane->handle);
    if (rc != 0)
        return rc;
    int64_t size = nbd_get_size(lane->handle);
    /* Another disk behind the same name would be read as ours. */
    return size >= 0 && (uint64_t)size == nbd->remote.size ? 0 : -ESTALE;
}

int ws_nbd_borrow(struct ws_nbd *nbd, size_t *index, struct nbd_handle **handle,
                  unsigned *patience_ms) {
    struct lane *lane;
    struct ws_nbd_place place;
    pthread_mutex_lock(&nbd->lock);
    while ((lane = find_idle(nbd)) == NULL)
        pthread_cond_wait(&nbd->idle, &nbd->lock);
    lane->busy = true;
    bool stale = lane->epoch != nbd->epoch;
    lane->epoch = nbd->epoch;
    *patience_ms = nbd->place.patience_ms;
    int rc = copy_place(&place, &nbd->place);
    pthread_mutex_unlock(&nbd->lock);
    *index = (size_t)(lane - nbd->lanes);
    if (rc != 0) {
        ws_nbd_give_back(nbd, *index, true);
        return rc;
    }
    if (lane->handle != NULL && (stale || nbd_aio_is_ready(lane->handle) != 1)) {
        nbd_close(lane->handle);
        lane->handle = NULL;
    }
    if (lane->handle == NULL)
        rc = connect_lane(nbd, lane, &place);
    free_place(&place);
    *handle = lane->handle;
    if (rc != 0)
        ws_nbd_give_back(nbd, *index, true);
    return rc;
}

void ws_nbd_give_back(struct ws_nbd *nbd, size_t index, bool broken) {
    struct lane *lane = &nbd->lanes[index];
    if (broken && lane->handle != NULL) {
        nbd_close(lane->handle);
        lane->handle = NULL;
    }
    pthread_mutex_lock(&nbd->lock);
    lane->busy = false;
    pthread_cond_signal(&nbd->idle);
    pthread_mutex_unlock(&nbd->lock);
}

/* Reads under way on one connection; only the thread that waits for them touches this. */
struct reading {
    size_t running;
    int rc;
    uint64_t failed_at;
};

struct command {
    struct reading *reading;
    uint64_t offset;
};

static int finish(void *user, int *error) {
    struct command *command = user;
    struct reading *reading = command->reading;
    reading->running--;
    if (*error != 0 && reading->rc == 0) {
        reading->rc = -*error;
        reading->failed_at = command->offset;
    }
    return 1; /* nobody asks for it again */
}

static size_t count_commands(const struct ws_piece *pieces, size_t count) {
    size_t commands = 0;
    for (size_t i = 0; i < count; i++)
        commands += (pieces[i].length + READ_BYTES - 1) / READ_BYTES;
    return commands;
}

static int issue(struct nbd_handle *handle, const struct ws_piece *piece, struct command **next,
                 struct reading *reading) {
    for (uint64_t at = 0; at < piece->length; at += READ_BYTES) {
        uint64_t left = piece->length - at, step = left < READ_BYTES ? left : READ_BYTES;
        struct command *command = (*next)++;
        *command = (struct command){reading, piece->offset + at};
        nbd_completion_callback done = {.callback = finish, .user_data = command};
        reading->running++;
        if (nbd_aio_pread(handle, piece->data + at, step, piece->offset + at, done, 0) < 0) {
            reading->running--;
            return ws_nbd_error();
        }
    }
    return 0;
}

/* Returns whether the connection is still good. */
static bool read_all(struct nbd_handle *handle, unsigned patience_ms, const struct ws_piece *pieces,
                     size_t count, struct command *commands, struct reading *reading) {
    int rc = 0;
    for (size_t i = 0; i < count && rc == 0; i++)
        rc = issue(handle, &pieces[i], &commands, reading);
    while (rc == 0 && reading->running > 0)
        rc = ws_nbd_wait(handle, patience_ms);
    if (rc != 0 && reading->rc == 0)
        reading->rc = rc;
    return rc == 0 && nbd_aio_is_ready(handle) == 1;
}

static int read_pieces(struct ws_remote *remote, const struct ws_piece *pieces, size_t count,
                       struct ws_attempt *why) {
    struct ws_nbd *nbd = (struct ws_nbd *)remote;
    struct nbd_handle *handle;
    unsigned patience_ms;
    size_t index;
    if (count == 0)
        return 0;
    why->failed_at = pieces[0].offset;
    struct command *commands = calloc(count_commands(pieces, count) + 1, sizeof(*commands));
    int rc = commands == NULL ? -ENOMEM : ws_nbd_borrow(nbd, &index, &handle, &patience_ms);
    if (rc == 0) {
        struct reading reading = {0, 0, pieces[0].offset};
        bool good = read_all(handle, patience_ms, pieces, count, commands, &reading);
        ws_nbd_give_back(nbd, index, !good);
        rc = reading.rc;
        why->failed_at = reading.failed_at;
    }
    free(commands);
    return rc;
}

static void close_nbd(struct ws_remote *remote) {
    struct ws_nbd *nbd = (struct ws_nbd *)remote;
    for (size_t i = 0; i < nbd->count; i++)
        nbd_close(nbd->lanes[i].handle);
    free_place(&nbd->place);
    pthread_cond_destroy(&nbd->idle);
    pthread_mutex_destroy(&nbd->lock);
    free(nbd);
}

struct ws_remote *ws_nbd_remote(struct ws_nbd *nbd) {
    return &nbd->remote;
}

int ws_nbd_open(const struct ws_nbd_place *place, size_t connections, struct ws_nbd **out) {
    struct ws_nbd *nbd = calloc(1, sizeof(*nbd));
    if (nbd == NULL || copy_place(&nbd->place, place) != 0) {
        free(nbd);
        return -ENOMEM;
    }
    nbd->remote.read = read_pieces;
    nbd->remote.close = close_nbd;
    nbd->count = connections;
    pthread_mutex_init(&nbd->lock, NULL);
    pthread_cond_init(&nbd->idle, NULL);
    int rc = ws_nbd_connect(place, ALLOCATION, 1, &nbd->lanes[0].handle);
    if (rc == 0) {
        int64_t size = nbd_get_size(nbd->lanes[0].handle);
        nbd->remote.size = size < 0 ? 0 : (uint64_t)size;
        rc = size < 0 ? ws_nbd_error() : 0;
    }
    if (rc != 0) {
        close_nbd(&nbd->remote);
        return rc;
    }
    *out = nbd;
    return 0;
}

int ws_nbd_redirect(struct ws_nbd *nbd, const struct ws_nbd_place *place) {
    struct ws_nbd_place copy;
    int rc = copy_place(&copy, place);
    if (rc != 0)
        return rc;
    pthread_mutex_lock(&nbd->lock);
    free_place(&nbd->place);
    nbd->place = copy;
    nbd->epoch++;
    for (size_t i = 0; i < nbd->count; i++) {
        struct lane *lane = &nbd->lanes[i];
        if (!lane->busy && lane->handle != NULL) {
            nbd_close(lane->handle);
            lane->handle = NULL;
        }
    }
    pthread_mutex_unlock(&nbd->lock);
    return 0;
}
