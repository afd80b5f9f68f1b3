/* Dirty bitmaps: one bit a block, bit i is bit i % 64 of 64-bit word i / 64.
 *
 * The words may be written at any time by other threads and by the kernel's eBPF program, so each
 * access to a word is atomic; an operation on many words is not atomic as a whole. */
#ifndef WARMSYNC_BITMAP_IMPL_H
#define WARMSYNC_BITMAP_IMPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ws_bitmap {
    uint64_t *words;
    uint64_t word_count;
    uint64_t size_bytes;
    uint64_t block_count;
    unsigned block_shift; /* the block size is 1 << block_shift bytes */
};

/* Set the geometry; block_size is a power of two, size_bytes at least 1. Leaves `words` NULL. */
void ws_bitmap_init(struct ws_bitmap *map, uint64_t size_bytes, uint64_t block_size);

/* Give the words anonymous memory; untouched pages cost nothing. 0, or -1 with errno. */
int ws_bitmap_map(struct ws_bitmap *map);
void ws_bitmap_unmap(struct ws_bitmap *map);

/* Mark all blocks that [offset, offset + length) touches; the range lies within size_bytes. */
void ws_bitmap_set_range(const struct ws_bitmap *map, uint64_t offset, uint64_t length);

/* Clear the blocks that lie wholly within; a last short block counts as whole. */
void ws_bitmap_clear_range(const struct ws_bitmap *map, uint64_t offset, uint64_t length);

void ws_bitmap_set_all(const struct ws_bitmap *map);
void ws_bitmap_clear(const struct ws_bitmap *map);
/* Clear words of ws_bitmap_map() by giving their memory back. */
void ws_bitmap_drop(const struct ws_bitmap *map);
bool ws_bitmap_is_marked(const struct ws_bitmap *map, uint64_t offset);

/* OR each word into `into`, then clear here what was found. Returns the number of blocks taken.
 * Whoever is killed meanwhile leaves each mark in one of the two, or in both. */
uint64_t ws_bitmap_take(const struct ws_bitmap *map, const struct ws_bitmap *into);

void ws_bitmap_merge(const struct ws_bitmap *map, const struct ws_bitmap *other);
void ws_bitmap_subtract(const struct ws_bitmap *map, const struct ws_bitmap *other);

/* Mark each block that a marked block of `other` touches; its blocks may be smaller or larger. */
void ws_bitmap_touch(const struct ws_bitmap *map, const struct ws_bitmap *other);

/* Mark what is marked in both; touches no page of `map` where nothing is. */
void ws_bitmap_merge_common(const struct ws_bitmap *map, const struct ws_bitmap *one,
                            const struct ws_bitmap *other);

/* Marked blocks; marked bytes, where a last short block counts with its true length. */
uint64_t ws_bitmap_count(const struct ws_bitmap *map);
uint64_t ws_bitmap_count_bytes(const struct ws_bitmap *map);

/* Copy the words out, one after the other; in, into words that are all zero. Copying in leaves
 * pages untouched that stay zero, and returns false, having copied, if bits past the end were set.
 */
void ws_bitmap_copy_out(const struct ws_bitmap *map, uint8_t *out);
bool ws_bitmap_copy_in(const struct ws_bitmap *map, const uint8_t *data);

/* What to collect; all in blocks. A bridged gap counts towards both maxima. */
struct ws_run_limits {
    uint64_t gap;
    uint64_t max_length; /* of one extent */
    uint64_t max_total;  /* of all extents together */
    uint64_t max_extents;
};

/* Collect marked runs from block `start` on as offset, length pairs in bytes; `out` holds
 * 2 * max_extents. Returns the number of pairs and sets `next`, the byte to go on from. */
uint64_t ws_bitmap_runs(const struct ws_bitmap *map, uint64_t start,
                        const struct ws_run_limits *limits, uint64_t *out, uint64_t *next);

#endif
