#include "scan_impl.h"

#include <string.h>

/* Entries of a table that are tested for zero at once: a page of memory. */
#define ENTRIES 256u

static uint64_t least(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* Read whole blocks: the end of a volume may fall within one of a larger device. */
static int read_blocks(const struct ws_device *dev, void *data, uint64_t offset, uint64_t length,
                       struct ws_attempt *why) {
    uint64_t over = dev->is_block ? length % dev->logical : 0;
    return ws_dev_read(dev, data, offset, over == 0 ? length : length - over + dev->logical, why);
}

int ws_scan_digest(const struct ws_device *dev, uint64_t offset, uint64_t length,
                   const struct ws_scratch *scratch, uint8_t *out, struct ws_attempt *why) {
    while (length > 0) {
        uint64_t step = least(length, scratch->size);
        int rc = read_blocks(dev, scratch->data, offset, step, why);
        if (rc != 0)
            return rc;
        ws_digest_chunks(scratch->data, step, WS_CHUNK_BYTES, out);
        out += (step + WS_CHUNK_BYTES - 1) / WS_CHUNK_BYTES * WS_DIGEST_BYTES;
        offset += step;
        length -= step;
    }
    return 0;
}

/* Mark one chunk; returns its length, which is less than a chunk at the end of the volume. */
static uint64_t mark(const struct ws_bitmap *marks, uint64_t index) {
    uint64_t offset = index * WS_CHUNK_BYTES;
    uint64_t length = least(WS_CHUNK_BYTES, marks->size_bytes - offset);
    ws_bitmap_set_range(marks, offset, length);
    return length;
}

static uint64_t compare_read(const uint8_t *data, uint64_t offset, uint64_t length,
                             const uint8_t *table, const struct ws_bitmap *marks) {
    uint64_t marked = 0, index = offset / WS_CHUNK_BYTES;
    for (uint64_t at = 0; at < length; at += WS_CHUNK_BYTES, index++) {
        uint8_t digest[WS_DIGEST_BYTES];
        ws_digest_chunks(data + at, least(WS_CHUNK_BYTES, length - at), WS_CHUNK_BYTES, digest);
        if (memcmp(digest, table + index * WS_DIGEST_BYTES, WS_DIGEST_BYTES) != 0)
            marked += mark(marks, index);
    }
    return marked;
}

int ws_scan_compare(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const uint8_t *table,
                    const struct ws_bitmap *marks, uint64_t *marked, struct ws_attempt *why) {
    for (*marked = 0; length > 0;) {
        uint64_t step = least(length, scratch->size);
        int rc = read_blocks(dev, scratch->data, offset, step, why);
        if (rc != 0)
            return rc;
        *marked += compare_read(scratch->data, offset, step, table, marks);
        offset += step;
        length -= step;
    }
    return 0;
}

uint64_t ws_scan_hole(uint64_t offset, uint64_t length, const uint8_t *table,
                      const struct ws_bitmap *marks) {
    uint64_t marked = 0, last = (offset + length + WS_CHUNK_BYTES - 1) / WS_CHUNK_BYTES;
    if (length == 0)
        return 0;
    for (uint64_t index = offset / WS_CHUNK_BYTES; index < last;) {
        uint64_t some = least(ENTRIES, last - index);
        if (ws_is_zero(table + index * WS_DIGEST_BYTES, some * WS_DIGEST_BYTES)) {
            index += some;
            continue;
        }
        for (; some > 0; some--, index++)
            if (!ws_is_zero(table + index * WS_DIGEST_BYTES, WS_DIGEST_BYTES))
                marked += mark(marks, index);
    }
    return marked;
}
