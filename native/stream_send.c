/* The source's end: a round is read, hashed and sent by one thread a connection. While one waits
 * for the network, others read and hash; the batches are taken in ascending order. */
#define _GNU_SOURCE
#include "stream_impl.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH_EXTENTS 1024u
#define MIN_ZERO_BYTES 65536u
/* A batch of which some cannot be read falls into more pairs: see ws_salvage. */
#define MAX_PAIRS (2 * BATCH_EXTENTS + 256)
#define LEAST_UNIT_BYTES 4096u

/* What one connection works with: about 2.3 MiB, and as much again for compression. */
struct lane {
    struct ws_sender *sender;
    struct ws_conn *conn;
    struct ws_ring *ring;
    struct ws_packer *packer; /* NULL: never compress */
    uint8_t *data;            /* one of the sender's payloads */
    uint64_t pairs[2 * MAX_PAIRS];
    struct ws_piece pieces[BATCH_EXTENTS];
    struct ws_frame_extent table[WS_FRAME_MAX_EXTENTS];
    struct ws_part parts[WS_FRAME_MAX_EXTENTS + 2];
    struct iovec vector[WS_FRAME_MAX_EXTENTS + 2];
    uint64_t frames; /* sent in this round */
    int nice;
};

/* A round under way. */
struct round {
    struct ws_sender *sender;
    const struct ws_volume *volumes;
    const struct ws_job *jobs;
    size_t count;
    uint64_t generation;
    pthread_mutex_t lock;
    size_t job;        /* being taken from */
    uint64_t position; /* in it, in bytes */
    uint64_t rest_at;  /* a block larger than a frame goes piece by piece */
    uint64_t rest_bytes;
    struct ws_left_out *left_out;
    struct ws_outcome *outcome;
    _Atomic bool over; /* failed */
};

struct ws_sender {
    struct lane *lanes;
    size_t count;
    uint8_t *payloads;
    unsigned ack_seconds;
    struct ws_pace pace;
    _Atomic bool stopping;
    _Atomic uint32_t frame_bytes, gap_bytes;
    _Atomic int nice;
    _Atomic uint64_t sequence, done_bytes, wire_bytes, packed_frames;
};

struct ws_pace *ws_sender_pace(struct ws_sender *sender) {
    return &sender->pace;
}

void ws_sender_tune(struct ws_sender *sender, uint32_t frame_bytes, uint32_t gap_bytes, int nice) {
    sender->frame_bytes = frame_bytes;
    sender->gap_bytes = gap_bytes;
    sender->nice = nice;
}

struct ws_sender *ws_sender_new(struct ws_conn **conns, size_t count,
                                const struct ws_manner *manner) {
    struct ws_sender *sender = calloc(1, sizeof(*sender));
    if (sender == NULL)
        return NULL;
    ws_pace_init(&sender->pace);
    sender->ack_seconds = manner->ack_seconds;
    ws_sender_tune(sender, WS_FRAME_MAX_PAYLOAD, 0, 0);
    sender->lanes = calloc(count, sizeof(*sender->lanes));
    sender->payloads = ws_payloads_new(count);
    if (sender->lanes == NULL || sender->payloads == NULL) {
        ws_sender_free(sender);
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        struct lane *lane = &sender->lanes[i];
        lane->sender = sender;
        lane->data = sender->payloads + i * WS_FRAME_MAX_PAYLOAD;
        lane->packer = manner->compress ? ws_packer_new() : NULL;
        lane->ring = manner->ring ? ws_ring_new() : NULL;
        sender->count = i + 1;
        if (manner->compress && lane->packer == NULL) {
            ws_sender_free(sender);
            return NULL;
        }
    }
    for (size_t i = 0; i < count; i++) {
        sender->lanes[i].conn = conns[i];
        ws_conn_set_patience(conns[i], manner->patience_seconds, manner->ack_seconds);
    }
    return sender;
}

void ws_sender_free(struct ws_sender *sender) {
    if (sender == NULL)
        return;
    for (size_t i = 0; i < sender->count; i++) {
        struct lane *lane = &sender->lanes[i];
        ws_conn_free(lane->conn);
        ws_ring_free(lane->ring);
        ws_packer_free(lane->packer);
    }
    free(sender->payloads);
    free(sender->lanes);
    ws_pace_destroy(&sender->pace);
    free(sender);
}

