/* Runs of marked blocks, collected into extents. */
#include "bitmap_impl.h"
#include "bitmap_words.h"

static inline uint64_t min(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* The first marked block from `block` on, or block_count. */
static uint64_t next_marked(const struct ws_bitmap *map, uint64_t block) {
    if (block >= map->block_count)
        return map->block_count;
    uint64_t i = block / 64;
    uint64_t word = load_word(&map->words[i]) & (~(uint64_t)0 << (block % 64));
    while (word == 0) {
        i = next_word(map, i + 1);
        if (i == map->word_count)
            return map->block_count;
        word = load_word(&map->words[i]);
    }
    return min(i * 64 + (unsigned)__builtin_ctzll(word), map->block_count);
}

/* The first clean block from `block` on, at most `limit`. */
static uint64_t next_clean(const struct ws_bitmap *map, uint64_t block, uint64_t limit) {
    while (block < limit) {
        uint64_t clean = ~load_word(&map->words[block / 64]) >> (block % 64);
        if (clean != 0)
            return min(block + (unsigned)__builtin_ctzll(clean), limit);
        block = (block / 64 + 1) * 64;
    }
    return limit;
}

/* The end of the extent that starts at the marked block `start`: over gaps of at most `gap` blocks
 * as long as a marked block behind them still fits into `limit`. Never ends in a gap.
 *
 * A word may change while we look (an extent is then an old or a new truth, never a wrong range):
 * the block that was found is taken as marked, so that each turn moves on. */
static uint64_t find_end(const struct ws_bitmap *map, uint64_t start, uint64_t gap,
                         uint64_t limit) {
    uint64_t end = next_clean(map, start + 1, limit);
    while (gap > 0 && end < limit) {
        uint64_t more = next_marked(map, end);
        if (more >= limit || more - end > gap)
            break;
        end = next_clean(map, more + 1, limit);
    }
    return end;
}

uint64_t ws_bitmap_runs(const struct ws_bitmap *map, uint64_t start,
                        const struct ws_run_limits *limits, uint64_t *out, uint64_t *next) {
    uint64_t count = 0, room = limits->max_total, block = start;
    while (count < limits->max_extents && room > 0) {
        block = next_marked(map, block);
        if (block == map->block_count)
            break;
        uint64_t most = min(min(room, limits->max_length), map->block_count - block);
        uint64_t end = find_end(map, block, limits->gap, block + most);
        out[2 * count] = block << map->block_shift;
        out[2 * count + 1] = min(end << map->block_shift, map->size_bytes) - out[2 * count];
        count++;
        room -= end - block;
        block = end;
    }
    /* Past what is clean: whoever goes on from the size's end is spared an empty last batch. */
    *next = min(next_marked(map, block) << map->block_shift, map->size_bytes);
    return count;
}
