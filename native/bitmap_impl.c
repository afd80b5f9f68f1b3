/* Dirty bitmaps: geometry, memory, marking and taking. Runs are in bitmap_runs.c.
 *
 * Memory order. A mark says "the data was written before"; a take says "the data will be read
 * after". So marking is a release and taking an acquire, and a mark that finds its bits already set
 * may skip the write only behind a full fence: see mark_word(). */
#include "bitmap_impl.h"
#include "bitmap_words.h"

#include <string.h>
#include <sys/mman.h>

/* dumps() writes words as they lie in memory and calls it little endian. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are saved as they are");

enum { PAGE_WORDS = 4096 / 8 };

void ws_bitmap_init(struct ws_bitmap *map, uint64_t size_bytes, uint64_t block_size) {
    map->words = NULL;
    map->size_bytes = size_bytes;
    map->block_shift = (unsigned)__builtin_ctzll(block_size);
    map->block_count = ((size_bytes - 1) >> map->block_shift) + 1;
    map->word_count = (map->block_count - 1) / 64 + 1;
}

int ws_bitmap_map(struct ws_bitmap *map) {
    /* NORESERVE: a 16 TiB volume at 4 KiB a block is 512 MiB of addresses, mostly never touched. */
    void *words = mmap(NULL, map->word_count * 8, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words == MAP_FAILED)
        return -1;
    map->words = words;
    return 0;
}

void ws_bitmap_unmap(struct ws_bitmap *map) {
    if (map->words != NULL)
        munmap(map->words, map->word_count * 8);
    map->words = NULL;
}

/* Set bits of one word. Where they are set already, nothing is written: hot blocks are marked over
 * and over, and a write would pull the cache line away from the other threads each time.
 *
 * Safe against a take because of the caller's full fence between the data and this load: if the
 * load sees the bits, the clearing that takes them comes after it in the word's modification order;
 * the taker fences too before it reads data, so it must see the data written before our fence
 * (store buffering, C11 7.17.4: both sides fenced, so not both can miss the other). Without
 * the fence x86 too may let the load pass the data still in its store buffer, and the mark is lost.
 */
static inline void mark_word(uint64_t *word, uint64_t bits) {
    if ((load_word(word) & bits) != bits)
        __atomic_fetch_or(word, bits, __ATOMIC_RELEASE);
}

/* Bits `first` to `last` (both included) of a word. */
static inline uint64_t bits_between(unsigned first, unsigned last) {
    return (~(uint64_t)0 << first) & (~(uint64_t)0 >> (63 - last));
}

void ws_bitmap_set_range(const struct ws_bitmap *map, uint64_t offset, uint64_t length) {
    if (length == 0)
        return;
    uint64_t first = offset >> map->block_shift;
    uint64_t last = (offset + length - 1) >> map->block_shift;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint64_t i = first / 64; i <= last / 64; i++)
        mark_word(&map->words[i],
                  bits_between(i == first / 64 ? first % 64 : 0, i == last / 64 ? last % 64 : 63));
}

void ws_bitmap_clear_range(const struct ws_bitmap *map, uint64_t offset, uint64_t length) {
    uint64_t block = (uint64_t)1 << map->block_shift;
    uint64_t first = (offset >> map->block_shift) + ((offset & (block - 1)) != 0);
    uint64_t end = offset + length == map->size_bytes ? map->block_count
                                                      : (offset + length) >> map->block_shift;
    if (length == 0 || first >= end)
        return;
    uint64_t last = end - 1;
    for (uint64_t i = next_word(map, first / 64); i <= last / 64; i = next_word(map, i + 1))
        __atomic_fetch_and(
            &map->words[i],
            ~bits_between(i == first / 64 ? first % 64 : 0, i == last / 64 ? last % 64 : 63),
            __ATOMIC_RELAXED);
}

void ws_bitmap_set_all(const struct ws_bitmap *map) {
    for (uint64_t i = 0; i < map->word_count; i++)
        __atomic_store_n(&map->words[i], valid_bits(map, i), __ATOMIC_RELEASE);
}

void ws_bitmap_clear(const struct ws_bitmap *map) {
    for (uint64_t i = 0; i < map->word_count; i++)
        if (load_word(&map->words[i]) != 0)
            __atomic_store_n(&map->words[i], 0, __ATOMIC_RELAXED);
}

/* The end of the run of pages, from word `first` on, that hold marks. */
static uint64_t marked_pages_end(const struct ws_bitmap *map, uint64_t first) {
    uint64_t end = first + PAGE_WORDS;
    while (end < map->word_count && next_word(map, end) < end + PAGE_WORDS)
        end += PAGE_WORDS;
    return end < map->word_count ? end : map->word_count;
}

