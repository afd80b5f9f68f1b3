/* Frames: many extents of one volume in one message. This file is the reference for the layout.
 *
 * Little endian, without padding: header, table of extents, payload of the DATA extents one after
 * the other. The table ascends and its extents do not overlap. The checksum is XXH3-128 (canonical)
 * of the header with this field zero, the table and the payload (before compression). Nothing here
 * needs the GIL. */
#ifndef WARMSYNC_FRAME_IMPL_H
#define WARMSYNC_FRAME_IMPL_H

#include "blockio_impl.h"
#include "chunk_impl.h"

#define WS_FRAME_VERSION 1
/* Kinds of frames. The last two have no extents, and travel on the tcp carrier only. */
#define WS_FRAME_EXTENTS 1
#define WS_FRAME_END 2 /* of a round; `sequence` frames went before it on this connection */
#define WS_FRAME_ACK 3 /* the other way: the round is durable; `sequence`: ns of the flush */
/* Flags. */
#define WS_FRAME_ZSTD 1u /* the payload is compressed; on the tcp carrier only */
#define WS_FRAME_MAX_PAYLOAD (1u << 20)
#define WS_FRAME_MAX_EXTENTS 4096u
#define WS_FRAME_MAX_BYTES                                                                         \
    (sizeof(struct ws_frame_header) + WS_FRAME_MAX_EXTENTS * sizeof(struct ws_frame_extent) +      \
     WS_FRAME_MAX_PAYLOAD)

/* Kinds of extents. 0 is none of them: zeroed memory is not a valid table. */
#define WS_EXTENT_DATA 1u
#define WS_EXTENT_ZERO 2u
#define WS_EXTENT_DISCARD 3u

struct ws_frame_header {
    uint8_t magic[4]; /* "WSF1" */
    uint16_t version;
    uint16_t kind;
    uint32_t volume;
    uint32_t extent_count;
    uint64_t generation;
    uint64_t sequence;
    uint32_t payload_bytes;
    uint32_t flags;
    uint64_t packed_bytes; /* what a compressed payload takes; else 0 */
    uint8_t checksum[WS_DIGEST_BYTES];
};

struct ws_frame_extent {
    uint64_t offset;
    uint64_t length;
    uint32_t kind;
    uint32_t reserved; /* 0 */
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the layout is that of memory");
_Static_assert(sizeof(struct ws_frame_header) == 64, "no padding");
_Static_assert(offsetof(struct ws_frame_header, generation) == 16, "no padding");
_Static_assert(offsetof(struct ws_frame_header, checksum) == 48, "no padding");
_Static_assert(sizeof(struct ws_frame_extent) == 24, "no padding");

/* What is wrong with a frame, or with a list of extents: "`field` is `found`, `rule` `wanted`". */
struct ws_fault {
    const char *field;
    const char *rule;
    uint64_t found;
    uint64_t wanted;
    int64_t index; /* of the extent; -1: the header */
};

/* A table to be filled, and the bytes of its DATA extents. */
struct ws_frame_plan {
    struct ws_frame_extent *table; /* room for WS_FRAME_MAX_EXTENTS */
    uint32_t count;
    uint32_t payload_bytes;
};

/* Offset, length pairs must ascend without overlap, be at least 1 long and end within INT64_MAX. */
int ws_pairs_check(const uint64_t *pairs, size_t count, struct ws_fault *fault);

/* Plan a frame of ZERO extents. */
void ws_frame_plan_zeros(struct ws_frame_plan *plan, const uint64_t *pairs, size_t count);

/* Plan a frame of what `data` holds: the pairs' bytes one after the other. An extent of zeros
 * becomes ZERO, and so do runs of at least `min_zero` zeros between multiples of 4096 while the
 * table has room; neighbours of one kind are joined. */
void ws_frame_plan_data(struct ws_frame_plan *plan, const uint64_t *pairs, size_t count,
                        const uint8_t *data, uint64_t min_zero);

size_t ws_frame_size(const struct ws_frame_plan *plan);

/* Write the planned frame to `out` (ws_frame_size bytes). `header` gives volume, generation and
 * sequence; `data` is what was planned with. */
void ws_frame_build(const struct ws_frame_plan *plan, const struct ws_frame_header *header,
                    const uint8_t *data, uint8_t *out);

/* Verify all that can be without a device, and copy the header out. 0, or -1 with `fault`. */
int ws_frame_verify(const uint8_t *frame, size_t size, struct ws_frame_header *header,
                    struct ws_fault *fault);

/* The same of a frame in parts: first its header, which says how much there is to come (`packing`:
 * may the payload be compressed?), then, when all is there, the rest; the payload is as it was
 * before it was compressed. */
int ws_frame_check_header(const struct ws_frame_header *header, uint16_t kind, bool packing,
                          struct ws_fault *fault);
int ws_frame_check_parts(const struct ws_frame_header *header, const struct ws_frame_extent *table,
                         const uint8_t *payload, struct ws_fault *fault);

/* Fill in the checksum: of the header, for which parts[0] is kept free, and of table and payload.
 */
void ws_frame_seal(struct ws_frame_header *header, struct ws_part *parts, size_t count);

/* Verify that each extent of a verified frame lies within `size_bytes` and on borders of `unit`;
 * the end of the volume is as good as a border. */
int ws_frame_fits(const uint8_t *frame, uint64_t size_bytes, uint32_t unit, struct ws_fault *fault);

/* The same for one extent, the i-th. */
int ws_extent_fits(const struct ws_frame_extent *entry, uint64_t size_bytes, uint32_t unit,
                   size_t i, struct ws_fault *fault);

/* Entry i of a frame's table; the frame may stand at any address. */
struct ws_frame_extent ws_frame_entry(const uint8_t *frame, size_t i);

struct ws_applied {
    uint64_t data_bytes;
    uint64_t zero_bytes;
    uint64_t discard_bytes;
};

/* Zero or discard a range. */
int ws_frame_apply_hole(struct ws_device *dev, const struct ws_frame_extent *entry,
                        struct ws_applied *applied, struct ws_attempt *why);

/* Write a verified frame that fits. `scratch` holds its payload and is aligned to 4096. */
int ws_frame_apply(struct ws_device *dev, const uint8_t *frame, void *scratch,
                   struct ws_applied *applied, struct ws_attempt *why);

#endif
