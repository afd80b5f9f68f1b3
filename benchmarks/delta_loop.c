/* The yardstick of a delta: what it takes just to read given 4 KiB blocks of one device, to write
 * them to another and to flush that. Nothing is sent, checked or looked for.
 *
 *   delta_loop SOURCE TARGET OFFSETS              a file of 64-bit offsets; prints seconds */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define THREADS 4

static int source, target;
static int64_t *offsets;
static long count;

static void fail(const char *what) {
    fprintf(stderr, "delta_loop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *carry(void *argument) {
    long index = (long)argument;
    void *buffer;
    errno = posix_memalign(&buffer, BLOCK, BLOCK);
    if (errno)
        fail("posix_memalign");
    for (long i = count * index / THREADS; i < count * (index + 1) / THREADS; i++) {
        if (pread(source, buffer, BLOCK, offsets[i]) != BLOCK)
            fail("pread");
        if (pwrite(target, buffer, BLOCK, offsets[i]) != BLOCK)
            fail("pwrite");
    }
    free(buffer);
    return NULL;
}

static void load(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0)
        fail(path);
    count = ftell(file) / (long)sizeof(*offsets);
    rewind(file);
    offsets = calloc((size_t)count, sizeof(*offsets));
    if (!offsets || fread(offsets, sizeof(*offsets), (size_t)count, file) != (size_t)count)
        fail(path);
    fclose(file);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int words, char **word) {
    pthread_t threads[THREADS];
    if (words != 4)
        return 2;
    source = open(word[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    target = open(word[2], O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (source < 0 || target < 0)
        fail("open");
    load(word[3]);
    double started = now();
    for (long i = 0; i < THREADS; i++) {
        errno = pthread_create(&threads[i], NULL, carry, (void *)i);
        if (errno)
            fail("pthread_create");
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (fsync(target) != 0)
        fail("fsync");
    printf("%.6f\n", now() - started);
    return 0;
}
