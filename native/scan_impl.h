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

/* Mark the chunks of the range that are not what `table` says; counts their bytes in `marked`. The
 * range begins and ends on borders of chunks, or at the end of the volume that `marks` has. */
int ws_scan_compare(const struct ws_device *dev, uint64_t offset, uint64_t length,
                    const struct ws_scratch *scratch, const uint8_t *table,
                    const struct ws_bitmap *marks, uint64_t *marked, struct ws_attempt *why);

/* Mark each chunk that the range touches and `table` has as anything but zeros. Returns the bytes
 * marked. */
uint64_t ws_scan_hole(uint64_t offset, uint64_t length, const uint8_t *table,
                      const struct ws_bitmap *marks);

#endif
