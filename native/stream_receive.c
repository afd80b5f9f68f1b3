/* The target's end: one thread a connection receives frames, verifies them and writes them,
 * straight from where they arrived. While one waits for the device, the others receive. What cannot
 * be written at once stays in the sockets, and so holds the source back. */
#include "stream_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What one connection works with: about 1.2 MiB, 3.2 MiB where frames are compressed or unaligned.
 */
struct lane {
    struct ws_receiver *receiver;
    struct ws_conn *conn;
    pthread_t thread;
    struct ws_ring *ring;
    uint8_t *payload; /* one of the receiver's */
    uint8_t *spare;   /* the same size; made when it is needed */
    struct ws_frame_header head;
    struct ws_frame_extent table[WS_FRAME_MAX_EXTENTS];
    struct ws_piece pieces[WS_FRAME_MAX_EXTENTS];
    uint64_t frames;
    bool first; /* the one that acknowledges */
};

struct ws_receiver {
    struct ws_sink *sinks;
    size_t sink_count;
    struct lane *lanes;
    size_t expected, count;
    pthread_mutex_t lock;
    pthread_cond_t change;
    uint64_t generation; /* that is open */
    size_t ended;        /* connections whose round has ended */
    uint64_t flush_ns;
    bool stopping;
    bool joined;
    bool ring;
    uint8_t *payloads;         /* aligned for any device */
    pthread_mutex_t joining;   /* one joins, the others wait for it */
    struct ws_outcome outcome; /* the first failure */
    _Atomic uint64_t wire_bytes;
};

struct ws_receiver *ws_receiver_new(const struct ws_sink *sinks, size_t sink_count, size_t conns,
                                    uint64_t generation, bool ring) {
    struct ws_receiver *receiver = calloc(1, sizeof(*receiver));
    if (receiver == NULL)
        return NULL;
    pthread_mutex_init(&receiver->lock, NULL);
    pthread_cond_init(&receiver->change, NULL);
    pthread_mutex_init(&receiver->joining, NULL);
    receiver->sinks = calloc(sink_count, sizeof(*sinks));
    receiver->lanes = calloc(conns, sizeof(*receiver->lanes));
    receiver->expected = conns;
    receiver->generation = generation;
    receiver->ring = ring;
    receiver->payloads = ws_payloads_new(conns);
    if (receiver->sinks == NULL || receiver->lanes == NULL || receiver->payloads == NULL) {
        ws_receiver_free(receiver);
        return NULL;
    }
    memcpy(receiver->sinks, sinks, sink_count * sizeof(*sinks));
    receiver->sink_count = sink_count;
    return receiver;
}

void ws_receiver_free(struct ws_receiver *receiver) {
    if (receiver == NULL)
        return;
    free(receiver->lanes);
    free(receiver->payloads);
    free(receiver->sinks);
    pthread_cond_destroy(&receiver->change);
    pthread_mutex_destroy(&receiver->joining);
    pthread_mutex_destroy(&receiver->lock);
    free(receiver);
}

static uint8_t *spare_of(struct lane *lane) {
    if (lane->spare == NULL)
        lane->spare = ws_payloads_new(1);
    return lane->spare;
}

static bool is_open(struct ws_receiver *receiver, uint64_t generation, struct ws_outcome *outcome) {
    pthread_mutex_lock(&receiver->lock);
    uint64_t wanted = receiver->generation;
    pthread_mutex_unlock(&receiver->lock);
    if (generation == wanted)
        return true;
    outcome->failure = WS_BAD_FRAME;
    outcome->fault = (struct ws_fault){"generation", "not", generation, wanted, -1};
    return false;
}

static int lost(struct ws_outcome *outcome) {
    outcome->failure = WS_LOST;
    return -1;
}

static int bad_frame(struct ws_outcome *outcome) {
    outcome->failure = WS_BAD_FRAME;
    return -1;
}

