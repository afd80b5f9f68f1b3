/* Zero test and XXH3-128 over chunks, with a kernel chosen for the CPU at run time.
 *
 * Each extension that uses this compiles its own copy of the chunk_*.c files (hidden symbols), so
 * that kernels call it directly, without Python in between; each calls ws_chunk_init() when it is
 * imported. Everything else here is thread-safe and needs no GIL. */
#ifndef WARMSYNC_CHUNK_IMPL_H
#define WARMSYNC_CHUNK_IMPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WS_CHUNK_BYTES 65536
#define WS_DIGEST_BYTES 16

/* A piece of memory to hash; data may be NULL where len is 0. */
struct ws_part {
    const void *data;
    size_t len;
};

/* Choose the kernel: the best this CPU has, or the one that WARMSYNC_CPU names. Returns NULL, or
 * why not (a static text). May be called again; until it is called, the portable kernel serves. */
const char *ws_chunk_init(void);

/* "avx512", "avx2" or "portable". */
const char *ws_chunk_name(void);

/* Is every byte 0? True for no bytes. Any alignment. */
bool ws_is_zero(const void *data, size_t len);

/* The canonical (big endian) XXH3-128 of a buffer, zero or not. */
void ws_xxh3_128(const void *data, size_t len, uint8_t out[WS_DIGEST_BYTES]);

/* The same of several pieces, as if they stood one after the other. */
void ws_xxh3_128_parts(const struct ws_part *parts, size_t count, uint8_t out[WS_DIGEST_BYTES]);

/* A digest for each `chunk` bytes (the last may be short): 16 zero bytes if all of it is zero, else
 * its XXH3-128. `out` holds WS_DIGEST_BYTES * ceil(len / chunk); chunk is at least 1. */
void ws_digest_chunks(const uint8_t *data, size_t len, size_t chunk, uint8_t *out);

#endif
