/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Marks in a bitmap what was written to one range of one disk.
 *
 * A request is noted as in flight when it is issued, in the slot of its tag, and marks when it
 * completes: a mark set at issue could be taken, and the old data read, before the write lands. The
 * kernel does not promise that a program runs on each completion: it skips one that it finds
 * running on the same CPU (`prog->active` in __bpf_trace_run), and kernels that shield a process
 * from tracing skip all on an interrupt that arrives on top of it (seen: one of some 50,000
 * completions missing). The note of such a write stays: every take marks it afresh, and so does the
 * next request with its tag, until the disk is seen idle. A write is missed only if neither its
 * issue nor its completion was seen. Bios have no tags: they mark when queued as well.
 *
 * Whatever is not known to leave the data alone marks, failed or not; where the range cannot be
 * known `lost` is counted, so that nothing is missed in silence. And what was seen is added up in
 * `sums`, for user space to hold against the disk's own counters: at any moment they have no more
 * than the sums and the notes. Requests are added when they complete, which the kernel reports
 * before it counts them (blk_update_request, blk_complete_request); those whose completion was
 * missed, when their note is found. Bios are added when queued: drivers count them at their start
 * or at their end.
 *
 * Structures hold only what is read; libbpf fits offsets and constants to the running kernel. */
#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "dirty.h"

#define barrier() asm volatile("" ::: "memory")
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
    __u32 bd_dev;
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

struct blk_mq_hw_ctx {
    unsigned int queue_num;
} KERNEL;

struct request {
    struct request_queue *q;
    struct blk_mq_hw_ctx *mq_hctx;
    unsigned int cmd_flags;
    unsigned int __data_len;
    int tag;
    __u64 __sector;
    struct bio *bio;
    __u64 start_time_ns;
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

/* Requests in flight: a slot for each tag of each queue, which one request has at a time. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1); /* queue_count * queue_depth, set before loading */
    __type(key, __u32);
    __type(value, struct dirty_slot);
} slots SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 1); /* one for each possible CPU, set before loading */
    __type(key, __u32);
    __type(value, struct dirty_sum);
} sums SEC(".maps");

/* Bios in flight by their address: on completion their iterators have moved. LRU: an entry left
 * behind is pushed out, and one pushed out too early counts as lost on completion. */
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, DIRTY_MAX_INFLIGHT);
    __type(key, __u64);
    __type(value, struct dirty_slot);
} bios SEC(".maps");

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

static __always_inline struct dirty_sum *sum_here(void) {
    __u32 cpu = bpf_get_smp_processor_id();
    return bpf_map_lookup_elem(&sums, &cpu);
}

/* Before the mark, whose barrier has the sum in memory before the kernel counts. */
static __always_inline void add(__u32 op, __u64 sectors) {
    struct dirty_sum *sum = sum_here();
    if (!sum)
        count_lost();
    else if (OP_IS(op, REQ_OP_DISCARD))
        __sync_fetch_and_add(&sum->discarded, sectors);
    else
        __sync_fetch_and_add(&sum->written, sectors);
}

