/* What the kernel's side (dirty.bpf.c) and ours (ebpf_impl.c) agree on.
 *
 * dirty_range is pinned and read by later versions of the agent: change DIRTY_VERSION with it. */
#ifndef WARMSYNC_DIRTY_H
#define WARMSYNC_DIRTY_H

#include <linux/types.h>

#define DIRTY_MAGIC 0x5954524944535757ULL /* "WWSDIRTY" */
#define DIRTY_VERSION 2
#define DIRTY_SECTOR_SHIFT                                                                         \
    9 /* the block layer counts in 512 bytes, whatever the device's sector                         \
       */
#define DIRTY_MAX_INFLIGHT 65536 /* bios, or slots for requests */

/* Constants of one loaded object: the verifier sees them as such and folds them. */
struct dirty_watch {
    __u32 major;
    __u32 minor;
    __u64 start_sector;
    __u64 sector_count;
    __u32 block_shift; /* log2 of the sectors in a block */
    __u32 word_count;
    __u32 queue_count; /* hardware queues of a request-based disk, and the tags of each */
    __u32 queue_depth;
};

/* A request in flight, in the slot of its queue and tag; or a bio, in a hash by its address.
 * state: 0 for none, else a sequence number (high half, never 0 for a used one) and the sectors.
 * born: when the request was allocated, which tells it from the next with its tag; 0 for a bio.
 * forgotten: born of a request whose note user space took away, and has added to the sums. */
struct dirty_slot {
    __u64 sector;
    __u64 state;
    __u64 born;
    __u64 forgotten;
};

/* Sectors of the whole disk, whatever the range: as the block layer's own counters of the disk
 * (/sys/block/DISK/stat) have them, discards apart from all other writes. One for each CPU, on a
 * cache line of its own. */
struct dirty_sum {
    __u64 written __attribute__((aligned(64)));
    __u64 discarded;
};

/* The one value of the map "range": what the bitmap beside it means, and the counters. */
struct dirty_range {
    __u64 magic;
    __u32 version;
    __u32 link_count;
    __u32 major;
    __u32 minor;
    __u64 disk_sequence;
    __u64 start_sector;
    __u64 sector_count;
    __u64 block_size_bytes;
    __u32 bio_based;
    __u32 word_count;
    __u32 queue_count;
    __u32 queue_depth;
    /* On a cache line of their own: the rest is never written after attach. */
    __u64 seen __attribute__((aligned(64)));
    __u64 lost;
    /* What user space knows of the disk's own counters: written by it alone. Outlives an agent. */
    __u64 has_base __attribute__((aligned(64)));
    __s64 base_written; /* our sums less the disk's counters, when the two agreed */
    __s64 base_discarded;
};

#endif
