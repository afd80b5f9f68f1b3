#define _GNU_SOURCE
#include "blockio_ring.h"
#include "blockio_steps.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>

struct ws_ring {
    struct io_uring uring;
};

struct ws_ring *ws_ring_new(void) {
    struct ws_ring *ring = calloc(1, sizeof(*ring));
    if (ring != NULL && io_uring_queue_init(WS_RING_DEPTH, &ring->uring, 0) != 0) {
        free(ring);
        ring = NULL;
    }
    return ring;
}

void ws_ring_free(struct ws_ring *ring) {
    if (ring != NULL)
        io_uring_queue_exit(&ring->uring);
    free(ring);
}

static int move_one(const struct ws_device *dev, bool write, const struct ws_piece *piece,
                    struct ws_attempt *why) {
    return write ? ws_dev_write(dev, piece->data, piece->offset, piece->length, why)
                 : ws_dev_read(dev, piece->data, piece->offset, piece->length, why);
}

/* Can the ring do it exactly as ws_dev_read() would? */
static bool fits(const struct ws_device *dev, const struct ws_piece *piece) {
    bool short_page = dev->tail_fd >= 0 && (piece->offset + piece->length) % PAGE_BYTES != 0;
    return dev->is_direct && !short_page && piece->length > 0 && piece->length <= STEP_BYTES &&
           piece->offset % dev->logical == 0 && piece->length % dev->logical == 0 &&
           (uintptr_t)piece->data % dev->memory_align == 0;
}

static void prepare(struct ws_ring *ring, const struct ws_device *dev, bool write,
                    const struct ws_piece *piece) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (write)
        io_uring_prep_write(sqe, dev->fd, piece->data, (unsigned)piece->length, piece->offset);
    else
        io_uring_prep_read(sqe, dev->fd, piece->data, (unsigned)piece->length, piece->offset);
    io_uring_sqe_set_data(sqe, (void *)piece);
}

/* Wait for at least `wanted` of what is under way, and do again, in order to know why, what did not
 * move as a whole. Returns how many have ended; the first error stays in `rc`. */
static unsigned reap(struct ws_ring *ring, const struct ws_device *dev, bool write, unsigned wanted,
                     int *rc, struct ws_attempt *why) {
    unsigned ended = 0;
    struct io_uring_cqe *cqe = NULL;
    while ((ended < wanted ? io_uring_wait_cqe(&ring->uring, &cqe)
                           : io_uring_peek_cqe(&ring->uring, &cqe)) != -EAGAIN) {
        if (cqe == NULL) /* interrupted */
            continue;
        const struct ws_piece *piece = io_uring_cqe_get_data(cqe);
        bool whole = cqe->res >= 0 && (uint64_t)cqe->res == piece->length;
        io_uring_cqe_seen(&ring->uring, cqe);
        ended++;
        if (!whole && *rc == 0)
            *rc = move_one(dev, write, piece, why);
    }
    return ended;
}

int ws_ring_move(struct ws_ring *ring, const struct ws_device *dev, bool write,
                 const struct ws_piece *pieces, size_t count, struct ws_attempt *why) {
    unsigned running = 0, queued = 0;
    int rc = 0;
    for (size_t i = 0; i < count && rc == 0; i++) {
        rc = ws_dev_begin(dev, write ? "write" : "read", pieces[i].offset, pieces[i].length, why);
        if (rc != 0)
            break;
        if (dev->remote != NULL) /* all at once, below */
            continue;
        if (ring == NULL || count == 1 || !fits(dev, &pieces[i])) {
            rc = move_one(dev, write, &pieces[i], why);
            continue;
        }
        prepare(ring, dev, write, &pieces[i]);
        queued++;
        if (running + queued < WS_RING_DEPTH && i + 1 < count)
            continue;
        while (queued > 0) {
            int taken = io_uring_submit(&ring->uring);
            if (taken > 0) {
                running += (unsigned)taken;
                queued -= (unsigned)taken;
            } else if (taken != -EINTR && running > 0) /* the kernel is short of memory for now */
                running -= reap(ring, dev, write, 1, &rc, why);
        }
        running -=
            reap(ring, dev, write, running < WS_RING_DEPTH ? 0 : WS_RING_DEPTH / 2, &rc, why);
    }
    if (dev->remote != NULL && rc == 0)
        rc = write ? -EROFS : dev->remote->read(dev->remote, pieces, count, why);
    while (queued > 0 || running > 0) {
        int taken = queued > 0 ? io_uring_submit(&ring->uring) : 0;
        if (taken > 0) {
            running += (unsigned)taken;
            queued -= (unsigned)taken;
        }
        running -= reap(ring, dev, write, running > 0 ? 1 : 0, &rc, why);
    }
    return rc;
}
