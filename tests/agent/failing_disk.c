// Preloaded into a process, so that the disk of its journal fails as it is told.
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

int failing_syncs; // so many, from now on
int read_only;     // as a file system makes itself after an error

int fdatasync(int fd) {
    if (failing_syncs > 0) {
        failing_syncs--;
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    if (read_only && failing_syncs == 0) {
        errno = EROFS;
        return -1;
    }
    return syscall(SYS_pwrite64, fd, data, length, offset);
}
