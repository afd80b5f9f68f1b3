/* Opening and claiming devices and files, their geometry and their read-only flag. */
#define _GNU_SOURCE
#include "blockio_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR_BYTES 512u

/* Take, and give back, a write lease: the kernel grants it only if the file is open nowhere else,
 * by whatever program or loop device (fcntl(2)). File systems without leases cannot tell. */
static int probe_lease(int fd) {
    /* Somebody who opens the file meanwhile makes the kernel send the holder SIGIO, which ends a
     * process that does not expect it; SIGURG is ignored by default. */
    if (fcntl(fd, F_SETSIG, SIGURG) != 0)
        return -errno;
    int rc = fcntl(fd, F_SETLEASE, F_WRLCK) == 0 ? 0 : -errno;
    if (rc == 0 && fcntl(fd, F_SETLEASE, F_UNLCK) != 0)
        return -errno;
    if (rc == -EAGAIN)
        return -EBUSY;
    return 0;
}

static int claim_file(int fd, const char **step) {
    *step = "claim: open elsewhere";
    int rc = probe_lease(fd);
    if (rc != 0)
        return rc;
    *step = "claim: locked by another process";
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    return errno == EWOULDBLOCK ? -EBUSY : -errno;
}

static int open_tail(struct ws_device *dev, const char *path, int flags, const char **step) {
    struct stat first, second;
    *step = "open for the last page";
    dev->tail_fd = open(path, flags);
    if (dev->tail_fd < 0 || fstat(dev->fd, &first) != 0 || fstat(dev->tail_fd, &second) != 0)
        return -errno;
    bool same = first.st_dev == second.st_dev && first.st_ino == second.st_ino;
    return same ? 0 : -ESTALE;
}

/* What direct I/O on the file asks for, where the kernel says so (statx(2), Linux 6.1). */
static void ask_alignment(struct ws_device *dev) {
#ifdef STATX_DIOALIGN
    struct statx status;
    if (statx(dev->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0)
        return;
    if ((status.stx_mask & STATX_DIOALIGN) == 0 || status.stx_dio_offset_align == 0)
        return;
    dev->memory_align = status.stx_dio_mem_align;
    if (!dev->is_block && status.stx_dio_offset_align > SECTOR_BYTES)
        dev->logical = status.stx_dio_offset_align;
#else
    (void)dev;
#endif
}

static int open_file(struct ws_device *dev, const char *path, int flags, bool exclusive,
                     const char **step) {
    struct stat status;
    int rc = exclusive ? claim_file(dev->fd, step) : 0;
    if (rc != 0)
        return rc;
    *step = "inspect";
    if (fstat(dev->fd, &status) != 0)
        return -errno;
    *step = "open for writing: no write permission for anybody";
    if ((flags & O_ACCMODE) == O_RDWR && (status.st_mode & 0222) == 0)
        return -EROFS;
    dev->logical = dev->memory_align = SECTOR_BYTES;
    dev->physical = (uint32_t)status.st_blksize;
    if (!dev->is_direct)
        return 0;
    ask_alignment(dev);
    return open_tail(dev, path, flags, step);
}

static int open_block(struct ws_device *dev, int flags, const char **step) {
    int logical = 0;
    unsigned physical = 0;
    *step = "ask the geometry";
    if (ioctl(dev->fd, BLKSSZGET, &logical) != 0 || ioctl(dev->fd, BLKPBSZGET, &physical) != 0)
        return -errno;
    dev->logical = dev->memory_align = (uint32_t)logical;
    dev->physical = physical;
    ask_alignment(dev);
    *step = "open for writing: the device is read-only";
    int rc = ws_dev_is_read_only(dev);
    if (rc < 0)
        return rc;
    return rc == 1 && (flags & O_ACCMODE) == O_RDWR ? -EROFS : 0;
}

/* File systems that know no direct I/O refuse the flag with EINVAL (open(2)). */
static int open_direct(struct ws_device *dev, const char *path, int flags) {
    dev->fd = open(path, flags | O_DIRECT);
    dev->is_direct = dev->fd >= 0;
    if (dev->fd < 0 && errno == EINVAL && !dev->is_block)
        dev->fd = open(path, flags);
    return dev->fd < 0 ? -errno : 0;
}

static int check_kind(struct ws_device *dev, const struct stat *status) {
    dev->is_block = S_ISBLK(status->st_mode);
    return dev->is_block || S_ISREG(status->st_mode) ? 0 : -ENOTBLK;
}

static int open_any(struct ws_device *dev, const char *path, bool writable, bool exclusive,
                    const char **step) {
    struct stat before, after;
    *step = "open";
    /* Before opening: to open a pipe would wait, to open a tape would wind it. */
    int rc = stat(path, &before) == 0 ? check_kind(dev, &before) : -errno;
    if (rc != 0)
        return rc;
    int flags = (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY;
    rc = open_direct(dev, path, flags | (exclusive && dev->is_block ? O_EXCL : 0));
    if (rc != 0)
        return rc;
    if (fstat(dev->fd, &after) != 0)
        return -errno;
    if (((before.st_mode ^ after.st_mode) & S_IFMT) != 0)
        return -ESTALE;
    return dev->is_block ? open_block(dev, flags, step)
                         : open_file(dev, path, flags, exclusive, step);
}

int ws_dev_open(struct ws_device *dev, const char *path, bool writable, bool exclusive,
                const char **step) {
    memset(dev, 0, sizeof(*dev));
    pthread_mutex_init(&dev->flushing, NULL);
    dev->fd = dev->tail_fd = -1;
    dev->is_writable = writable;
    int rc = open_any(dev, path, writable, exclusive, step);
    if (rc != 0)
        ws_dev_close(dev);
    return rc;
}

/* Errors of close() are those of writes not flushed, and flush() has reported them. */
void ws_dev_close(struct ws_device *dev) {
    if (dev->remote != NULL)
        dev->remote->close(dev->remote);
    dev->remote = NULL;
    if (dev->tail_fd >= 0)
        close(dev->tail_fd);
    if (dev->fd >= 0)
        close(dev->fd);
    dev->fd = dev->tail_fd = -1;
}

int ws_dev_is_read_only(const struct ws_device *dev) {
    int flag = 0;
    struct stat status;
    if (dev->is_block ? ioctl(dev->fd, BLKROGET, &flag) != 0 : fstat(dev->fd, &status) != 0)
        return -errno;
    return dev->is_block ? flag != 0 : (status.st_mode & 0222) == 0;
}

int ws_dev_set_read_only(const struct ws_device *dev, bool read_only) {
    int flag = read_only;
    return ioctl(dev->fd, BLKROSET, &flag) == 0 ? 0 : -errno;
}
