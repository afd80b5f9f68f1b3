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

int ws_frame_check_header(const struct ws_frame_header *header, uint16_t kind, bool packing,
                          struct ws_fault *fault) {
    uint32_t magic, flags = header->flags;
    memcpy(&magic, header->magic, sizeof(magic));
    if (memcmp(header->magic, "WSF1", 4) != 0)
        return wrong(fault, -1, "magic", magic, "not", 0x31465357);
    if (header->version != WS_FRAME_VERSION)
        return wrong(fault, -1, "version", header->version, "not", WS_FRAME_VERSION);
    if (header->kind != kind)
        return wrong(fault, -1, "kind", header->kind, "not", kind);
    if (packing)
        flags &= ~WS_FRAME_ZSTD;
    if (flags != 0)
        return wrong(fault, -1, "flags", header->flags, "not", 0);
    if (header->extent_count > WS_FRAME_MAX_EXTENTS)
        return wrong(fault, -1, "extent count", header->extent_count, "more than",
                     WS_FRAME_MAX_EXTENTS);
    if (header->payload_bytes > WS_FRAME_MAX_PAYLOAD)
        return wrong(fault, -1, "payload length", header->payload_bytes, "more than",
                     WS_FRAME_MAX_PAYLOAD);
    if (!(header->flags & WS_FRAME_ZSTD) && header->packed_bytes != 0)
        return wrong(fault, -1, "packed length", header->packed_bytes, "not", 0);
    if ((header->flags & WS_FRAME_ZSTD) && header->packed_bytes >= header->payload_bytes)
        return wrong(fault, -1, "packed length", header->packed_bytes, "not less than",
                     header->payload_bytes);
    if (kind != WS_FRAME_EXTENTS && (header->extent_count | header->payload_bytes) != 0)
        return wrong(fault, -1, "extent count", header->extent_count, "or a payload, not", 0);
    return 0;
}

static int check_sum(const struct ws_frame_header *header, struct ws_part *parts, size_t count,
                     struct ws_fault *fault) {
    struct ws_frame_header blank = *header;
    ws_frame_seal(&blank, parts, count);
    if (memcmp(blank.checksum, header->checksum, sizeof(blank.checksum)) == 0)
        return 0;
    uint64_t found, wanted;
    memcpy(&found, header->checksum, sizeof(found));
    memcpy(&wanted, blank.checksum, sizeof(wanted));
    return wrong(fault, -1, "checksum", found, "not", wanted);
}

/* `table` may stand at any address. */
static int check_table(const struct ws_frame_header *header, const void *table,
                       struct ws_fault *fault) {
    uint64_t end = 0, data = 0;
    for (size_t i = 0; i < header->extent_count; i++) {
        struct ws_frame_extent entry;
        memcpy(&entry, (const uint8_t *)table + i * sizeof(entry), sizeof(entry));
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

int ws_frame_check_parts(const struct ws_frame_header *header, const struct ws_frame_extent *table,
                         const uint8_t *payload, struct ws_fault *fault) {
    struct ws_part parts[3] = {{NULL, 0},
                               {table, header->extent_count * sizeof(*table)},
                               {payload, header->payload_bytes}};
    if (check_sum(header, parts, 3, fault) != 0)
        return -1;
    return check_table(header, table, fault);
}

int ws_frame_verify(const uint8_t *frame, size_t size, struct ws_frame_header *header,
                    struct ws_fault *fault) {
    if (size < sizeof(*header))
        return wrong(fault, -1, "frame length", size, "less than a header,", sizeof(*header));
    memcpy(header, frame, sizeof(*header));
    if (ws_frame_check_header(header, WS_FRAME_EXTENTS, false, fault) != 0)
        return -1;
    size_t said = sizeof(*header) + header->extent_count * sizeof(struct ws_frame_extent) +
                  header->payload_bytes;
    if (size != said)
        return wrong(fault, -1, "frame length", size, "not", said);
    struct ws_part parts[2] = {{NULL, 0}, {frame + sizeof(*header), size - sizeof(*header)}};
    if (check_sum(header, parts, 2, fault) != 0)
        return -1;
    return check_table(header, frame + sizeof(*header), fault);
}

int ws_extent_fits(const struct ws_frame_extent *entry, uint64_t size_bytes, uint32_t unit,
                   size_t i, struct ws_fault *fault) {
    if (check_range(entry->offset, entry->length, 0, size_bytes, i, fault) != 0)
        return -1;
    if (entry->offset % unit != 0)
        return wrong(fault, (int64_t)i, "offset", entry->offset, "no multiple of", unit);
    if (entry->length % unit != 0 && entry->offset + entry->length != size_bytes)
        return wrong(fault, (int64_t)i, "length", entry->length, "no multiple of", unit);
    return 0;
}

int ws_frame_fits(const uint8_t *frame, uint64_t size_bytes, uint32_t unit,
                  struct ws_fault *fault) {
    struct ws_frame_header header;
    memcpy(&header, frame, sizeof(header));
    for (size_t i = 0; i < header.extent_count; i++) {
        struct ws_frame_extent entry = ws_frame_entry(frame, i);
        if (ws_extent_fits(&entry, size_bytes, unit, i, fault) != 0)
            return -1;
    }
    return 0;
}

/* Discarding is an offer, and what a discarded range reads as is up to the device; where it cannot
 * be done the range is zeroed, so that the bytes do not depend on chance. */
int ws_frame_apply_hole(struct ws_device *dev, const struct ws_frame_extent *entry,
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
            rc = ws_frame_apply_hole(dev, &entry, applied, why);
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