static int failed(struct ws_outcome *outcome, enum ws_failure failure) {
    outcome->failure = failure;
    return -1;
}

/* Receive and verify all but the header; nothing is written before all of it is right. */
static int receive_rest(struct lane *lane, struct ws_outcome *outcome) {
    const struct ws_frame_header *head = &lane->head;
    bool packed = head->flags & WS_FRAME_ZSTD;
    size_t wire = packed ? head->packed_bytes : head->payload_bytes;
    uint8_t *into = packed ? spare_of(lane) : lane->payload;
    if (into == NULL)
        return failed(outcome, WS_NO_MEMORY);
    if (ws_conn_receive(lane->conn, lane->table, head->extent_count * sizeof(*lane->table),
                        &outcome->loss) != 0 ||
        ws_conn_receive(lane->conn, into, wire, &outcome->loss) != 0) {
        /* Within a frame any end is one too early. */
        outcome->loss.error = outcome->loss.error == 0 ? EPIPE : outcome->loss.error;
        return lost(outcome);
    }
    if (packed && ws_unpack(into, wire, lane->payload, head->payload_bytes) != 0) {
        outcome->fault = (struct ws_fault){"packed length", "does not unpack to",
                                           head->packed_bytes, head->payload_bytes, -1};
        return bad_frame(outcome);
    }
    lane->receiver->wire_bytes += sizeof(*head) + head->extent_count * sizeof(*lane->table) + wire;
    if (ws_frame_check_parts(head, lane->table, lane->payload, &outcome->fault) != 0)
        return bad_frame(outcome);
    return 0;
}

static int check_place(struct lane *lane, struct ws_outcome *outcome) {
    struct ws_receiver *receiver = lane->receiver;
    if (lane->head.volume >= receiver->sink_count) {
        outcome->fault = (struct ws_fault){"volume", "more than", lane->head.volume,
                                           receiver->sink_count - 1, -1};
        return bad_frame(outcome);
    }
    if (!is_open(receiver, lane->head.generation, outcome))
        return -1;
    const struct ws_sink *sink = &receiver->sinks[lane->head.volume];
    for (size_t i = 0; i < lane->head.extent_count; i++)
        if (ws_extent_fits(&lane->table[i], sink->size_bytes, sink->device->logical, i,
                           &outcome->fault) != 0)
            return bad_frame(outcome);
    return 0;
}

static int write_failed(struct lane *lane, int rc, struct ws_outcome *outcome) {
    outcome->failure = WS_WRITE_FAILED;
    outcome->rc = rc;
    outcome->volume = lane->head.volume;
    return -1;
}

/* The last, short block of a volume, or a place in memory that the device cannot take from. */
static int write_odd(struct lane *lane, struct ws_device *dev, const struct ws_piece *piece,
                     struct ws_attempt *why) {
    char *data = piece->data;
    if (dev->is_direct && (uintptr_t)data % dev->memory_align != 0) {
        data = (char *)spare_of(lane);
        if (data == NULL)
            return -ENOMEM;
        memcpy(data, piece->data, piece->length);
    }
    return ws_dev_write_end(dev, data, piece->offset, piece->length, why);
}

static bool is_odd(const struct ws_device *dev, const struct ws_piece *piece) {
    return piece->length % dev->logical != 0 ||
           (dev->is_direct && (uintptr_t)piece->data % dev->memory_align != 0);
}

/* Before the first byte: who is killed in the middle has said that something changed. */
static void mark_written(const struct lane *lane) {
    const struct ws_bitmap *written = lane->receiver->sinks[lane->head.volume].written;
    if (written == NULL)
        return;
    for (size_t i = 0; i < lane->head.extent_count; i++)
        ws_bitmap_set_range(written, lane->table[i].offset, lane->table[i].length);
}

