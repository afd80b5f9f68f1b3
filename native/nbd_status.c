/* What a server says of ranges: where data is, and what is dirty. */
#include "nbd_wire.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Flags of base:allocation and of qemu:dirty-bitmap (NBD protocol; docs/interop/nbd.txt of QEMU).
 */
#define STATE_ZERO 2u
#define STATE_DIRTY 1u

struct ranges {
    uint64_t *pairs;
    size_t count, room;
    uint64_t least;
};

static int add(struct ranges *ranges, uint64_t offset, uint64_t end) {
    uint64_t *last = ranges->pairs + 2 * (ranges->count - (ranges->count > 0));
    if (ranges->count > 0 && offset <= last[0] + last[1]) {
        if (end > last[0] + last[1])
            last[1] = end - last[0];
        return 0;
    }
    if (ranges->count == ranges->room) {
        size_t room = ranges->room * 2 + 64;
        uint64_t *pairs = realloc(ranges->pairs, room * 2 * sizeof(*pairs));
        if (pairs == NULL)
            return -ENOMEM;
        ranges->pairs = pairs;
        ranges->room = room;
    }
    ranges->pairs[2 * ranges->count] = offset;
    ranges->pairs[2 * ranges->count++ + 1] = end - offset;
    return 0;
}

static int tell_data(void *who, const char *context, uint64_t offset, uint64_t length,
                     uint32_t flags) {
    struct ranges *ranges = who;
    if (strcmp(context, WS_NBD_ALLOCATION) != 0 || (flags & STATE_ZERO) != 0)
        return 0;
    return add(ranges, offset, offset + (length < ranges->least ? ranges->least : length));
}

static void cut_end(struct ranges *ranges, uint64_t size) {
    uint64_t *last = ranges->pairs + 2 * (ranges->count - (ranges->count > 0));
    if (ranges->count > 0 && last[0] + last[1] > size)
        last[1] = size - last[0];
}

int ws_nbd_data(struct ws_nbd *nbd, uint64_t start, uint64_t least, uint64_t **pairs,
                size_t *count) {
    struct ranges ranges = {.least = least};
    struct nbd_handle *handle;
    unsigned patience_ms;
    size_t index;
    int rc = ws_nbd_borrow(nbd, &index, &handle, &patience_ms);
    if (rc != 0)
        return rc;
    uint64_t size = ws_nbd_remote(nbd)->size;
    bool knows = nbd_can_meta_context(handle, WS_NBD_ALLOCATION) == 1;
    rc = knows ? ws_nbd_ask(handle, start, size, patience_ms, tell_data, &ranges) : -ENOTSUP;
    ws_nbd_give_back(nbd, index, knows && rc != 0);
    if (rc != 0) {
        free(ranges.pairs);
        return rc;
    }
    cut_end(&ranges, size);
    *pairs = ranges.pairs;
    *count = ranges.count;
    return 0;
}

static int tell_dirty(void *who, const char *context, uint64_t offset, uint64_t length,
                      uint32_t flags) {
    (void)context;
    if ((flags & STATE_DIRTY) != 0)
        ws_bitmap_set_range(who, offset, length);
    return 0;
}

int ws_nbd_marks(const struct ws_nbd_place *place, const char *const *contexts, size_t count,
                 const struct ws_bitmap *into) {
    struct nbd_handle *handle;
    int rc = ws_nbd_connect(place, contexts, count, &handle);
    if (rc != 0)
        return rc;
    int64_t size = nbd_get_size(handle);
    if (size < 0 || (uint64_t)size != into->size_bytes)
        rc = -ESTALE;
    else
        rc = ws_nbd_ask(handle, 0, into->size_bytes, place->patience_ms, tell_dirty, (void *)into);
    nbd_close(handle);
    return rc;
}
