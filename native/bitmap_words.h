/* How the words of a bitmap are read. Private to bitmap_*.c. */
#ifndef WARMSYNC_BITMAP_WORDS_H
#define WARMSYNC_BITMAP_WORDS_H

#include "bitmap_impl.h"

static inline uint64_t load_word(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* The bits of word i that stand for a block. The words may be shared (with the kernel, or through
 * the buffer protocol), so what lies past the last block is never believed. */
static inline uint64_t valid_bits(const struct ws_bitmap *map, uint64_t i) {
    unsigned used = map->block_count % 64;
    return i + 1 < map->word_count || used == 0 ? ~(uint64_t)0 : ((uint64_t)1 << used) - 1;
}

static inline uint64_t valid_word(const struct ws_bitmap *map, uint64_t i) {
    return load_word(&map->words[i]) & valid_bits(map, i);
}

/* The first word from i on that is not zero, or word_count. Eight at a time: bitmaps are mostly
 * zero, and what is not written does not change while we look. */
static inline uint64_t next_word(const struct ws_bitmap *map, uint64_t i) {
    const uint64_t *words = map->words;
    for (; i + 8 <= map->word_count; i += 8) {
        uint64_t seen = 0;
        for (unsigned k = 0; k < 8; k++)
            seen |= load_word(&words[i + k]);
        if (seen != 0)
            break;
    }
    while (i < map->word_count && load_word(&words[i]) == 0)
        i++;
    return i;
}

/* A function that counts bits, compiled twice: without a flag gcc makes __builtin_popcountll a
 * call through a table, as x86-64's baseline lacks the instruction (arm64's does not). */
#define COUNTING(name) static inline __attribute__((always_inline)) uint64_t name##_body
#if defined(__x86_64__)
#define COUNTING_DISPATCH(name)                                                                    \
    __attribute__((target("popcnt"))) static uint64_t name##_popcnt(                               \
        const struct ws_bitmap *map, const struct ws_bitmap *other) {                              \
        return name##_body(map, other);                                                            \
    }                                                                                              \
    static uint64_t name(const struct ws_bitmap *map, const struct ws_bitmap *other) {             \
        return __builtin_cpu_supports("popcnt") ? name##_popcnt(map, other)                        \
                                                : name##_body(map, other);                         \
    }
#else
#define COUNTING_DISPATCH(name)                                                                    \
    static uint64_t name(const struct ws_bitmap *map, const struct ws_bitmap *other) {             \
        return name##_body(map, other);                                                            \
    }
#endif

#endif