static int write_frame(struct lane *lane, struct ws_outcome *outcome) {
    struct ws_device *dev = lane->receiver->sinks[lane->head.volume].device;
    struct ws_attempt *why = &outcome->why;
    struct ws_applied applied = {0, 0, 0};
    char *at = (char *)lane->payload;
    size_t count = 0;
    int rc = 0;
    mark_written(lane);
    for (size_t i = 0; rc == 0 && i < lane->head.extent_count; i++) {
        const struct ws_frame_extent *entry = &lane->table[i];
        struct ws_piece piece = {entry->offset, entry->length, at};
        struct ws_piece *last = &lane->pieces[count - (count > 0)];
        if (entry->kind != WS_EXTENT_DATA) {
            rc = ws_frame_apply_hole(dev, entry, &applied, why);
            continue;
        }
        at += entry->length;
        if (is_odd(dev, &piece))
            rc = write_odd(lane, dev, &piece, why);
        else if (count > 0 && last->offset + last->length == entry->offset &&
                 last->data + last->length == piece.data)
            last->length += entry->length;
        else
            lane->pieces[count++] = piece;
    }
    if (rc == 0)
        rc = ws_ring_move(lane->ring, dev, true, lane->pieces, count, why);
    return rc == 0 ? 0 : write_failed(lane, rc, outcome);
}

static int acknowledge(struct lane *lane, uint64_t generation, uint64_t flush_ns,
                       struct ws_outcome *outcome) {
    struct ws_frame_header head = {.magic = "WSF1",
                                   .version = WS_FRAME_VERSION,
                                   .kind = WS_FRAME_ACK,
                                   .generation = generation,
                                   .sequence = flush_ns};
    struct ws_part parts[1];
    struct iovec vector = {&head, sizeof(head)};
    ws_frame_seal(&head, parts, 1);
    return ws_conn_send(lane->conn, &vector, 1, &outcome->loss) == 0 ? 0 : lost(outcome);
}

/* The round has ended on this connection: wait until it is durable. */
static int end_round(struct lane *lane, struct ws_outcome *outcome) {
    struct ws_receiver *receiver = lane->receiver;
    uint64_t generation = lane->head.generation;
    if (ws_frame_check_parts(&lane->head, lane->table, lane->payload, &outcome->fault) != 0)
        return bad_frame(outcome);
    if (!is_open(receiver, generation, outcome))
        return failed(outcome, WS_BAD_TURN);
    if (lane->head.sequence != lane->frames) {
        outcome->fault =
            (struct ws_fault){"number of frames", "not", lane->frames, lane->head.sequence, -1};
        return failed(outcome, WS_MISSING);
    }
    lane->frames = 0;
    pthread_mutex_lock(&receiver->lock);
    receiver->ended++;
    pthread_cond_broadcast(&receiver->change);
    while (receiver->generation == generation && !receiver->stopping)
        pthread_cond_wait(&receiver->change, &receiver->lock);
    bool stopping = receiver->stopping;
    uint64_t flush_ns = receiver->flush_ns;
    pthread_mutex_unlock(&receiver->lock);
    if (stopping)
        return failed(outcome, WS_STOPPED);
    return lane->first ? acknowledge(lane, generation, flush_ns, outcome) : 0;
}

static int receive_one(struct lane *lane, struct ws_outcome *outcome) {
    if (ws_conn_receive(lane->conn, &lane->head, sizeof(lane->head), &outcome->loss) != 0)
        return lost(outcome);
    uint16_t kind = lane->head.kind == WS_FRAME_END ? WS_FRAME_END : WS_FRAME_EXTENTS;
    if (ws_frame_check_header(&lane->head, kind, true, &outcome->fault) != 0)
        return bad_frame(outcome);
    if (kind == WS_FRAME_END)
        return end_round(lane, outcome);
    if (receive_rest(lane, outcome) != 0 || check_place(lane, outcome) != 0 ||
        write_frame(lane, outcome) != 0)
        return -1;
    lane->frames++;
    return 0;
}

