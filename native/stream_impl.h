/* Frames over TCP, in the clear or under TLS 1.3: whole rounds on native threads, without the GIL.
 *
 * One connection carries frames one way, header, table and payload as in frame_impl.h, and one
 * acknowledgement a round the other way:
 *
 *     source                                     target
 *     hello (token) ───────────────────────────► is the token one that was handed out, and unused?
 *           ◄─────────────────────────────────── welcome
 *     frame, frame, ... ───────────────────────► verified, then written
 *     END (generation, frames on this one) ────► on every connection
 *           ◄─────────────────────────────────── ACK (generation, time of the flush), on the first:
 *                                                all is written and flushed
 *
 * A connection belongs to one thread at a time; ws_conn_cut() may be called by any. */
#ifndef WARMSYNC_STREAM_IMPL_H
#define WARMSYNC_STREAM_IMPL_H

#include "bitmap_impl.h"
#include "blockio_ring.h"
#include "frame_impl.h"
#include "scan_impl.h"

#include <pthread.h>
#include <sys/uio.h>

#define WS_TOKEN_ID_BYTES 16
#define WS_TOKEN_SECRET_BYTES 32
#define WS_TOKEN_BYTES (WS_TOKEN_ID_BYTES + WS_TOKEN_SECRET_BYTES)
#define WS_CONNECTIONS_MAX 64

/* What went wrong with a connection. `error` is an errno or 0; `text` is a whole clause. */
struct ws_loss {
    int error;
    char text[192];
};

/* ---- stream_token.c: one-time tokens ---- */

enum ws_token_verdict { WS_TOKEN_GOOD, WS_TOKEN_UNKNOWN, WS_TOKEN_USED, WS_TOKEN_EXPIRED };

struct ws_tokens; /* thread-safe */

struct ws_tokens *ws_tokens_new(void);
void ws_tokens_free(struct ws_tokens *tokens);
/* Hand out a token (random bytes by the caller) that is good until `deadline_ns` (CLOCK_MONOTONIC).
 * Forgets what has expired. 0 or -ENOMEM. */
int ws_tokens_add(struct ws_tokens *tokens, const uint8_t token[WS_TOKEN_BYTES],
                  uint64_t deadline_ns);
/* Forget a token, spent or not: who shows it is a stranger. */
void ws_tokens_revoke(struct ws_tokens *tokens, const uint8_t id[WS_TOKEN_ID_BYTES]);
/* Spend a token: its secret is copied out the first time that it is asked for, and never again. */
enum ws_token_verdict ws_tokens_spend(struct ws_tokens *tokens, const uint8_t id[WS_TOKEN_ID_BYTES],
                                      uint8_t secret[WS_TOKEN_SECRET_BYTES]);
/* Tokens that are handed out, spent or not, and not expired. */
size_t ws_tokens_count(struct ws_tokens *tokens);

/* ---- stream_conn.c, stream_tls.c: connections ---- */

struct ws_conn;

/* Take over a connected stream socket. Closed with the connection, also if this returns NULL. */
struct ws_conn *ws_conn_new(int fd);
void ws_conn_free(struct ws_conn *conn);

/* Greet with a token; `tls`: under TLS 1.3 with the token as the pre-shared key. `ktls`: let the
 * kernel encrypt, if it can. Within `timeout_ms` all in all. 0, or -1 with `loss`. */
int ws_conn_open(struct ws_conn *conn, const uint8_t token[WS_TOKEN_BYTES], bool tls, bool ktls,
                 unsigned timeout_ms, struct ws_loss *loss);
/* The other end of that. `id` is which token it was. */
int ws_conn_accept(struct ws_conn *conn, struct ws_tokens *tokens, bool tls, bool ktls,
                   unsigned timeout_ms, uint8_t id[WS_TOKEN_ID_BYTES], struct ws_loss *loss);

/* From now on a send that gets nothing away for so long fails, and a receive that gets nothing
 * (0: never). */
void ws_conn_set_patience(struct ws_conn *conn, unsigned send_seconds, unsigned receive_seconds);