/* Where to note a failure; NULL if another was first. With the lock. */
static struct ws_outcome *first_failure(struct round *round, enum ws_failure failure) {
    if (round->over)
        return NULL;
    round->over = true;
    round->outcome->failure = failure;
    return round->outcome;
}

static void give_up(struct round *round, enum ws_failure failure, const struct ws_loss *loss) {
    pthread_mutex_lock(&round->lock);
    struct ws_outcome *outcome = first_failure(round, failure);
    if (outcome != NULL && loss != NULL)
        outcome->loss = *loss;
    pthread_mutex_unlock(&round->lock);
}

static void read_failed(struct round *round, uint32_t volume, int rc,
                        const struct ws_attempt *why) {
    pthread_mutex_lock(&round->lock);
    struct ws_outcome *outcome = first_failure(round, WS_READ_FAILED);
    if (outcome != NULL) {
        outcome->volume = volume;
        outcome->rc = rc;
        outcome->why = *why;
    }
    pthread_mutex_unlock(&round->lock);
}

static size_t take_rest(struct round *round, uint64_t *pairs, uint64_t frame_bytes) {
    uint64_t size = round->rest_bytes < frame_bytes ? round->rest_bytes : frame_bytes;
    pairs[0] = round->rest_at;
    pairs[1] = size;
    round->rest_at += size;
    round->rest_bytes -= size;
    return 1;
}

/* The next batch of at most a frame's bytes; 0 when all is taken. With the lock. */
static size_t take_batch(struct round *round, uint64_t *pairs, uint32_t *volume) {
    uint64_t frame_bytes = round->sender->frame_bytes;
    while (round->job < round->count) {
        const struct ws_job *job = &round->jobs[round->job];
        const struct ws_bitmap *marks = job->marks;
        *volume = job->volume;
        if (round->rest_bytes > 0)
            return take_rest(round, pairs, frame_bytes);
        uint64_t blocks = frame_bytes >> marks->block_shift;
        blocks = blocks == 0 ? 1 : blocks;
        struct ws_run_limits limits = {.gap = round->sender->gap_bytes >> marks->block_shift,
                                       .max_length = blocks,
                                       .max_total = blocks,
                                       .max_extents = BATCH_EXTENTS};
        size_t count = ws_bitmap_runs(marks, round->position >> marks->block_shift, &limits, pairs,
                                      &round->position);
        if (count == 0) {
            round->job++;
            round->position = 0;
        } else if (pairs[1] > frame_bytes) { /* one large block */
            round->rest_at = pairs[0];
            round->rest_bytes = pairs[1];
        } else {
            if (round->position == marks->size_bytes) {
                round->job++;
                round->position = 0;
            }
            return count;
        }
    }
    return 0;
}

/* Neighbours are read together: their bytes are neighbours in memory too. Returns the bytes. */
static uint64_t join(struct lane *lane, size_t count, size_t *pieces) {
    uint64_t total = 0;
    *pieces = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t offset = lane->pairs[2 * i], length = lane->pairs[2 * i + 1];
        struct ws_piece *last = &lane->pieces[*pieces - (*pieces > 0)];
        if (*pieces > 0 && last->offset + last->length == offset)
            last->length += length;
        else
            lane->pieces[(*pieces)++] =
                (struct ws_piece){offset, length, (char *)lane->data + total};
        total += length;
    }
    return total;
}

static void note_digests(const struct ws_volume *volume, const struct lane *lane, size_t count) {
    const uint8_t *data = lane->data;
    for (size_t i = 0; i < count; i++) {
        ws_scan_note(data, lane->pairs[2 * i], lane->pairs[2 * i + 1], volume->size_bytes,
                     volume->digests, volume->stale);
        data += lane->pairs[2 * i + 1];
    }
}

/* The payload's parts from parts[2] on: runs of DATA in the order of the table. Returns the number
 * of all parts; 0 and 1 are for header and table. */
