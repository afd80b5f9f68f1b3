/* Loads dirty.bpf.o, attaches it to one range of one disk, pins it and maps its memory.
 *
 * Functions return 0 or an errno; then `failure` says what was attempted and what libbpf and the
 * kernel's verifier had to say. Thread-safe: a tracker is used by one thread at a time. */
#ifndef WARMSYNC_EBPF_IMPL_H
#define WARMSYNC_EBPF_IMPL_H

#include <stddef.h>
#include <stdint.h>

#include "dirty.h"

typedef struct {
    char attempt[512];
    size_t log_bytes;
    char log[16384]; /* the end of it, where verdicts stand */
} ws_failure;

typedef struct {
    struct dirty_range *range;
    uint64_t *words;
    size_t words_bytes;       /* of the mapping: whole pages */
    struct dirty_slot *slots; /* request-based */
    int bios;                 /* bio-based: descriptor of the map */
    struct dirty_sum *sums;
    unsigned cpus;
} ws_tracker;

/* A write that was issued and has not been seen to complete. */
typedef struct {
    uint64_t key; /* slot or bio */
    uint64_t sector;
    uint64_t state; /* as in dirty_slot */
} ws_in_flight;

int ws_tracker_check(const char *object, ws_failure *failure);

/* `range` says what to watch: magic, version, counts and counters are filled in here. */
int ws_tracker_attach(const char *object, const struct dirty_range *range, const char *pin_dir,
                      ws_tracker *tracker, ws_failure *failure);

int ws_tracker_open(const char *pin_dir, ws_tracker *tracker, ws_failure *failure);

/* Remove pins, links first, and the directory: the kernel detaches. What is missing is no error. */
int ws_tracker_remove(const char *pin_dir, ws_failure *failure);

/* Collect at most `room` of the writes in flight; returns how many there are, or -errno. */
int64_t ws_tracker_in_flight(const ws_tracker *tracker, ws_in_flight *out, size_t room);

/* Forget one, unless it has changed since it was collected. Returns 0 or -errno. */
int ws_tracker_forget(const ws_tracker *tracker, const ws_in_flight *write);

/* What was seen of the whole disk since the attach, in sectors. */
void ws_tracker_sum(const ws_tracker *tracker, uint64_t *written, uint64_t *discarded);

uint64_t ws_tracker_load(const __u64 *counter);
void ws_tracker_unmap(ws_tracker *tracker); /* all but the words, which views may still need */
void ws_tracker_unmap_words(uint64_t *words, size_t bytes);

#endif
