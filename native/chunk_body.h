/* The body of a chunk kernel. Each chunk_NAME.c sets the instruction set, defines
 * WS_KERNEL and WS_KERNEL_NAME and includes this once; xxhash.h then picks its own vector code by
 * the macros of that instruction set. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "chunk_kernel.h"

#include <string.h>

/* Bytes looked at between two tests: long enough for the compiler to use whole vectors, short
 * enough that data with something at its start is known at once not to be zero. */
#define STEP 256

static inline uint64_t load(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, sizeof(word));
    return word;
}

static inline bool is_step_zero(const uint8_t *data) {
    uint64_t seen = 0;
    for (size_t i = 0; i < STEP; i += 8)
        seen |= load(data + i);
    return seen == 0;
}

static bool is_zero(const uint8_t *data, size_t len) {
    for (; len >= STEP; data += STEP, len -= STEP)
        if (!is_step_zero(data))
            return false;
    uint64_t seen = 0;
    for (; len >= 8; data += 8, len -= 8)
        seen |= load(data);
    for (; len > 0; data++, len--)
        seen |= *data;
    return seen == 0;
}

static void store(XXH128_hash_t hash, uint8_t *out) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    memcpy(out, canonical.digest, WS_DIGEST_BYTES);
}

static void hash(const void *data, size_t len, uint8_t *out) {
    store(XXH3_128bits(data, len), out);
}

static void hash_parts(const struct ws_part *parts, size_t count, uint8_t *out) {
    XXH3_state_t state;
    XXH3_128bits_reset(&state);
    for (size_t i = 0; i < count; i++)
        if (parts[i].len > 0)
            XXH3_128bits_update(&state, parts[i].data, parts[i].len);
    store(XXH3_128bits_digest(&state), out);
}

/* Zero test and hash chunk by chunk, so that the second finds the data in the CPU's cache. */
static void digest_chunks(const uint8_t *data, size_t len, size_t chunk, uint8_t *out) {
    while (len > 0) {
        size_t take = len < chunk ? len : chunk;
        if (is_zero(data, take))
            memset(out, 0, WS_DIGEST_BYTES);
        else
            hash(data, take, out);
        data += take;
        len -= take;
        out += WS_DIGEST_BYTES;
    }
}

const struct ws_chunk_kernel WS_KERNEL = {WS_KERNEL_NAME, is_zero, hash, hash_parts, digest_chunks};