static size_t list_parts(struct lane *lane, const struct ws_frame_plan *plan) {
    const uint8_t *at = lane->data;
    size_t count = 2;
    for (size_t i = 0; i < plan->count; i++) {
        uint64_t length = plan->table[i].length;
        struct ws_part *last = &lane->parts[count - 1];
        if (plan->table[i].kind == WS_EXTENT_DATA) {
            if (count > 2 && (const uint8_t *)last->data + last->len == at)
                last->len += length;
            else
                lane->parts[count++] = (struct ws_part){at, length};
        }
        at += length;
    }
    return count;
}

/* Send the vector in slices, so that limit and pause act within one. */
static int send_paced(struct lane *lane, size_t count, size_t size, struct ws_loss *loss) {
    struct ws_pace *pace = &lane->sender->pace;
    struct iovec *vector = lane->vector;
    while (size > 0) {
        size_t slice = ws_pace_slice(pace), used = 0, whole = 0;
        struct iovec cut = {NULL, 0};
        while (whole < count && used + vector[whole].iov_len <= slice)
            used += vector[whole++].iov_len;
        if (whole < count && used < slice) { /* the last one only in part */
            cut = vector[whole];
            vector[whole].iov_len = slice - used;
            used = slice;
        }
        ws_pace_spend(pace, used);
        if (ws_conn_send(lane->conn, vector, whole + (cut.iov_len > 0), loss) != 0)
            return -1;
        lane->sender->wire_bytes += used;
        size -= used;
        if (cut.iov_len > 0) {
            size_t done = vector[whole].iov_len;
            vector[whole] = (struct iovec){(char *)cut.iov_base + done, cut.iov_len - done};
        }
        vector += whole;
        count -= whole;
    }
    return 0;
}

static int send_parts(struct lane *lane, struct ws_frame_header *head, size_t count,
                      struct ws_loss *loss) {
    const void *packed = NULL;
    size_t packed_bytes = 0;
    if (lane->packer != NULL)
        packed_bytes =
            ws_pack(lane->packer, lane->parts + 2, count - 2, head->payload_bytes, &packed);
    if (packed_bytes > 0) {
        head->flags = WS_FRAME_ZSTD;
        head->packed_bytes = packed_bytes;
        lane->sender->packed_frames++;
    }
    ws_frame_seal(head, lane->parts, count);
    size_t size = 0, used = packed_bytes > 0 ? 2 : count;
    for (size_t i = 0; i < used; i++) {
        lane->vector[i] = (struct iovec){(void *)lane->parts[i].data, lane->parts[i].len};
        size += lane->parts[i].len;
    }
    if (packed_bytes > 0) {
        lane->vector[used++] = (struct iovec){(void *)packed, packed_bytes};
        size += packed_bytes;
    }
    uint64_t started = ws_now_ns();
    if (send_paced(lane, used, size, loss) != 0)
        return -1;
    if (lane->packer != NULL)
        ws_packer_sent(lane->packer, size, ws_now_ns() - started);
    lane->frames++;
    return 0;
}

/* How much more the round may lose. */
static uint32_t may_lose(struct round *round) {
    pthread_mutex_lock(&round->lock);
    uint32_t left = WS_UNREAD_MAX - round->left_out->lost;
    pthread_mutex_unlock(&round->lock);
    return left;
}

static bool leave_out(struct round *round, uint32_t index, const struct ws_salvage *salvage) {
    struct ws_left_out *out = round->left_out;
    pthread_mutex_lock(&round->lock);
    /* Others may have lost some meanwhile. */
    bool fits = salvage->lost <= WS_UNREAD_MAX - out->lost;
    for (size_t i = 0; fits && i < salvage->unread_count; i++) {
        out->volumes[out->count] = index;
        out->ranges[out->count++] = salvage->unread[i];
    }
    if (fits)
        out->lost += salvage->lost;
    pthread_mutex_unlock(&round->lock);
    return fits;
}

/* Read what can be read; the lane's pairs and data are that then. 0 or -errno. */
static int salvage_batch(struct lane *lane, struct round *round, uint32_t index, size_t *count,
                         struct ws_attempt *why) {
    const struct ws_volume *volume = &round->volumes[index];
    uint64_t pairs[2 * MAX_PAIRS];
    struct ws_salvage salvage = {.unit = volume->digests && !volume->stale ? WS_CHUNK_BYTES
                                                                           : LEAST_UNIT_BYTES,
                                 .may_lose = may_lose(round),
                                 .pairs = pairs,
                                 .room = MAX_PAIRS};
    struct ws_attempt first = *why;
    int rc = ws_dev_salvage(volume->device, lane->pairs, *count, lane->data, &salvage, why);
    if (rc != 0)
        return rc;
    if (!leave_out(round, index, &salvage)) {
        *why = first;
        return -EIO;
    }
    *count = salvage.count;
    memcpy(lane->pairs, pairs, salvage.count * 2 * sizeof(*pairs));
    return 0;
}

