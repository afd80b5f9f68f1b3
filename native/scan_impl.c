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

struct tally {
    uint64_t marked; /* bytes */
    uint32_t unread; /* chunks */
};

/* A device that has shrunk has no bad sectors. */
static bool is_whole(const struct ws_device *dev, uint64_t size_bytes) {
    uint64_t size;
    return ws_dev_size(dev, &size) == 0 && size >= size_bytes;
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

/* Compare chunk by chunk what could not be read as a whole; what cannot be read may differ. */
static int compare_around(const struct ws_device *dev, uint64_t offset, uint64_t length,
                          uint8_t *data, const uint8_t *table, const struct ws_bitmap *marks,
                          struct tally *tally, struct ws_attempt *why) {
    for (uint64_t end = offset + length; offset < end; offset += WS_CHUNK_BYTES) {
        uint64_t some = least(WS_CHUNK_BYTES, end - offset);
        int rc = read_blocks(dev, data, offset, some, why);
        if (rc == 0)
            tally->marked += compare_read(data, offset, some, table, marks);
        else if (ws_is_of_a_place(rc) && ++tally->unread <= WS_UNREAD_MAX / 4)
            tally->marked += mark(marks, offset / WS_CHUNK_BYTES);
        else
            return rc;
    }
    return 0;
}

int ws_scan_compare(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const uint8_t *table,
                    const struct ws_bitmap *marks, uint64_t *marked, struct ws_attempt *why) {
    struct tally tally = {0, 0};
    int rc = 0;
    while (rc == 0 && length > 0) {
        uint64_t step = least(length, scratch->size);
        rc = read_blocks(dev, scratch->data, offset, step, why);
        if (rc == 0)
            tally.marked += compare_read(scratch->data, offset, step, table, marks);
        else if (ws_is_of_a_place(rc) && is_whole(dev, marks->size_bytes))
            rc = compare_around(dev, offset, step, scratch->data, table, marks, &tally, why);
        offset += step;
        length -= step;
    }
    *marked = tally.marked;
    return rc;
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

/* One run of stale chunks, which fits the scratch. */
static int refresh_run(const struct ws_device *dev, uint64_t offset, uint64_t length, uint8_t *data,
                       const struct ws_ledger *ledger, struct ws_attempt *why) {
    ws_bitmap_set_range(ledger->reading, offset, length);
    /* Who marks it stale again must see that it is being read. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    ws_bitmap_clear_range(ledger->stale, offset, length);
    /* The read must not come before the clear: a write that it misses marks the chunk after it. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int rc = read_blocks(dev, data, offset, length, why);
    if (rc != 0)
        ws_bitmap_set_range(ledger->stale, offset, length);
    else
        ws_digest_chunks(data, length, WS_CHUNK_BYTES,
                         ledger->table + offset / WS_CHUNK_BYTES * WS_DIGEST_BYTES);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    ws_bitmap_clear_range(ledger->reading, offset, length);
    return rc;
}

int ws_scan_refresh(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const struct ws_ledger *ledger,
                    uint64_t *done, struct ws_attempt *why) {
    const struct ws_run_limits limits = {0, scratch->size / WS_CHUNK_BYTES,
                                         scratch->size / WS_CHUNK_BYTES, 1};
    uint64_t pair[2], at = offset, end = offset + length;
    for (*done = 0; at < end;) {
        if (ws_bitmap_runs(ledger->stale, at / WS_CHUNK_BYTES, &limits, pair, &at) == 0 ||
            pair[0] >= end)
            break;
        uint64_t some = least(pair[1], end - pair[0]);
        int rc = refresh_run(dev, pair[0], some, scratch->data, ledger, why);
        if (rc != 0)
            return rc;
        *done += some;
    }
    return 0;
}

void ws_scan_note(const uint8_t *data, uint64_t offset, uint64_t length, uint64_t size_bytes,
                  uint8_t *table, const struct ws_bitmap *stale) {
    uint64_t first = (offset + WS_CHUNK_BYTES - 1) / WS_CHUNK_BYTES * WS_CHUNK_BYTES;
    uint64_t end = offset + length;
    if (end != size_bytes)
        end = end / WS_CHUNK_BYTES * WS_CHUNK_BYTES;
    if (first >= end)
        return;
    ws_digest_chunks(data + (first - offset), end - first, WS_CHUNK_BYTES,
                     table + first / WS_CHUNK_BYTES * WS_DIGEST_BYTES);
    if (stale != NULL)
        ws_bitmap_clear_range(stale, first, end - first);
}
