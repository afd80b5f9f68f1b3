/* Reads around bad sectors. Slow, and only entered after a read has failed. */
#include "blockio_steps.h"

#include <errno.h>

bool ws_is_of_a_place(int rc) {
    return rc == -EIO || rc == -ENODATA || rc == -EREMOTEIO || rc == -EILSEQ;
}

static int keep(struct ws_salvage *salvage, uint64_t offset, uint64_t length,
                struct ws_attempt *why) {
    uint64_t *last = salvage->pairs + 2 * salvage->count;
    salvage->read_bytes += length;
    if (salvage->count > salvage->joint && last[-2] + last[-1] == offset) {
        last[-1] += length;
        return 0;
    }
    if (salvage->count == salvage->room)
        return ws_fail(why, offset, EIO); /* so many extents, and bad ones among them */
    last[0] = offset;
    last[1] = length;
    salvage->count++;
    return 0;
}

static int lose(struct ws_salvage *salvage, uint64_t offset, uint64_t length, int rc) {
    struct ws_unread *last = salvage->unread + salvage->unread_count;
    if (salvage->lost == WS_UNREAD_MAX || salvage->lost == salvage->may_lose)
        return rc;
    salvage->lost++;
    if (salvage->unread_count > 0 && last[-1].offset + last[-1].length == offset &&
        last[-1].error == -rc)
        last[-1].length += length;
    else {
        *last = (struct ws_unread){offset, length, -rc};
        salvage->unread_count++;
    }
    return 0;
}

/* Halve what fails, on borders of units, until it is one. */
static int read_parts(const struct ws_device *dev, uint64_t offset, uint64_t length, char *data,
                      struct ws_salvage *salvage, struct ws_attempt *why) {
    int rc = ws_dev_read(dev, data + salvage->read_bytes, offset, length, why);
    if (rc == 0)
        return keep(salvage, offset, length, why);
    if (!ws_is_of_a_place(rc))
        return rc;
    uint64_t first = offset / salvage->unit, last = (offset + length - 1) / salvage->unit;
    if (first == last)
        return lose(salvage, offset, length, rc);
    uint64_t middle = (first + (last - first + 1) / 2) * salvage->unit;
    rc = read_parts(dev, offset, middle - offset, data, salvage, why);
    return rc != 0 ? rc : read_parts(dev, middle, offset + length - middle, data, salvage, why);
}

int ws_dev_salvage(const struct ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                   struct ws_salvage *salvage, struct ws_attempt *why) {
    salvage->count = salvage->unread_count = 0;
    salvage->lost = 0;
    salvage->read_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        /* A device that has shrunk has no bad sectors. */
        int rc = ws_dev_begin(dev, "read", pairs[2 * i], pairs[2 * i + 1], why);
        if (rc != 0)
            return rc;
        salvage->joint = salvage->count; /* pairs stay apart, as they were given */
        rc = read_parts(dev, pairs[2 * i], pairs[2 * i + 1], data, salvage, why);
        if (rc != 0)
            return rc;
    }
    return 0;
}
