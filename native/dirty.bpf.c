/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Marks in a bitmap what was written to one range of one disk.
 *
 * A mark is set when a write completes: a mark set at submission could be taken, and the old data
 * read, before the write lands. Whatever is not known to leave the data alone marks, failed or not;
 * where the range cannot be known `lost` is counted, so that nothing is missed in silence.
 *
 * Completions come in task, softirq and hard interrupt context, and the kernel skips a program that
 * it finds running on the same CPU (`prog->active` in __bpf_trace_run, kernel 6.1 and later). One
 * interrupted program must not cost a mark: each completion program is attached three times, once
 * a context. Marking is idempotent, and at most two of them can be interrupted on one CPU.
 *
 * Structures hold only what is read; libbpf fits offsets and constants to the running kernel. */
#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "dirty.h"

#define KERNEL __attribute__((preserve_access_index))
#define MAX_BIOS 65536 /* bios in one request; drivers take 256 discard ranges at most */

struct gendisk {
    int major;
    int first_minor;
} KERNEL;

struct request_queue {
    struct gendisk *disk;
} KERNEL;

struct block_device {
    struct gendisk *bd_disk;
} KERNEL;

struct bvec_iter {
    __u64 bi_sector;
    unsigned int bi_size;
} KERNEL;

struct bio {
    struct bio *bi_next;
    struct block_device *bi_bdev;
    unsigned int bi_opf;
    struct bvec_iter bi_iter;
    void *bi_private;
} KERNEL;

struct request {
    struct request_queue *q;
    unsigned int cmd_flags;
    unsigned int __data_len;
    __u64 __sector;
    struct bio *bio;
} KERNEL;

/* The values here are placeholders: the running kernel's are used. */
enum req_op {
    REQ_OP_READ,
    REQ_OP_WRITE,
    REQ_OP_FLUSH,
    REQ_OP_DISCARD,
    REQ_OP_SECURE_ERASE,
    REQ_OP_WRITE_ZEROES,
    REQ_OP_DRV_IN,
};

/* Its name before kernel 6.0; libbpf ignores what follows the three underscores. */
enum req_opf {
    REQ_OP_READ___old,
    REQ_OP_WRITE___old,
    REQ_OP_FLUSH___old,
    REQ_OP_DISCARD___old,
    REQ_OP_SECURE_ERASE___old,
    REQ_OP_WRITE_ZEROES___old,
    REQ_OP_DRV_IN___old,
};

/* The first flag follows the operation's bits: it is the macro REQ_OP_BITS, which BTF lacks. */
enum req_flag_bits { __REQ_FAILFAST_DEV };

#define OP_IS(op, name)                                                                            \
    (bpf_core_type_exists(enum req_op)                                                             \
         ? bpf_core_enum_value_exists(enum req_op, name) &&                                        \
               (op) == bpf_core_enum_value(enum req_op, name)                                      \
         : bpf_core_enum_value_exists(enum req_opf, name##___old) &&                               \
               (op) == bpf_core_enum_value(enum req_opf, name##___old))

struct span {
    __u64 sector;
    __u64 count;
};

const volatile struct dirty_watch watch = {};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1); /* word_count, set before loading */
    __type(key, __u32);
    __type(value, __u64);
} dirty SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct dirty_range);
} range SEC(".maps");

/* What bios in flight will write, by their address: on completion their iterators have moved. LRU:
 * an entry left behind is pushed out, and one pushed out too early counts as lost on completion. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, DIRTY_MAX_INFLIGHT);
    __type(key, __u64);
    __type(value, struct span);
} inflight SEC(".maps");

static __always_inline struct dirty_range *counters(void) {
    __u32 zero = 0;
    return bpf_map_lookup_elem(&range, &zero);
}

static __noinline int count_lost(void) {
    struct dirty_range *counted = counters();
    if (counted)
        __sync_fetch_and_add(&counted->lost, 1);
    return 0;
}

static __always_inline void note_seen(void) {
    struct dirty_range *counted = counters();
    if (counted && !counted->seen) /* read first: else all CPUs would fight for the line */
        counted->seen = 1;
}

/* Set bits with a full barrier, even where they are set already. The barrier is the point: without
 * it the data just written by this CPU (loop, zram) may become visible after the mark, so that a
 * take clears the mark and reads the old data. Hence no short cut by looking first; and on other
 * machines than x86 only the fetching variant is a barrier, whose result must be used to get it. */
