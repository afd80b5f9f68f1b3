/* The frame decoder, whole and in parts. Half of the inputs get their checksum mended, as else no
 * input would come past it; both decoders must then agree. */
#include "frame_impl.h"

#include <stdlib.h>
#include <string.h>

/* No byte more than there are: reading beyond is noticed. */
static uint8_t *copy(const uint8_t *data, size_t size) {
    uint8_t *out = malloc(size);
    if (size > 0)
        memcpy(out, data, size);
    return out;
}

static void mend(uint8_t *frame, size_t size) {
    struct ws_frame_header head;
    if (size < sizeof(head))
        return;
    memcpy(&head, frame, sizeof(head));
    struct ws_part parts[2] = {{0}, {frame + sizeof(head), size - sizeof(head)}};
    ws_frame_seal(&head, parts, 2);
    memcpy(frame, &head, sizeof(head));
}

static int check_parts(const uint8_t *frame, size_t size) {
    struct ws_frame_header head;
    struct ws_fault fault;
    if (size < sizeof(head))
        return -1;
    memcpy(&head, frame, sizeof(head));
    if (ws_frame_check_header(&head, WS_FRAME_EXTENTS, false, &fault) != 0)
        return -1;
    size_t table_bytes = head.extent_count * sizeof(struct ws_frame_extent);
    if (size - sizeof(head) != table_bytes + head.payload_bytes)
        return -1;
    struct ws_frame_extent *table = (void *)copy(frame + sizeof(head), table_bytes);
    uint8_t *payload = copy(frame + sizeof(head) + table_bytes, head.payload_bytes);
    int rc = ws_frame_check_parts(&head, table, payload, &fault);
    free(table);
    free(payload);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct ws_frame_header head;
    struct ws_fault fault;
    if (size < 1 || size > WS_FRAME_MAX_BYTES)
        return 0;
    uint8_t *frame = copy(data + 1, size - 1);
    if (data[0] & 1)
        mend(frame, size - 1);
    int parts = check_parts(frame, size - 1);
    int whole = ws_frame_verify(frame, size - 1, &head, &fault);
    if ((parts == 0) != (whole == 0))
        abort();
    if (whole == 0) {
        (void)ws_frame_fits(frame, 1u << 30, 4096, &fault);
        for (size_t i = 0; i < head.extent_count; i++) {
            struct ws_frame_extent entry = ws_frame_entry(frame, i);
            if (ws_extent_fits(&entry, 1u << 30, 4096, i, &fault) == 0 &&
                (entry.offset >= 1u << 30 || entry.length > (1u << 30) - entry.offset))
                abort(); /* beyond the volume */
        }
    }
    free(frame);
    return 0;
}
