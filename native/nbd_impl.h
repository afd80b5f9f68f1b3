/* Reading NBD exports (block-nbd protocol, libnbd(3)): data through a few connections at once, and
 * what the server says of ranges (base:allocation, dirty bitmaps).
 *
 * Never writes. Each wait is bounded: a server that falls silent is -ETIMEDOUT, and its connection
 * is given up, because what it answers later must not land in memory that serves another by then.
 * Nothing here needs the GIL. */
#ifndef WARMSYNC_NBD_IMPL_H
#define WARMSYNC_NBD_IMPL_H

#include "bitmap_impl.h"
#include "blockio_impl.h"

#define WS_NBD_CONNECTIONS_MAX 16u

struct ws_nbd;

/* Where an export is, and how long to wait for an answer. */
struct ws_nbd_place {
    const char *socket; /* a Unix socket's path */
    const char *export;
    unsigned patience_ms;
};

const char *ws_nbd_version(void);

/* Connect once, in order to learn the size; later connections are made when they are needed.
 * -errno; `ws_nbd_remote` is the device to read. */
int ws_nbd_open(const struct ws_nbd_place *place, size_t connections, struct ws_nbd **nbd);
struct ws_remote *ws_nbd_remote(struct ws_nbd *nbd);

/* Read from another place from now on: what was connected is dropped once it is idle. -ENOMEM. */
int ws_nbd_redirect(struct ws_nbd *nbd, const struct ws_nbd_place *place);

/* Ranges (offset, length pairs) that do not surely read as zeros, those shorter than `least` made
 * that long; to be freed. -errno; -ENOTSUP where the server does not tell. */
int ws_nbd_data(struct ws_nbd *nbd, uint64_t start, uint64_t least, uint64_t **pairs,
                size_t *count);

/* Mark what any of the meta contexts (qemu:dirty-bitmap:NAME) has as dirty. -ENOENT where the
 * server has no such context, else -errno. */
int ws_nbd_marks(const struct ws_nbd_place *place, const char *const *contexts, size_t count,
                 const struct ws_bitmap *into);

#endif