/* Of a note it is not known which it was: too much is no harm. */
static __always_inline void add_noted(__u64 sectors) {
    struct dirty_sum *sum = sum_here();
    if (!sum) {
        count_lost();
        return;
    }
    __sync_fetch_and_add(&sum->written, sectors);
    __sync_fetch_and_add(&sum->discarded, sectors);
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

struct bounds {
    struct bio *bio;
    __u64 first;
    __u64 end;
};

static long widen(__u32 turn, void *context) {
    struct bounds *bounds = context;
    struct bio *bio = bounds->bio;
    (void)turn;
    if (!bio)
        return 1;
    __u64 sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
    __u64 end = sector + sectors_of(BPF_CORE_READ(bio, bi_iter.bi_size));
    bounds->first = sector < bounds->first ? sector : bounds->first;
    bounds->end = end > bounds->end ? end : bounds->end;
    bounds->bio = BPF_CORE_READ(bio, bi_next);
    return 0;
}

static __always_inline struct dirty_slot *slot_of(struct request *rq) {
    __u32 queue = rq->mq_hctx->queue_num, tag = rq->tag;
    if (queue >= watch.queue_count || tag >= watch.queue_depth)
        return 0;
    __u32 index = queue * watch.queue_depth + tag;
    return bpf_map_lookup_elem(&slots, &index);
}

static __always_inline void mark_request(struct request *rq, __u32 bytes) {
    if (OP_IS(op_of(rq->cmd_flags), REQ_OP_DISCARD) && rq->bio)
        mark_discards(rq);
    else
        mark(rq->__sector, sectors_of(bytes));
}

/* A note of another request that still lies in the slot is of one whose completion was missed: it
 * has landed, for its tag is used again. A request that the driver turned down and that is issued
 * again finds its own. */
static __always_inline void settle_other(struct dirty_slot *slot, struct request *rq) {
    __u64 state = slot->state;
    if (!(__u32)state || slot->born == rq->start_time_ns)
        return;
    add_noted((__u32)state);
    mark(slot->sector, (__u32)state);
}

static __always_inline void note_request(struct request *rq, __u64 sector, __u64 count) {
    struct dirty_slot *slot = slot_of(rq);
    if (!slot || count >> 32) {
        count_lost();
        return;
    }
    settle_other(slot, rq);
    if ((__u32)slot->state)
        mark(slot->sector, (__u32)slot->state);
    slot->sector = sector;
    slot->born = rq->start_time_ns;
    barrier();
    slot->state = ((slot->state >> 32) + 1) << 32 | count;
}

/* True if it is a write to our disk with a range; what has none is counted. */
static __always_inline _Bool is_write(struct request *rq) {
    __u32 op = op_of(rq->cmd_flags);
    if (leaves_data_alone(op))
        return 0;
    if (!has_range(op))
        count_lost();
    return has_range(op);
}

/* Request-based disks, before the driver sees the request. */
static __always_inline int issue_request(struct request *rq) {
    if (!is_ours(rq->q->disk) || !is_write(rq) || rq->__data_len == 0)
        return 0;
    struct bounds bounds = {rq->bio, rq->__sector, rq->__sector + sectors_of(rq->__data_len)};
    if (OP_IS(op_of(rq->cmd_flags), REQ_OP_DISCARD))
        bpf_loop(MAX_BIOS, widen, &bounds, 0);
    note_request(rq, bounds.first, bounds.end - bounds.first);
    return 0;
}

/* A request may complete in parts; the kernel calls before it moves __sector. A flush's second
 * completion has no bytes left. The note goes after the mark is set, whose barrier keeps the two in
 * order: who takes sees one or the other. */
static __always_inline int complete_request(struct request *rq, __u32 nr_bytes) {
    if (!is_ours(rq->q->disk))
        return 0;
    note_seen();
    if (!is_write(rq) || nr_bytes == 0)
        return 0;
    struct dirty_slot *slot = slot_of(rq);
    if (slot)
        settle_other(slot, rq);
    if (!slot || !slot->forgotten || slot->forgotten != rq->start_time_ns)
        add(op_of(rq->cmd_flags), sectors_of(nr_bytes));
    mark_request(rq, nr_bytes);
    if (slot && nr_bytes >= rq->__data_len) {
        slot->state = slot->state >> 32 << 32; /* no sectors: nothing in flight */
        slot->forgotten = 0;
    }
    return 0;
}

/* Bio-based disks (device mapper, md, zram, NVMe multipath). A bio is queued once, whole; parts
 * that are split off later complete before it, and it marks for them. */
static __always_inline int remember(struct bio *bio, _Bool is_new) {
    __u32 op = op_of(bio->bi_opf);
    if (leaves_data_alone(op) || !is_ours(bio->bi_bdev->bd_disk))
        return 0;
    __u64 key = (__u64)bio;
    struct dirty_slot note = {bio->bi_iter.bi_sector, 0, 0, 0};
    if (has_range(op))
        note.state = sectors_of(bio->bi_iter.bi_size);
    else
        count_lost();
    if (is_new)
        add(op, note.state);
    if (bpf_map_update_elem(&bios, &key, &note, BPF_ANY))
        count_lost();
    return mark(note.sector, note.state);
}

/* True if the bio was remembered. */
static __always_inline _Bool recall(__u64 bio, _Bool forget) {
    struct dirty_slot *note = bpf_map_lookup_elem(&bios, &bio);
    if (!note)
        return 0;
    mark(note->sector, note->state);
    if (forget)
        bpf_map_delete_elem(&bios, &bio);
    return 1;
}

/* Look for the bio first, whatever its disk: a driver may have sent it on to another. */
static __always_inline int complete_bio(struct bio *bio) {
    if (recall((__u64)bio, 1)) {
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
    if (!bpf_map_lookup_elem(&bios, &whole))
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
static __always_inline int complete_sent_on(struct request *rq, __u32 nr_bytes) {
    if (!rq->bio || leaves_data_alone(op_of(rq->cmd_flags)))
        return 0;
    struct sent_on sent = {(__u64)rq->bio, nr_bytes >= rq->__data_len};
    bpf_loop(MAX_BIOS, recall_bio, &sent, 0);
    return sent.bio ? count_lost() : 0;
}

/* A tracepoint's arguments, as its prototype in the kernel's include/trace/events/block.h has them.
 */
#define ARGUMENT(type, index) ((type)context[index])

/* What notes writes stands before what completes them: attached in this order, none completes
 * unknown. */
SEC("tp_btf/block_rq_issue")
int rq_issue(__u64 *context) {
    return issue_request(ARGUMENT(struct request *, 0));
}

SEC("tp_btf/block_rq_complete")
int rq_complete(__u64 *context) {
    return complete_request(ARGUMENT(struct request *, 0), ARGUMENT(__u32, 2));
}

SEC("tp_btf/block_bio_queue")
int bio_queue(__u64 *context) {
    return remember(ARGUMENT(struct bio *, 0), 1);
}

/* A bio that another driver sends on to our disk is not queued a second time; one that only leaves
 * a partition for its disk is. */
SEC("tp_btf/block_bio_remap")
int bio_remap(__u64 *context) {
    struct bio *bio = ARGUMENT(struct bio *, 0);
    return remember(bio, ARGUMENT(__u32, 1) != bio->bi_bdev->bd_dev);
}

SEC("tp_btf/block_bio_complete")
int bio_complete(__u64 *context) {
    return complete_bio(ARGUMENT(struct bio *, 1));
}

SEC("tp_btf/block_rq_complete")
int bio_sent_on(__u64 *context) {
    return complete_sent_on(ARGUMENT(struct request *, 0), ARGUMENT(__u32, 2));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
