/* Many transfers of one device at once, through io_uring.
 *
 * Scattered blocks one after the other wait for the device each time; here up to WS_RING_DEPTH are
 * under way. A ring belongs to one thread at a time. Where the kernel refuses rings (seccomp,
 * kernel.io_uring_disabled) there is none, and transfers go one by one. */
#ifndef WARMSYNC_BLOCKIO_RING_H
#define WARMSYNC_BLOCKIO_RING_H

#include "blockio_impl.h"

#define WS_RING_DEPTH 64u

struct ws_ring;

/* NULL where the kernel has none for us. */
struct ws_ring *ws_ring_new(void);
void ws_ring_free(struct ws_ring *ring);

/* Move all pieces (disjoint ranges), in any order. 0, or -errno with `why` as ws_dev_read() and
 * ws_dev_write() say it, which also do whatever a ring cannot (a file's short last page). Nothing
 * is under way any more when it returns. `ring` may be NULL. */
int ws_ring_move(struct ws_ring *ring, const struct ws_device *dev, bool write,
                 const struct ws_piece *pieces, size_t count, struct ws_attempt *why);

#endif