static __always_inline void mark_word(__u32 index, __u64 bits) {
    __u64 *word = bpf_map_lookup_elem(&dirty, &index);
    if (!word) {
        count_lost();
        return;
    }
#ifdef __TARGET_ARCH_x86
    __sync_fetch_and_or(word, bits); /* lock or: a full barrier, and cheaper than what fetches */
#else
    __u64 before = __sync_fetch_and_or(word, bits);
    asm volatile("" : : "r"(before));
#endif
}

/* A whole word needs no atomic OR: all its bits are ours to set. mark_word() came first. */
static long fill_word(__u32 turn, void *first) {
    __u32 index = *(__u32 *)first + turn;
    volatile __u64 *word = bpf_map_lookup_elem(&dirty, &index);
    if (!word)
        return 1;
    *word = ~0ULL;
    return 0;
}

static __always_inline void mark_words(__u32 first, __u32 last, __u64 head, __u64 tail) {
    if (first == last) {
        mark_word(first, head & tail);
        return;
    }
    mark_word(first, head);
    __u32 next = first + 1;
    /* bpf_loop: the verifier follows no ordinary loop of thousands of turns. */
    if (next < last && bpf_loop(last - next, fill_word, &next, 0) != last - next)
        count_lost();
    mark_word(last, tail);
}

/* Mark the blocks that sectors [sector, sector + count) of the disk touch, clipped to the range. */
static __always_inline int mark(__u64 sector, __u64 count) {
    __u64 start = watch.start_sector, stop = start + watch.sector_count;
    __u64 end = sector + count;
    if (sector < start)
        sector = start;
    if (end > stop)
        end = stop;
    if (sector >= end)
        return 0;
    __u64 first = (sector - start) >> watch.block_shift;
    __u64 last = (end - 1 - start) >> watch.block_shift;
    mark_words(first >> 6, last >> 6, ~0ULL << (first & 63), ~0ULL >> (63 - (last & 63)));
    return 0;
}

static __always_inline __u64 sectors_of(__u32 bytes) {
    return ((__u64)bytes + (1 << DIRTY_SECTOR_SHIFT) - 1) >> DIRTY_SECTOR_SHIFT;
}

static __always_inline _Bool is_ours(struct gendisk *disk) {
    return (__u32)disk->first_minor == watch.minor && (__u32)disk->major == watch.major;
}

static __always_inline __u32 op_of(__u32 flags) {
    return flags & ((1U << bpf_core_enum_value(enum req_flag_bits, __REQ_FAILFAST_DEV)) - 1);
}

static __always_inline _Bool leaves_data_alone(__u32 op) {
    return OP_IS(op, REQ_OP_READ) || OP_IS(op, REQ_OP_FLUSH) || OP_IS(op, REQ_OP_DRV_IN);
}

/* Operations whose sector and length say what they change. Not among them: commands passed through
 * from user space, zone resets (the length is the zone's) and appends (the device picks the place).
 */
static __always_inline _Bool has_range(__u32 op) {
    return OP_IS(op, REQ_OP_WRITE) || OP_IS(op, REQ_OP_DISCARD) || OP_IS(op, REQ_OP_WRITE_ZEROES) ||
           OP_IS(op, REQ_OP_SECURE_ERASE);
}

static long mark_bio(__u32 turn, void *chain) {
    struct bio *bio = *(struct bio **)chain;
    (void)turn;
    if (!bio)
        return 1;
    mark(BPF_CORE_READ(bio, bi_iter.bi_sector), sectors_of(BPF_CORE_READ(bio, bi_iter.bi_size)));
    *(struct bio **)chain = BPF_CORE_READ(bio, bi_next);
    return 0;
}

/* Merged discards need not be neighbours (blk_discard_mergable): each bio has a range of its own,
 * and the request's sector and length fit the first and the sum. */
static __always_inline void mark_discards(struct request *rq) {
    struct bio *bio = rq->bio;
    bpf_loop(MAX_BIOS, mark_bio, &bio, 0);
    if (bio)
        count_lost();
}

/* Request-based disks. A request may complete in parts; the kernel calls before it moves __sector.
 * A flush's second completion has no bytes left. */
static __always_inline int complete_request(struct request *rq, __u32 nr_bytes) {
    if (!is_ours(rq->q->disk))
        return 0;
    note_seen();
    __u32 op = op_of(rq->cmd_flags);
    if (leaves_data_alone(op))
        return 0;
    if (!has_range(op))
        return count_lost();
    if (nr_bytes == 0)
        return 0;
    if (OP_IS(op, REQ_OP_DISCARD) && rq->bio)
        mark_discards(rq);
    else
        mark(rq->__sector, sectors_of(nr_bytes));
    return 0;
}