static void *run_lane(void *argument) {
    struct lane *lane = argument;
    struct ws_receiver *receiver = lane->receiver;
    struct ws_outcome outcome = {.failure = WS_DONE};
    while (receive_one(lane, &outcome) == 0)
        continue;
    pthread_mutex_lock(&receiver->lock);
    if (receiver->outcome.failure == WS_DONE)
        receiver->outcome = outcome;
    pthread_cond_broadcast(&receiver->change);
    pthread_mutex_unlock(&receiver->lock);
    return NULL;
}

int ws_receiver_add(struct ws_receiver *receiver, struct ws_conn *conn, bool first) {
    pthread_mutex_lock(&receiver->lock);
    if (receiver->count == receiver->expected || receiver->stopping) {
        pthread_mutex_unlock(&receiver->lock);
        ws_conn_free(conn);
        return -ECANCELED;
    }
    struct lane *lane = &receiver->lanes[receiver->count];
    lane->receiver = receiver;
    lane->conn = conn;
    lane->ring = receiver->ring ? ws_ring_new() : NULL;
    lane->payload = receiver->payloads + receiver->count * WS_FRAME_MAX_PAYLOAD;
    lane->first = first;
    int rc = -pthread_create(&lane->thread, NULL, run_lane, lane);
    if (rc == 0)
        receiver->count++;
    pthread_mutex_unlock(&receiver->lock);
    if (rc != 0) {
        ws_conn_free(conn);
        ws_ring_free(lane->ring);
    }
    return rc;
}

void ws_receiver_wait(struct ws_receiver *receiver, struct ws_outcome *outcome) {
    pthread_mutex_lock(&receiver->lock);
    while (!receiver->stopping && receiver->outcome.failure == WS_DONE &&
           receiver->ended < receiver->expected)
        pthread_cond_wait(&receiver->change, &receiver->lock);
    *outcome = receiver->outcome;
    if (receiver->stopping)
        outcome->failure = WS_STOPPED;
    pthread_mutex_unlock(&receiver->lock);
}

void ws_receiver_acknowledge(struct ws_receiver *receiver, uint64_t flush_ns) {
    pthread_mutex_lock(&receiver->lock);
    receiver->generation++;
    receiver->ended = 0;
    receiver->flush_ns = flush_ns;
    pthread_cond_broadcast(&receiver->change);
    pthread_mutex_unlock(&receiver->lock);
}

void ws_receiver_stop(struct ws_receiver *receiver) {
    pthread_mutex_lock(&receiver->lock);
    receiver->stopping = true;
    pthread_cond_broadcast(&receiver->change);
    for (size_t i = 0; i < receiver->count; i++)
        if (!receiver->joined)
            ws_conn_cut(receiver->lanes[i].conn);
    pthread_mutex_unlock(&receiver->lock);
}

static void join(struct ws_receiver *receiver) {
    for (size_t i = 0; i < receiver->count; i++)
        pthread_join(receiver->lanes[i].thread, NULL);
    pthread_mutex_lock(&receiver->lock);
    receiver->joined = true;
    for (size_t i = 0; i < receiver->count; i++) {
        struct lane *lane = &receiver->lanes[i];
        ws_conn_free(lane->conn);
        ws_ring_free(lane->ring);
        free(lane->spare);
    }
    free(receiver->payloads);
    receiver->payloads = NULL;
    pthread_mutex_unlock(&receiver->lock);
}

void ws_receiver_join(struct ws_receiver *receiver) {
    pthread_mutex_lock(&receiver->joining);
    if (!receiver->joined)
        join(receiver);
    pthread_mutex_unlock(&receiver->joining);
}

void ws_receiver_count(struct ws_receiver *receiver, uint64_t *wire_bytes, uint64_t *generation) {
    pthread_mutex_lock(&receiver->lock);
    *generation = receiver->generation;
    pthread_mutex_unlock(&receiver->lock);
    *wire_bytes = receiver->wire_bytes;
}
