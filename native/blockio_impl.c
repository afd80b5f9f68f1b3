#define _GNU_SOURCE
#include "blockio_steps.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

int ws_dev_size(const struct ws_device *dev, uint64_t *size) {
    struct stat status;
    if (dev->remote != NULL) {
        *size = dev->remote->size;
        return 0;
    }
    if (dev->is_block)
        return ioctl(dev->fd, BLKGETSIZE64, size) == 0 ? 0 : -errno;
    if (fstat(dev->fd, &status) != 0)
        return -errno;
    *size = (uint64_t)status.st_size;
    return 0;
}

int ws_dev_begin(const struct ws_device *dev, const char *verb, uint64_t offset, uint64_t length,
                 struct ws_attempt *why) {
    *why = (struct ws_attempt){verb, offset, length, offset};
    if (offset > INT64_MAX || length > INT64_MAX - offset || offset % dev->logical != 0)
        return -EINVAL;
    if (dev->is_block && length % dev->logical != 0)
        return -EINVAL;
    uint64_t size;
    int rc = ws_dev_size(dev, &size);
    if (rc != 0)
        return rc;
    return offset + length > size ? ws_fail(why, offset > size ? offset : size, EIO) : 0;
}

/* Move all of the range through one descriptor. `unit` is what offsets must be multiples of. */
static int move(int fd, bool write, char *data, uint64_t offset, uint64_t length, unsigned unit,
                struct ws_attempt *why) {
    while (length > 0) {
        size_t step = ws_least(length, STEP_BYTES);
        ssize_t done =
            write ? pwrite(fd, data, step, (off_t)offset) : pread(fd, data, step, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return ws_fail(why, offset, errno);
        data += done;
        offset += (uint64_t)done;
        length -= (uint64_t)done;
        /* Nothing, or a stop within a block: the device or file ends here. */
        if (length > 0 && (done == 0 || offset % unit != 0))
            return ws_fail(why, offset, EIO);
    }
    return 0;
}

int ws_dev_move(const struct ws_device *dev, bool write, char *data, uint64_t offset,
                uint64_t length, struct ws_attempt *why) {
    uint64_t tail = dev->tail_fd < 0 ? 0 : ws_least((offset + length) % PAGE_BYTES, length);
    uint64_t head = length - tail;
    unsigned unit = dev->is_direct ? dev->logical : 1;
    int rc = move(dev->fd, write, data, offset, head, unit, why);
    if (rc != 0 || tail == 0)
        return rc;
    return move(dev->tail_fd, write, data + head, offset + head, tail, 1, why);
}

static int transfer(const struct ws_device *dev, bool write, char *data, uint64_t offset,
                    uint64_t length, struct ws_attempt *why) {
    int rc = ws_dev_begin(dev, write ? "write" : "read", offset, length, why);
    if (rc != 0)
        return rc;
    if (dev->is_direct && (uintptr_t)data % dev->memory_align != 0)
        return -EINVAL;
    if (dev->remote != NULL) {
        struct ws_piece piece = {offset, length, data};
        return write ? -EROFS : dev->remote->read(dev->remote, &piece, 1, why);
    }
    return ws_dev_move(dev, write, data, offset, length, why);
}

int ws_dev_read(const struct ws_device *dev, void *data, uint64_t offset, uint64_t length,
                struct ws_attempt *why) {
    return transfer(dev, false, data, offset, length, why);
}

int ws_dev_write(const struct ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                 struct ws_attempt *why) {
    return transfer(dev, true, (char *)data, offset, length, why);
}

#define PIECES 64u

/* A round trip for each range would take long: many are asked for at once. */
static int read_remote(const struct ws_device *dev, const uint64_t *pairs, size_t count, char *data,
                       struct ws_attempt *why) {
    struct ws_piece pieces[PIECES];
    for (size_t i = 0; i < count;) {
        size_t some = 0;
        for (; i < count && some < PIECES; i++) {
            int rc = ws_dev_begin(dev, "read", pairs[2 * i], pairs[2 * i + 1], why);
            if (rc != 0)
                return rc;
            pieces[some++] = (struct ws_piece){pairs[2 * i], pairs[2 * i + 1], data};
            data += pairs[2 * i + 1];
        }
        int rc = dev->remote->read(dev->remote, pieces, some, why);
        if (rc != 0)
            return rc;
    }
    return 0;
}

/* Neighbours are moved together: their bytes are neighbours in memory too. */
static int batch(const struct ws_device *dev, bool write, const uint64_t *pairs, size_t count,
                 char *data, struct ws_attempt *why) {
    if (dev->remote != NULL && !write)
        return read_remote(dev, pairs, count, data, why);
    for (size_t i = 0; i < count;) {
        uint64_t offset = pairs[2 * i], length = pairs[2 * i + 1];
        for (i++; i < count && pairs[2 * i] == offset + length; i++)
            length += pairs[2 * i + 1];
        int rc = transfer(dev, write, data, offset, length, why);
        if (rc != 0)
            return rc;
        data += length;
    }
    return 0;
}

int ws_dev_read_batch(const struct ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                      struct ws_attempt *why) {
    return batch(dev, false, pairs, count, data, why);
}

int ws_dev_write_batch(const struct ws_device *dev, const uint64_t *pairs, size_t count,
                       const void *data, struct ws_attempt *why) {
    return batch(dev, true, pairs, count, (char *)data, why);
}

int ws_dev_flush(struct ws_device *dev, struct ws_attempt *why) {
    *why = (struct ws_attempt){"flush", 0, 0, 0};
    if (dev->remote != NULL) /* nothing is written here, and its server sees each write */
        return 0;
    /* One at a time: the next must not succeed before this one's failure is noted. */
    pthread_mutex_lock(&dev->flushing);
    int rc = dev->flush_error;
    while (rc == 0 && fsync(dev->fd) != 0)
        rc = errno == EINTR ? 0 : -errno;
    if (dev->is_writable)
        dev->flush_error = rc;
    pthread_mutex_unlock(&dev->flushing);
    return rc;
}