/* Bio-based disks (device mapper, md, zram, NVMe multipath). A bio is queued once, whole; parts
 * that are split off later complete before it, and it marks for them. */
static __always_inline int remember(struct bio *bio) {
    __u32 op = op_of(bio->bi_opf);
    if (leaves_data_alone(op) || !is_ours(bio->bi_bdev->bd_disk))
        return 0;
    __u64 key = (__u64)bio;
    struct span span = {bio->bi_iter.bi_sector, 0};
    if (has_range(op))
        span.count = sectors_of(bio->bi_iter.bi_size);
    else
        count_lost();
    if (bpf_map_update_elem(&inflight, &key, &span, BPF_ANY))
        count_lost();
    return 0;
}

/* True if the bio was remembered. The last of the three programs forgets it. */
static __always_inline _Bool recall(__u64 bio, _Bool forget) {
    struct span *span = bpf_map_lookup_elem(&inflight, &bio);
    if (!span)
        return 0;
    mark(span->sector, span->count);
    if (forget)
        bpf_map_delete_elem(&inflight, &bio);
    return 1;
}

/* Look for the bio first, whatever its disk: a driver may have sent it on to another. */
static __always_inline int complete_bio(struct bio *bio, _Bool forget) {
    if (recall((__u64)bio, forget)) {
        note_seen();
        return 0;
    }
    if (!is_ours(bio->bi_bdev->bd_disk))
        return 0;
    note_seen();
    if (leaves_data_alone(op_of(bio->bi_opf)))
        return 0;
    /* A part split off (bio_chain: its private is the whole, which will mark), or a write that was
     * in flight before we were attached. */
    __u64 whole = (__u64)bio->bi_private;
    if (!bpf_map_lookup_elem(&inflight, &whole))
        count_lost();
    return 0;
}

struct sent_on {
    __u64 bio;
    _Bool forget;
};

static long recall_bio(__u32 turn, void *context) {
    struct sent_on *sent = context;
    struct bio *bio = (struct bio *)sent->bio;
    (void)turn;
    if (!bio)
        return 1;
    recall(sent->bio, sent->forget);
    sent->bio = (__u64)BPF_CORE_READ(bio, bi_next);
    return 0;
}

/* Bios that a bio-based disk sent on, as they are, to a request-based one (NVMe multipath, md
 * raid0) complete with that one's request, and the kernel reports no bio completion for them. */
static __always_inline int complete_sent_on(struct request *rq, __u32 nr_bytes, _Bool last) {
    if (!rq->bio || leaves_data_alone(op_of(rq->cmd_flags)))
        return 0;
    struct sent_on sent = {(__u64)rq->bio, last && nr_bytes >= rq->__data_len};
    bpf_loop(MAX_BIOS, recall_bio, &sent, 0);
    return sent.bio ? count_lost() : 0;
}

/* A tracepoint's arguments, as its prototype in the kernel's include/trace/events/block.h has them.
 */
#define ARGUMENT(type, index) ((type)context[index])

/* Once each: bios are submitted in task context, and one missed here is counted on completion. */
SEC("tp_btf/block_bio_queue")
int bio_queue(__u64 *context) {
    return remember(ARGUMENT(struct bio *, 0));
}

/* A bio that another driver sends on to our disk is not queued a second time. */
SEC("tp_btf/block_bio_remap")
int bio_remap(__u64 *context) {
    return remember(ARGUMENT(struct bio *, 0));
}

#define RQ_COMPLETE(number, last)                                                                  \
    SEC("tp_btf/block_rq_complete")                                                                \
    int rq_complete_##number(__u64 *context) {                                                     \
        return complete_request(ARGUMENT(struct request *, 0), ARGUMENT(__u32, 2));                \
    }

#define BIO_COMPLETE(number, last)                                                                 \
    SEC("tp_btf/block_bio_complete")                                                               \
    int bio_complete_##number(__u64 *context) {                                                    \
        return complete_bio(ARGUMENT(struct bio *, 1), last);                                      \
    }

#define BIO_SENT_ON(number, last)                                                                  \
    SEC("tp_btf/block_rq_complete")                                                                \
    int bio_sent_on_##number(__u64 *context) {                                                     \
        return complete_sent_on(ARGUMENT(struct request *, 0), ARGUMENT(__u32, 2), last);          \
    }

#define THREE(program) program(0, 0) program(1, 0) program(2, 1)

THREE(RQ_COMPLETE)
THREE(BIO_COMPLETE)
THREE(BIO_SENT_ON)

char LICENSE[] SEC("license") = "Dual BSD/GPL";