/* Send all, or receive exactly `size` bytes: 0, or -1 with `loss`. Blocking. An end of the stream
 * before the first byte sets `loss->error` to 0. */
int ws_conn_send(struct ws_conn *conn, const struct iovec *parts, size_t count,
                 struct ws_loss *loss);
int ws_conn_receive(struct ws_conn *conn, void *data, size_t size, struct ws_loss *loss);

/* 0 if the other end is there and silent, as it has to be between rounds; -1 with `loss`. */
int ws_conn_check(struct ws_conn *conn, struct ws_loss *loss);

/* End it now: whoever sends or receives fails. Any thread, any number of times. */
void ws_conn_cut(struct ws_conn *conn);

/* "TLS_AES_128_GCM_SHA256, by the kernel", "in the clear". */
void ws_conn_describe(const struct ws_conn *conn, char *out, size_t size);

int ws_lose(struct ws_loss *loss, int error, const char *text);

/* ---- stream_pace.c: how fast, and whether at all ---- */

struct ws_pace {
    pthread_mutex_t lock;
    pthread_cond_t change;
    uint64_t limit; /* bytes a second; 0: none */
    double debt;
    uint64_t paid_ns;
    _Atomic bool eager; /* neither limited nor paused: nobody needs the lock */
    bool paused;
    bool stopping;
};

void ws_pace_init(struct ws_pace *pace);
void ws_pace_destroy(struct ws_pace *pace);
void ws_pace_limit(struct ws_pace *pace, uint64_t bytes_per_second);
void ws_pace_pause(struct ws_pace *pace, bool paused);
/* Nobody waits any more, whatever the limit. */
void ws_pace_stop(struct ws_pace *pace);
/* Wait until so many bytes may go; how many may be asked for at once. */
void ws_pace_spend(struct ws_pace *pace, size_t size);
size_t ws_pace_slice(struct ws_pace *pace);

uint64_t ws_now_ns(void);

/* Change this thread's niceness, if it is another; returns the one that was wanted. */
int ws_be_nice(int now, int wanted);

/* ---- stream_pack.c: compression that stops where it does not pay ---- */

struct ws_packer; /* of one connection */

struct ws_packer *ws_packer_new(void);
void ws_packer_free(struct ws_packer *packer);
/* Compress the parts into a buffer of the packer: its size, or 0 to send them as they are. */
size_t ws_pack(struct ws_packer *packer, const struct ws_part *parts, size_t count, size_t size,
               const void **packed);
/* Learn how long a frame of so many bytes took to send. */
void ws_packer_sent(struct ws_packer *packer, size_t size, uint64_t nanoseconds);
/* Decompress to exactly `room` bytes: 0, or -1. */
int ws_unpack(const void *packed, size_t size, void *out, size_t room);

/* ---- stream_memory.c: where frames lie ---- */

/* Payloads for so many connections, WS_FRAME_MAX_PAYLOAD bytes each, one after the other; NULL
 * without memory. Give them back with free(). */
uint8_t *ws_payloads_new(size_t count);

/* ---- stream_send.c: the source's end ---- */

struct ws_volume {
    struct ws_device *device;
    uint8_t *digests;              /* a table that each read fills, or NULL */
    uint64_t digests_bytes;        /* its size */
    uint64_t size_bytes;           /* the volume's, where there is a table */
    const struct ws_bitmap *stale; /* its entries that are not right: ws_scan_note(), or NULL */
};

struct ws_job {
    uint32_t volume;
    const struct ws_bitmap *marks; /* must not change meanwhile */
};

enum ws_failure {
    WS_DONE,
    WS_READ_FAILED,  /* `rc`, `why`, `volume` */
    WS_WRITE_FAILED, /* the same */
    WS_BAD_FRAME,    /* `fault` */
    WS_BAD_TURN,     /* the same: a round of another generation has ended */
    WS_MISSING,      /* the same: fewer frames have arrived than were sent */
    WS_LOST,         /* `loss` */
    WS_STOPPED,
    WS_NO_MEMORY,
};

