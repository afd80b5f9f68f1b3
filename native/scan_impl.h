/* Whole-range passes over a device: digest its chunks, compare them with a table.
 *
 * Chunks are WS_CHUNK_BYTES long and counted from the start of the device; tables have
 * WS_DIGEST_BYTES for each. Nothing here needs the GIL; a table may be read by several passes. */
#ifndef WARMSYNC_SCAN_IMPL_H
#define WARMSYNC_SCAN_IMPL_H

#include "bitmap_impl.h"
#include "blockio_impl.h"
#include "chunk_impl.h"

/* What a pass reads with: memory aligned to 4096, of whole chunks, at least one. */
struct ws_scratch {
    uint8_t *data;
    uint64_t size;
};

/* Digest the range, which begins on a border of chunks; `out` has room for all its chunks. */
int ws_scan_digest(const struct ws_device *dev, uint64_t offset, uint64_t length,
                   const struct ws_scratch *scratch, uint8_t *out, struct ws_attempt *why);

/* What is known of a volume's chunks: their digests; which of these are stale; which are being
 * read, so that whoever is killed in the middle leaves none that is wrong and not said to be stale.
 * Blocks of both bitmaps are chunks. Several threads may work at different ranges of one ledger. */
struct ws_ledger {
    uint8_t *table;
    const struct ws_bitmap *stale;
    const struct ws_bitmap *reading;
};

/* Read the stale chunks of the range (as for ws_scan_compare) again, and enter their digests.
 * Counts the bytes read in `done`. First the mark is cleared, then the chunk is read: a write in
 * between marks it anew. */
int ws_scan_refresh(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const struct ws_ledger *ledger,
                    uint64_t *done, struct ws_attempt *why);

/* Enter the digests of the whole chunks in `data`, which was read at `offset`: they are not stale
 * any more. Chunks that only are there in part stay as they are. `stale` may be NULL. */
void ws_scan_note(const uint8_t *data, uint64_t offset, uint64_t length, uint64_t size_bytes,
                  uint8_t *table, const struct ws_bitmap *stale);

/* Mark the chunks of the range that are not what `table` says; counts their bytes in `marked`. The
 * range begins and ends on borders of chunks, or at the end of the volume that `marks` has. Chunks
 * that cannot be read are marked too: they may differ. More than WS_UNREAD_MAX / 4 are an error. */
int ws_scan_compare(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const uint8_t *table,
                    const struct ws_bitmap *marks, uint64_t *marked, struct ws_attempt *why);

/* Mark each chunk that the range touches and `table` has as anything but zeros. Returns the bytes
 * marked. */
uint64_t ws_scan_hole(uint64_t offset, uint64_t length, const uint8_t *table,
                      const struct ws_bitmap *marks);

#endif
