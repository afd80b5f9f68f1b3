/* What a chunk kernel is: one set of functions for each instruction set. Private to chunk_*.c. */
#ifndef WARMSYNC_CHUNK_KERNEL_H
#define WARMSYNC_CHUNK_KERNEL_H

#include "chunk_impl.h"

struct ws_chunk_kernel {
    const char *name;
    bool (*is_zero)(const uint8_t *data, size_t len);
    void (*hash)(const void *data, size_t len, uint8_t *out);
    void (*hash_parts)(const struct ws_part *parts, size_t count, uint8_t *out);
    void (*digest_chunks)(const uint8_t *data, size_t len, size_t chunk, uint8_t *out);
};

/* The AVX files switch the instruction set with `#pragma GCC target`, so that one set of compiler
 * flags serves all files. Clang ignores that pragma; it gets the portable kernel only. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WS_HAVE_AVX 1
extern const struct ws_chunk_kernel ws_chunk_avx2, ws_chunk_avx512;
#endif

/* The baseline of the architecture: SSE2 on x86-64, NEON on arm64, plain C elsewhere. */
extern const struct ws_chunk_kernel ws_chunk_portable;

#endif