struct ws_outcome {
    enum ws_failure failure;
    int rc;
    uint32_t volume;
    struct ws_attempt why;
    struct ws_fault fault;
    struct ws_loss loss;
};

struct ws_sender;

/* How a sender works. */
struct ws_manner {
    bool compress;
    bool ring;                 /* many scattered blocks at once, where the kernel can */
    unsigned patience_seconds; /* a target that takes nothing for so long is lost */
    unsigned ack_seconds;      /* the same for one that does not make a round durable */
};

struct ws_sender *ws_sender_new(struct ws_conn **conns, size_t count,
                                const struct ws_manner *manner);
void ws_sender_free(struct ws_sender *sender);
struct ws_pace *ws_sender_pace(struct ws_sender *sender);

/* How large frames are, how large the gaps that are sent too, and how nice the threads. */
void ws_sender_tune(struct ws_sender *sender, uint32_t frame_bytes, uint32_t gap_bytes, int nice);

/* What a round left out, as it could not be read. */
struct ws_left_out {
    size_t count;
    uint32_t lost; /* units of ws_dev_salvage(): at most WS_UNREAD_MAX */
    uint32_t volumes[WS_UNREAD_MAX];
    struct ws_unread ranges[WS_UNREAD_MAX];
};

/* Read and send all that is marked, but for what is `left_out` in the end: bad sectors, in whole
 * units of 4096 bytes (a chunk where digests are kept). Returns when it is sent (not yet written
 * there). */
void ws_sender_send(struct ws_sender *sender, const struct ws_volume *volumes,
                    const struct ws_job *jobs, size_t count, uint64_t generation,
                    struct ws_left_out *left_out, struct ws_outcome *outcome);
/* Send a frame that is ready. */
void ws_sender_send_frame(struct ws_sender *sender, const void *frame, size_t size,
                          struct ws_outcome *outcome);
/* End the round and wait for its acknowledgement. */
void ws_sender_end(struct ws_sender *sender, uint64_t generation, uint64_t *flush_ns,
                   struct ws_outcome *outcome);
/* 0 if all connections are there. Not while another call runs. */
int ws_sender_check(struct ws_sender *sender, struct ws_loss *loss);
/* Whoever sends stops before the next frame, without cutting one that has begun. */
void ws_sender_stop(struct ws_sender *sender);
void ws_sender_cut(struct ws_sender *sender);
/* What was read and sent so far, and put on the wire for it. Any time. */
void ws_sender_count(struct ws_sender *sender, uint64_t *done_bytes, uint64_t *wire_bytes,
                     uint64_t *packed_frames);

/* ---- stream_receive.c: the target's end ---- */

struct ws_sink {
    struct ws_device *device;
    uint64_t size_bytes;             /* of the volume: nothing is written beyond */
    const struct ws_bitmap *written; /* marked before anything is written, or NULL */
};

struct ws_receiver;

struct ws_receiver *ws_receiver_new(const struct ws_sink *sinks, size_t sink_count, size_t conns,
                                    uint64_t generation, bool ring);
/* Give it one of the connections it expects; it starts at once, and owns it. `first`: the source
 * waits for acknowledgements on this one. 0 or -errno. */
int ws_receiver_add(struct ws_receiver *receiver, struct ws_conn *conn, bool first);
/* Wait until a round has ended on all connections (WS_DONE), or something has failed. */
void ws_receiver_wait(struct ws_receiver *receiver, struct ws_outcome *outcome);
/* The round is durable: tell the source, and expect the next generation. */
void ws_receiver_acknowledge(struct ws_receiver *receiver, uint64_t flush_ns);
/* Cut all connections; waiters get WS_STOPPED. Does not wait. */
void ws_receiver_stop(struct ws_receiver *receiver);
/* Wait for the threads to end, after ws_receiver_stop(), and close their connections. Any thread,
 * any number of times. */
void ws_receiver_join(struct ws_receiver *receiver);
/* After ws_receiver_join(). */
void ws_receiver_free(struct ws_receiver *receiver);
void ws_receiver_count(struct ws_receiver *receiver, uint64_t *wire_bytes, uint64_t *generation);

#endif
