/* Planning and building frames. */
#include "frame_impl.h"

#include <string.h>

/* Runs of zeros begin and end on multiples of this (or where their extent does), so that the pieces
 * fit targets with blocks of up to 4096 bytes. */
#define GRAIN_BYTES 4096u

static void add(struct ws_frame_plan *plan, uint64_t offset, uint64_t length, uint32_t kind) {
    struct ws_frame_extent *last = &plan->table[plan->count - (plan->count > 0)];
    if (length == 0)
        return;
    if (kind == WS_EXTENT_DATA)
        plan->payload_bytes += (uint32_t)length;
    if (plan->count > 0 && last->kind == kind && last->offset + last->length == offset) {
        last->length += length;
        return;
    }
    plan->table[plan->count++] = (struct ws_frame_extent){offset, length, kind, 0};
}

static size_t grain(uint64_t offset, uint64_t left) {
    uint64_t length = GRAIN_BYTES - offset % GRAIN_BYTES;
    return (size_t)(length < left ? length : left);
}

/* The length of the run of grains from `at` on that are all zero (or all not). */
static uint64_t run(const uint8_t *data, uint64_t offset, uint64_t at, uint64_t length, bool zero) {
    uint64_t start = at;
    while (at < length) {
        size_t step = grain(offset + at, length - at);
        if (ws_is_zero(data + at, step) != zero)
            break;
        at += step;
    }
    return at - start;
}

/* Take one extent apart. `spare` entries of the table are free for more than its first piece. */
static void split(struct ws_frame_plan *plan, uint64_t offset, uint64_t length, const uint8_t *data,
                  uint64_t min_zero, size_t spare) {
    uint64_t done = 0;
    if (ws_is_zero(data, length)) {
        add(plan, offset, length, WS_EXTENT_ZERO);
        return;
    }
    for (uint64_t at = 0; at < length && spare >= 2;) {
        uint64_t zeros = run(data, offset, at, length, true);
        if (zeros > 0 && zeros >= min_zero) {
            add(plan, offset + done, at - done, WS_EXTENT_DATA);
            add(plan, offset + at, zeros, WS_EXTENT_ZERO);
            done = at + zeros;
            spare -= 2;
        }
        at += zeros;
        at += run(data, offset, at, length, false);
    }
    add(plan, offset + done, length - done, WS_EXTENT_DATA);
}

void ws_frame_plan_zeros(struct ws_frame_plan *plan, const uint64_t *pairs, size_t count) {
    plan->count = plan->payload_bytes = 0;
    for (size_t i = 0; i < count; i++)
        add(plan, pairs[2 * i], pairs[2 * i + 1], WS_EXTENT_ZERO);
}

void ws_frame_plan_data(struct ws_frame_plan *plan, const uint64_t *pairs, size_t count,
                        const uint8_t *data, uint64_t min_zero) {
    plan->count = plan->payload_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        size_t spare = WS_FRAME_MAX_EXTENTS - plan->count - (count - i);
        split(plan, pairs[2 * i], pairs[2 * i + 1], data, min_zero, spare);
        data += pairs[2 * i + 1];
    }
}

size_t ws_frame_size(const struct ws_frame_plan *plan) {
    return sizeof(struct ws_frame_header) + plan->count * sizeof(struct ws_frame_extent) +
           plan->payload_bytes;
}

static void copy_payload(const struct ws_frame_plan *plan, const uint8_t *data, uint8_t *out) {
    for (size_t i = 0; i < plan->count; i++) {
        if (plan->table[i].kind == WS_EXTENT_DATA) {
            memcpy(out, data, plan->table[i].length);
            out += plan->table[i].length;
        }
        data += plan->table[i].length;
    }
}

/* parts[0] is the header's. */
void ws_frame_seal(struct ws_frame_header *header, struct ws_part *parts, size_t count) {
    uint8_t checksum[WS_DIGEST_BYTES];
    memset(header->checksum, 0, sizeof(header->checksum));
    parts[0] = (struct ws_part){header, sizeof(*header)};
    ws_xxh3_128_parts(parts, count, checksum);
    memcpy(header->checksum, checksum, sizeof(checksum));
}

void ws_frame_build(const struct ws_frame_plan *plan, const struct ws_frame_header *header,
                    const uint8_t *data, uint8_t *out) {
    size_t table_bytes = plan->count * sizeof(struct ws_frame_extent);
    struct ws_frame_header head = {.magic = "WSF1",
                                   .version = WS_FRAME_VERSION,
                                   .kind = WS_FRAME_EXTENTS,
                                   .volume = header->volume,
                                   .extent_count = plan->count,
                                   .generation = header->generation,
                                   .sequence = header->sequence,
                                   .payload_bytes = plan->payload_bytes};
    memcpy(out + sizeof(head), plan->table, table_bytes);
    if (plan->payload_bytes > 0)
        copy_payload(plan, data, out + sizeof(head) + table_bytes);
    struct ws_part parts[2] = {{NULL, 0}, {out + sizeof(head), table_bytes + plan->payload_bytes}};
    ws_frame_seal(&head, parts, 2);
    memcpy(out, &head, sizeof(head));
}