/* Returns the bytes read, of fewer or more pairs if some could not be; -1: none, see `outcome`. */
static int64_t read_batch(struct lane *lane, struct round *round, uint32_t index, size_t *count) {
    struct ws_attempt why;
    size_t pieces;
    uint64_t total = join(lane, *count, &pieces);
    struct ws_device *device = round->volumes[index].device;
    if (ws_ring_move(lane->ring, device, false, lane->pieces, pieces, &why) == 0)
        return (int64_t)total;
    int rc = salvage_batch(lane, round, index, count, &why);
    if (rc != 0) {
        read_failed(round, index, rc, &why);
        return -1;
    }
    total = 0;
    for (size_t i = 0; i < *count; i++)
        total += lane->pairs[2 * i + 1];
    return (int64_t)total;
}

static int send_batch(struct lane *lane, struct round *round, uint32_t index, size_t count) {
    const struct ws_volume *volume = &round->volumes[index];
    struct ws_loss loss;
    int64_t total = read_batch(lane, round, index, &count);
    if (total <= 0)
        return (int)total;
    if (volume->digests != NULL)
        note_digests(volume, lane, count);
    struct ws_frame_plan plan = {lane->table, 0, 0};
    ws_frame_plan_data(&plan, lane->pairs, count, lane->data, MIN_ZERO_BYTES);
    struct ws_frame_header head = {.magic = "WSF1",
                                   .version = WS_FRAME_VERSION,
                                   .kind = WS_FRAME_EXTENTS,
                                   .volume = index,
                                   .extent_count = plan.count,
                                   .generation = round->generation,
                                   .sequence = ++lane->sender->sequence,
                                   .payload_bytes = plan.payload_bytes};
    lane->parts[1] = (struct ws_part){lane->table, plan.count * sizeof(*plan.table)};
    if (send_parts(lane, &head, list_parts(lane, &plan), &loss) != 0) {
        give_up(round, WS_LOST, &loss);
        return -1;
    }
    lane->sender->done_bytes += (uint64_t)total;
    return 0;
}

static void run_lane(struct lane *lane, struct round *round) {
    lane->nice = 0;
    for (;;) {
        uint32_t volume = 0;
        lane->nice = ws_be_nice(lane->nice, lane->sender->nice);
        ws_pace_spend(&lane->sender->pace, 0);
        if (lane->sender->stopping)
            give_up(round, WS_STOPPED, NULL);
        pthread_mutex_lock(&round->lock);
        size_t count = round->over ? 0 : take_batch(round, lane->pairs, &volume);
        pthread_mutex_unlock(&round->lock);
        if (count == 0 || send_batch(lane, round, volume, count) != 0)
            return;
    }
}

struct errand {
    struct lane *lane;
    struct round *round;
    pthread_t thread;
};

static void *run_errand(void *argument) {
    struct errand *errand = argument;
    run_lane(errand->lane, errand->round);
    return NULL;
}

void ws_sender_send(struct ws_sender *sender, const struct ws_volume *volumes,
                    const struct ws_job *jobs, size_t count, uint64_t generation,
                    struct ws_left_out *left_out, struct ws_outcome *outcome) {
    struct round round = {.sender = sender,
                          .volumes = volumes,
                          .jobs = jobs,
                          .count = count,
                          .generation = generation,
                          .left_out = left_out,
                          .outcome = outcome};
    struct errand errands[WS_CONNECTIONS_MAX];
    size_t started = 0;
    outcome->failure = WS_DONE;
    left_out->count = 0;
    left_out->lost = 0;
    pthread_mutex_init(&round.lock, NULL);
    for (; started < sender->count; started++) {
        errands[started] = (struct errand){.lane = &sender->lanes[started], .round = &round};
        if (pthread_create(&errands[started].thread, NULL, run_errand, &errands[started]) != 0)
            break;
    }
    if (started == 0) /* no thread to be had: in ours */
        run_lane(&sender->lanes[0], &round);
    for (size_t i = 0; i < started; i++)
        pthread_join(errands[i].thread, NULL);
    pthread_mutex_destroy(&round.lock);
}

