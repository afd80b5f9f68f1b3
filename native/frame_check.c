/* Verifying frames, and writing those that are right. */
#include "frame_impl.h"

#include <errno.h>
#include <string.h>

static int wrong(struct ws_fault *fault, int64_t index, const char *field, uint64_t found,
                 const char *rule, uint64_t wanted) {
    *fault = (struct ws_fault){field, rule, found, wanted, index};
    return -1;
}

/* One range of an ascending list, that must begin at `from` or later and end within `limit`. */
static int check_range(uint64_t offset, uint64_t length, uint64_t from, uint64_t limit, size_t i,
                       struct ws_fault *fault) {
    int64_t index = (int64_t)i;
    if (length == 0)
        return wrong(fault, index, "length", length, "less than", 1);
    if (offset < from)
        return wrong(fault, index, "offset", offset, "before the end of the one before,", from);
    if (offset > limit)
        return wrong(fault, index, "offset", offset, "beyond", limit);
    if (length > limit - offset)
        return wrong(fault, index, "length", length, "more than there are to the end,",
                     limit - offset);
    return 0;
}

int ws_pairs_check(const uint64_t *pairs, size_t count, struct ws_fault *fault) {
    uint64_t end = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t offset = pairs[2 * i], length = pairs[2 * i + 1];
        if (check_range(offset, length, end, INT64_MAX, i, fault) != 0)
            return -1;
        end = offset + length;
    }
    return 0;
}

struct ws_frame_extent ws_frame_entry(const uint8_t *frame, size_t i) {
    struct ws_frame_extent entry;
    memcpy(&entry, frame + sizeof(struct ws_frame_header) + i * sizeof(entry), sizeof(entry));
    return entry;
}

static int check_header(const struct ws_frame_header *header, size_t size, struct ws_fault *fault) {
    uint32_t magic;
    memcpy(&magic, header->magic, sizeof(magic));
    if (memcmp(header->magic, "WSF1", 4) != 0)
        return wrong(fault, -1, "magic", magic, "not", 0x31465357);
    if (header->version != WS_FRAME_VERSION)
        return wrong(fault, -1, "version", header->version, "not", WS_FRAME_VERSION);
    if (header->kind != WS_FRAME_EXTENTS)
        return wrong(fault, -1, "kind", header->kind, "not", WS_FRAME_EXTENTS);
    if (header->flags != 0)
        return wrong(fault, -1, "flags", header->flags, "not", 0);
    if (header->reserved != 0)
        return wrong(fault, -1, "reserved", header->reserved, "not", 0);
    if (header->extent_count > WS_FRAME_MAX_EXTENTS)
        return wrong(fault, -1, "extent count", header->extent_count, "more than",
                     WS_FRAME_MAX_EXTENTS);
    if (header->payload_bytes > WS_FRAME_MAX_PAYLOAD)
        return wrong(fault, -1, "payload length", header->payload_bytes, "more than",
                     WS_FRAME_MAX_PAYLOAD);
    size_t said = sizeof(*header) + header->extent_count * sizeof(struct ws_frame_extent) +
                  header->payload_bytes;
    return size == said ? 0 : wrong(fault, -1, "frame length", size, "not", said);
}

static int check_sum(const uint8_t *frame, size_t size, const struct ws_frame_header *header,
                     struct ws_fault *fault) {
    struct ws_frame_header blank = *header;
    memset(blank.checksum, 0, sizeof(blank.checksum));
    struct ws_part parts[2] = {{&blank, sizeof(blank)},
                               {frame + sizeof(blank), size - sizeof(blank)}};
    uint8_t checksum[WS_DIGEST_BYTES];
    ws_xxh3_128_parts(parts, 2, checksum);
    if (memcmp(checksum, header->checksum, sizeof(checksum)) == 0)
        return 0;
    uint64_t found, wanted;
    memcpy(&found, header->checksum, sizeof(found));
    memcpy(&wanted, checksum, sizeof(wanted));
    return wrong(fault, -1, "checksum", found, "not", wanted);
}

