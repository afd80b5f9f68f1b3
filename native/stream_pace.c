/* A token bucket that can be changed, paused and ended while it is being waited for. */
#define _GNU_SOURCE
#include "stream_impl.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A debt of so much time is let go at once: shorter waits would only cost wake-ups. */
#define BURST_SECONDS 0.02
#define SLICE_BYTES ((size_t)256 << 10)
#define LEAST_SLICE_BYTES ((size_t)4 << 10)
#define SLICES_A_SECOND 50

/* Threads have their own niceness on Linux (setpriority(2), "C library/kernel differences"). Where
 * it may not be lowered again it stays: slower, not wrong. */
int ws_be_nice(int now, int wanted) {
    if (now != wanted)
        (void)setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), wanted);
    return wanted;
}

uint64_t ws_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void ws_pace_init(struct ws_pace *pace) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    *pace = (struct ws_pace){.eager = true, .paid_ns = ws_now_ns()};
    pthread_mutex_init(&pace->lock, NULL);
    pthread_cond_init(&pace->change, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

void ws_pace_destroy(struct ws_pace *pace) {
    pthread_cond_destroy(&pace->change);
    pthread_mutex_destroy(&pace->lock);
}

static void pay(struct ws_pace *pace) {
    uint64_t now = ws_now_ns();
    double paid = (double)(now - pace->paid_ns) / 1e9 * (double)pace->limit;
    pace->debt = pace->limit == 0 || paid > pace->debt ? 0 : pace->debt - paid;
    pace->paid_ns = now;
}

static void changed(struct ws_pace *pace) {
    pace->eager = pace->limit == 0 && !pace->paused;
    pthread_cond_broadcast(&pace->change);
    pthread_mutex_unlock(&pace->lock);
}

void ws_pace_limit(struct ws_pace *pace, uint64_t bytes_per_second) {
    pthread_mutex_lock(&pace->lock);
    pay(pace);
    pace->limit = bytes_per_second;
    /* What was sent under another limit is not held against this one. */
    double burst = BURST_SECONDS * (double)bytes_per_second;
    pace->debt = pace->debt < burst ? pace->debt : burst;
    changed(pace);
}

void ws_pace_pause(struct ws_pace *pace, bool paused) {
    pthread_mutex_lock(&pace->lock);
    pace->paused = paused;
    changed(pace);
}

void ws_pace_stop(struct ws_pace *pace) {
    pthread_mutex_lock(&pace->lock);
    pace->stopping = true;
    changed(pace);
}

static void wait_for(struct ws_pace *pace, double seconds) {
    uint64_t until = ws_now_ns() + (uint64_t)(seconds * 1e9);
    struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&pace->change, &pace->lock, &at);
}

void ws_pace_spend(struct ws_pace *pace, size_t size) {
    if (pace->eager)
        return;
    pthread_mutex_lock(&pace->lock);
    while (pace->paused && !pace->stopping)
        pthread_cond_wait(&pace->change, &pace->lock);
    pay(pace);
    pace->debt += (double)size;
    while (!pace->stopping && pace->limit > 0) {
        double excess = pace->debt / (double)pace->limit - BURST_SECONDS;
        if (excess <= 0)
            break;
        wait_for(pace, excess);
        pay(pace);
    }
    while (pace->paused && !pace->stopping)
        pthread_cond_wait(&pace->change, &pace->lock);
    pthread_mutex_unlock(&pace->lock);
}

size_t ws_pace_slice(struct ws_pace *pace) {
    if (pace->eager)
        return SLICE_BYTES;
    pthread_mutex_lock(&pace->lock);
    size_t slice = pace->limit == 0 ? SLICE_BYTES : (size_t)(pace->limit / SLICES_A_SECOND);
    pthread_mutex_unlock(&pace->lock);
    slice = slice > SLICE_BYTES ? SLICE_BYTES : slice;
    return slice < LEAST_SLICE_BYTES ? LEAST_SLICE_BYTES : slice;
}
