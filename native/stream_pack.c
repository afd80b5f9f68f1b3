/* zstd, frame by frame, only where it pays: what is saved on the wire must take the link longer
 * than the compression takes. Where it does not, a frame is tried now and then, as data and links
 * change. */
#include "stream_impl.h"

#include <stdlib.h>
#include <zstd.h>

#define LEVEL 1 /* links of some 100 MB/s; higher levels are slower than those */
#define TRY_EVERY 32
/* How much the newest frame counts for. */
#define WEIGHT 0.25
/* A frame that shrinks by less than this is not worth the target's work. */
#define LEAST_GAIN 0.05

struct ws_packer {
    ZSTD_CCtx *context;
    uint8_t *out;
    size_t room;
    double wire_ns_a_byte; /* while the link was busy with frames of this connection */
    double pack_ns_a_byte;
    double gain;      /* share of a frame that compression saves */
    unsigned untried; /* frames since the last one that was compressed */
    bool known;
};

struct ws_packer *ws_packer_new(void) {
    struct ws_packer *packer = calloc(1, sizeof(*packer));
    if (packer == NULL)
        return NULL;
    packer->room = ZSTD_compressBound(WS_FRAME_MAX_PAYLOAD);
    packer->context = ZSTD_createCCtx();
    packer->out = malloc(packer->room);
    if (packer->context == NULL || packer->out == NULL) {
        ws_packer_free(packer);
        return NULL;
    }
    ZSTD_CCtx_setParameter(packer->context, ZSTD_c_compressionLevel, LEVEL);
    return packer;
}

void ws_packer_free(struct ws_packer *packer) {
    if (packer == NULL)
        return;
    ZSTD_freeCCtx(packer->context);
    free(packer->out);
    free(packer);
}

static void learn(double *value, double seen, bool known) {
    *value = known ? *value + (seen - *value) * WEIGHT : seen;
}

static bool pays(const struct ws_packer *packer) {
    return packer->gain > LEAST_GAIN &&
           packer->gain * packer->wire_ns_a_byte > packer->pack_ns_a_byte;
}

static size_t compress(struct ws_packer *packer, const struct ws_part *parts, size_t count) {
    ZSTD_outBuffer out = {packer->out, packer->room, 0};
    ZSTD_CCtx_reset(packer->context, ZSTD_reset_session_only);
    for (size_t i = 0; i < count; i++) {
        ZSTD_inBuffer in = {parts[i].data, parts[i].len, 0};
        ZSTD_EndDirective end = i + 1 == count ? ZSTD_e_end : ZSTD_e_continue;
        size_t left;
        do {
            left = ZSTD_compressStream2(packer->context, &out, &in, end);
            if (ZSTD_isError(left) || out.pos == out.size)
                return 0;
        } while (end == ZSTD_e_end ? left > 0 : in.pos < in.size);
    }
    return out.pos;
}

size_t ws_pack(struct ws_packer *packer, const struct ws_part *parts, size_t count, size_t size,
               const void **packed) {
    if (size == 0 || (packer->known && !pays(packer) && ++packer->untried < TRY_EVERY))
        return 0;
    uint64_t started = ws_now_ns();
    size_t smaller = compress(packer, parts, count);
    double took = (double)(ws_now_ns() - started) / (double)size;
    double gain = smaller == 0 || smaller >= size ? 0 : 1 - (double)smaller / (double)size;
    /* After a while without a try the old figures tell nothing. */
    bool fresh = packer->known && packer->untried < TRY_EVERY;
    learn(&packer->gain, gain, fresh);
    learn(&packer->pack_ns_a_byte, took, fresh);
    packer->untried = 0;
    packer->known = true;
    *packed = packer->out;
    return gain > LEAST_GAIN ? smaller : 0;
}

void ws_packer_sent(struct ws_packer *packer, size_t size, uint64_t nanoseconds) {
    learn(&packer->wire_ns_a_byte, (double)nanoseconds / (double)size, packer->wire_ns_a_byte > 0);
}

int ws_unpack(const void *packed, size_t size, void *out, size_t room) {
    size_t got = ZSTD_decompress(out, room, packed, size);
    return !ZSTD_isError(got) && got == room ? 0 : -1;
}