static int check_table(const uint8_t *frame, const struct ws_frame_header *header,
                       struct ws_fault *fault) {
    uint64_t end = 0, data = 0;
    for (size_t i = 0; i < header->extent_count; i++) {
        struct ws_frame_extent entry = ws_frame_entry(frame, i);
        if (entry.kind < WS_EXTENT_DATA || entry.kind > WS_EXTENT_DISCARD)
            return wrong(fault, (int64_t)i, "kind", entry.kind, "none of 1 to", WS_EXTENT_DISCARD);
        if (entry.reserved != 0)
            return wrong(fault, (int64_t)i, "reserved", entry.reserved, "not", 0);
        if (check_range(entry.offset, entry.length, end, INT64_MAX, i, fault) != 0)
            return -1;
        end = entry.offset + entry.length;
        /* Cannot overflow: the ranges are disjoint and within INT64_MAX. */
        data += entry.kind == WS_EXTENT_DATA ? entry.length : 0;
    }
    if (data == header->payload_bytes)
        return 0;
    return wrong(fault, -1, "payload length", header->payload_bytes, "not that of all data,", data);
}

int ws_frame_verify(const uint8_t *frame, size_t size, struct ws_frame_header *header,
                    struct ws_fault *fault) {
    if (size < sizeof(*header))
        return wrong(fault, -1, "frame length", size, "less than a header,", sizeof(*header));
    memcpy(header, frame, sizeof(*header));
    if (check_header(header, size, fault) != 0 || check_sum(frame, size, header, fault) != 0)
        return -1;
    return check_table(frame, header, fault);
}

int ws_frame_fits(const uint8_t *frame, uint64_t size_bytes, uint32_t unit,
                  struct ws_fault *fault) {
    struct ws_frame_header header;
    memcpy(&header, frame, sizeof(header));
    for (size_t i = 0; i < header.extent_count; i++) {
        struct ws_frame_extent entry = ws_frame_entry(frame, i);
        if (check_range(entry.offset, entry.length, 0, size_bytes, i, fault) != 0)
            return -1;
        if (entry.offset % unit != 0)
            return wrong(fault, (int64_t)i, "offset", entry.offset, "no multiple of", unit);
        if (entry.length % unit != 0 && entry.offset + entry.length != size_bytes)
            return wrong(fault, (int64_t)i, "length", entry.length, "no multiple of", unit);
    }
    return 0;
}

/* Discarding is an offer, and what a discarded range reads as is up to the device; where it cannot
 * be done the range is zeroed, so that the bytes do not depend on chance. */
static int apply_hole(struct ws_device *dev, const struct ws_frame_extent *entry,
                      struct ws_applied *applied, struct ws_attempt *why) {
    if (entry->kind == WS_EXTENT_ZERO) {
        applied->zero_bytes += entry->length;
        return ws_dev_write_end(dev, NULL, entry->offset, entry->length, why);
    }
    applied->discard_bytes += entry->length;
    int rc = -EOPNOTSUPP;
    if (entry->length % dev->logical == 0)
        rc = ws_dev_discard(dev, entry->offset, entry->length, why);
    if (rc != -EOPNOTSUPP)
        return rc;
    return ws_dev_write_end(dev, NULL, entry->offset, entry->length, why);
}

/* The run of DATA extents from entry i on that follow one another on the device. */
static uint64_t data_run(const uint8_t *frame, size_t count, size_t *i, uint64_t offset) {
    uint64_t end = offset;
    for (; *i < count; (*i)++) {
        struct ws_frame_extent entry = ws_frame_entry(frame, *i);
        if (entry.kind != WS_EXTENT_DATA || entry.offset != end)
            break;
        end += entry.length;
    }
    return end - offset;
}

int ws_frame_apply(struct ws_device *dev, const uint8_t *frame, void *scratch,
                   struct ws_applied *applied, struct ws_attempt *why) {
    struct ws_frame_header header;
    memcpy(&header, frame, sizeof(header));
    const uint8_t *payload =
        frame + sizeof(header) + header.extent_count * sizeof(struct ws_frame_extent);
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < header.extent_count;) {
        struct ws_frame_extent entry = ws_frame_entry(frame, i);
        if (entry.kind != WS_EXTENT_DATA) {
            rc = apply_hole(dev, &entry, applied, why);
            i++;
            continue;
        }
        /* Each run from the start of the scratch, because that is aligned for any device. */
        uint64_t length = data_run(frame, header.extent_count, &i, entry.offset);
        memcpy(scratch, payload, length);
        rc = ws_dev_write_end(dev, scratch, entry.offset, length, why);
        payload += length;
        applied->data_bytes += length;
    }
    return rc;
}