static void fail(struct ws_outcome *outcome, enum ws_failure failure) {
    outcome->failure = failure;
}

void ws_sender_send_frame(struct ws_sender *sender, const void *frame, size_t size,
                          struct ws_outcome *outcome) {
    struct lane *lane = &sender->lanes[0];
    outcome->failure = WS_DONE;
    ws_pace_spend(&sender->pace, 0);
    if (sender->stopping) {
        fail(outcome, WS_STOPPED);
        return;
    }
    lane->vector[0] = (struct iovec){(void *)frame, size};
    if (send_paced(lane, 1, size, &outcome->loss) != 0)
        fail(outcome, WS_LOST);
    else
        lane->frames++;
}

static struct ws_frame_header end_of(const struct lane *lane, uint64_t generation) {
    struct ws_frame_header head = {.magic = "WSF1",
                                   .version = WS_FRAME_VERSION,
                                   .kind = WS_FRAME_END,
                                   .generation = generation,
                                   .sequence = lane->frames};
    struct ws_part parts[1];
    ws_frame_seal(&head, parts, 1);
    return head;
}

static int await_ack(struct lane *lane, uint64_t generation, uint64_t *flush_ns,
                     struct ws_loss *loss) {
    struct ws_frame_header head;
    struct ws_fault fault;
    struct ws_part parts[1];
    if (ws_conn_receive(lane->conn, &head, sizeof(head), loss) != 0) {
        if (loss->error != EAGAIN)
            return -1;
        char text[80];
        snprintf(text, sizeof(text), "the round was not durable there within %u s",
                 lane->sender->ack_seconds);
        return ws_lose(loss, ETIMEDOUT, text);
    }
    struct ws_frame_header sealed = head;
    ws_frame_seal(&sealed, parts, 1);
    if (ws_frame_check_header(&head, WS_FRAME_ACK, false, &fault) != 0 ||
        memcmp(sealed.checksum, head.checksum, sizeof(head.checksum)) != 0)
        return ws_lose(loss, EPROTO, "its acknowledgement is damaged");
    if (head.generation != generation)
        return ws_lose(loss, EPROTO, "it acknowledged another generation");
    *flush_ns = head.sequence;
    return 0;
}

void ws_sender_end(struct ws_sender *sender, uint64_t generation, uint64_t *flush_ns,
                   struct ws_outcome *outcome) {
    outcome->failure = WS_DONE;
    for (size_t i = 0; i < sender->count; i++) {
        struct ws_frame_header head = end_of(&sender->lanes[i], generation);
        struct iovec vector = {&head, sizeof(head)};
        if (ws_conn_send(sender->lanes[i].conn, &vector, 1, &outcome->loss) != 0) {
            fail(outcome, WS_LOST);
            return;
        }
        sender->lanes[i].frames = 0;
        sender->wire_bytes += sizeof(head);
    }
    if (await_ack(&sender->lanes[0], generation, flush_ns, &outcome->loss) != 0)
        fail(outcome, sender->stopping ? WS_STOPPED : WS_LOST);
}

int ws_sender_check(struct ws_sender *sender, struct ws_loss *loss) {
    for (size_t i = 0; i < sender->count; i++)
        if (ws_conn_check(sender->lanes[i].conn, loss) != 0)
            return -1;
    return 0;
}

void ws_sender_stop(struct ws_sender *sender) {
    sender->stopping = true;
    ws_pace_stop(&sender->pace);
}

void ws_sender_cut(struct ws_sender *sender) {
    for (size_t i = 0; i < sender->count; i++)
        ws_conn_cut(sender->lanes[i].conn);
}

void ws_sender_count(struct ws_sender *sender, uint64_t *done_bytes, uint64_t *wire_bytes,
                     uint64_t *packed_frames) {
    *done_bytes = sender->done_bytes;
    *wire_bytes = sender->wire_bytes;
    *packed_frames = sender->packed_frames;
}