void ws_bitmap_drop(const struct ws_bitmap *map) {
    /* Not all in one go: what only was looked at would have to be mapped again, page by page, which
     * takes three times as long as the look itself. */
    for (uint64_t i = next_word(map, 0); i < map->word_count; i = next_word(map, i)) {
        uint64_t first = i / PAGE_WORDS * PAGE_WORDS;
        i = marked_pages_end(map, first);
        /* Refused for locked memory (mlockall), and where pages are larger. */
        if (madvise(map->words + first, (i - first) * 8, MADV_DONTNEED) != 0)
            memset(map->words + first, 0, (i - first) * 8);
    }
}

bool ws_bitmap_is_marked(const struct ws_bitmap *map, uint64_t offset) {
    uint64_t block = offset >> map->block_shift;
    return load_word(&map->words[block / 64]) >> (block % 64) & 1;
}

/* A word that is zero when looked at is left alone: a mark that lands later is for the next take.
 */
COUNTING(take)(const struct ws_bitmap *map, const struct ws_bitmap *into) {
    uint64_t taken = 0;
    for (uint64_t i = next_word(map, 0); i < map->word_count; i = next_word(map, i + 1)) {
        uint64_t bits = valid_word(map, i);
        __atomic_fetch_or(&into->words[i], bits, __ATOMIC_RELEASE);
        /* Only now, and only these: both may be shared memory that outlives a process that is
         * killed between the two. A bit that is set again in between is cleared here, but its
         * block is read later than this. */
        __atomic_fetch_and(&map->words[i], ~bits & valid_bits(map, i), __ATOMIC_ACQ_REL);
        taken += (uint64_t)__builtin_popcountll(bits);
    }
    return taken;
}

COUNTING(count)(const struct ws_bitmap *map, const struct ws_bitmap *unused) {
    (void)unused;
    uint64_t marked = 0;
    for (uint64_t i = next_word(map, 0); i < map->word_count; i = next_word(map, i + 1))
        marked += (uint64_t)__builtin_popcountll(valid_word(map, i));
    return marked;
}

COUNTING_DISPATCH(take)
COUNTING_DISPATCH(count)

uint64_t ws_bitmap_take(const struct ws_bitmap *map, const struct ws_bitmap *into) {
    uint64_t taken = take(map, into);
    /* The other half of mark_word()'s bargain. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return taken;
}

uint64_t ws_bitmap_count(const struct ws_bitmap *map) {
    return count(map, NULL);
}

uint64_t ws_bitmap_count_bytes(const struct ws_bitmap *map) {
    uint64_t bytes = count(map, NULL) << map->block_shift;
    uint64_t last_block_end = map->block_count << map->block_shift;
    if (bytes > 0 && ws_bitmap_is_marked(map, map->size_bytes - 1))
        bytes -= last_block_end - map->size_bytes;
    return bytes;
}

void ws_bitmap_merge(const struct ws_bitmap *map, const struct ws_bitmap *other) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint64_t i = next_word(other, 0); i < other->word_count; i = next_word(other, i + 1))
        mark_word(&map->words[i], valid_word(other, i));
}

void ws_bitmap_subtract(const struct ws_bitmap *map, const struct ws_bitmap *other) {
    for (uint64_t i = next_word(other, 0); i < other->word_count; i = next_word(other, i + 1))
        if ((load_word(&map->words[i]) & valid_word(other, i)) != 0)
            __atomic_fetch_and(&map->words[i], ~valid_word(other, i), __ATOMIC_RELAXED);
}

void ws_bitmap_merge_common(const struct ws_bitmap *map, const struct ws_bitmap *one,
                            const struct ws_bitmap *other) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint64_t i = next_word(one, 0); i < one->word_count; i = next_word(one, i + 1)) {
        uint64_t bits = valid_word(one, i) & load_word(&other->words[i]);
        if (bits != 0)
            mark_word(&map->words[i], bits);
    }
}

void ws_bitmap_touch(const struct ws_bitmap *map, const struct ws_bitmap *other) {
    enum { RUNS = 64 };
    const struct ws_run_limits limits = {0, UINT64_MAX, UINT64_MAX, RUNS};
    uint64_t pairs[2 * RUNS], at = 0;
    while (at < other->size_bytes) {
        uint64_t found = ws_bitmap_runs(other, at >> other->block_shift, &limits, pairs, &at);
        for (uint64_t i = 0; i < found; i++)
            ws_bitmap_set_range(map, pairs[2 * i], pairs[2 * i + 1]);
    }
}

void ws_bitmap_copy_out(const struct ws_bitmap *map, uint8_t *out) {
    for (uint64_t i = 0; i < map->word_count; i++) {
        uint64_t word = valid_word(map, i);
        memcpy(out + i * 8, &word, 8);
    }
}

bool ws_bitmap_copy_in(const struct ws_bitmap *map, const uint8_t *data) {
    uint64_t stray = 0;
    for (uint64_t i = 0; i < map->word_count; i++) {
        uint64_t word;
        memcpy(&word, data + i * 8, 8);
        stray |= word & ~valid_bits(map, i);
        if (word != 0)
            __atomic_store_n(&map->words[i], word & valid_bits(map, i), __ATOMIC_RELAXED);
    }
    return stray == 0;
}
