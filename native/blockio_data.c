/* Where a file, or the file under a loop device, may hold data. */
#define _GNU_SOURCE
#include "blockio_impl.h"

#include <errno.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* The kernel's own packing of a device number (new_encode_dev() in linux/kdev_t.h). */
static uint64_t decode_device(uint64_t packed) {
    unsigned major_number = (packed >> 8) & 0xfff;
    unsigned minor_number = (packed & 0xff) | ((packed >> 12) & 0xfff00);
    return makedev(major_number, minor_number);
}

int ws_loop_status(int fd, struct ws_loop *loop) {
    struct loop_info64 info;
    if (ioctl(fd, LOOP_GET_STATUS64, &info) != 0)
        return -errno;
    if (info.lo_encrypt_type != LO_CRYPT_NONE)
        return -ENOTSUP;
    loop->device = decode_device(info.lo_device);
    loop->inode = info.lo_inode;
    loop->offset = info.lo_offset;
    loop->size_limit = info.lo_sizelimit;
    return 0;
}

int ws_next_data(int fd, uint64_t from, uint64_t limit, uint64_t least, uint64_t *start,
                 uint64_t *end) {
    *start = *end = limit;
    if (from >= limit)
        return 0;
    off_t data = lseek(fd, (off_t)from, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 0 : -errno;
    if ((uint64_t)data >= limit)
        return 0;
    off_t hole = lseek(fd, data, SEEK_HOLE);
    /* The range was cut off or punched between the two calls: one byte of it keeps us going. */
    if ((hole < 0 && errno == ENXIO) || hole == data)
        hole = data + 1;
    if (hole < 0)
        return -errno;
    *start = (uint64_t)data;
    *end = (uint64_t)hole - (uint64_t)data < least ? (uint64_t)data + least : (uint64_t)hole;
    if (*end > limit)
        *end = limit;
    return 0;
}
