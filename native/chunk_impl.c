/* Chooses the chunk kernel and forwards to it. */
#include "chunk_kernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_KERNELS 3

static const struct ws_chunk_kernel *chosen = &ws_chunk_portable;

/* List the kernels that this CPU (and its operating system) can run, best first. */
static size_t list_kernels(const struct ws_chunk_kernel *kernels[MAX_KERNELS]) {
    size_t count = 0;
#ifdef WS_HAVE_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        kernels[count++] = &ws_chunk_avx512;
    if (__builtin_cpu_supports("avx2"))
        kernels[count++] = &ws_chunk_avx2;
#endif
    kernels[count++] = &ws_chunk_portable;
    return count;
}

static const char *describe_refusal(const char *wanted, const struct ws_chunk_kernel **kernels,
                                    size_t count) {
    static char text[256];
    int used = snprintf(text, sizeof(text), "WARMSYNC_CPU=%.64s: choose one of", wanted);
    for (size_t i = 0; i < count; i++)
        used += snprintf(text + used, sizeof(text) - (size_t)used, " %s", kernels[i]->name);
    snprintf(text + used, sizeof(text) - (size_t)used, ", which this CPU has");
    return text;
}

const char *ws_chunk_init(void) {
    const struct ws_chunk_kernel *kernels[MAX_KERNELS];
    size_t count = list_kernels(kernels);
    const char *wanted = getenv("WARMSYNC_CPU");
    if (wanted == NULL || *wanted == '\0') {
        chosen = kernels[0];
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        if (strcmp(wanted, kernels[i]->name) == 0) {
            chosen = kernels[i];
            return NULL;
        }
    }
    return describe_refusal(wanted, kernels, count);
}

const char *ws_chunk_name(void) {
    return chosen->name;
}

bool ws_is_zero(const void *data, size_t len) {
    return chosen->is_zero(data, len);
}

void ws_xxh3_128(const void *data, size_t len, uint8_t out[WS_DIGEST_BYTES]) {
    chosen->hash(data, len, out);
}

void ws_xxh3_128_parts(const struct ws_part *parts, size_t count, uint8_t out[WS_DIGEST_BYTES]) {
    chosen->hash_parts(parts, count, out);
}

void ws_digest_chunks(const uint8_t *data, size_t len, size_t chunk, uint8_t *out) {
    chosen->digest_chunks(data, len, chunk, out);
}
