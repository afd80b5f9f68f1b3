/* What runs in a guest: a small database that says what it found, then what it made durable.
 *
 *   program LOG_DIRECTORY DATA_DIRECTORY SEED PAUSE_MS
 *
 * A record goes into the log and is fsynced there; only then are the blocks it names rewritten in
 * the data file and fsynced; only then is it acknowledged. So the log is never behind the data, on
 * however many disks they lie, and nothing that was acknowledged is missing after any crash. At the
 * start all of that is checked against the disks as they are, and the last record is applied again.
 * Now and then a scratch file is written and an old one deleted, so that discards flow.
 *
 * It says, a line each:      size BYTES                of the data's file system
 *   found NUMBER CHECKSUM    each record of the log    bad WHAT        then it exits with 1
 *   checked RECORDS BLOCKS   all is well               ack NUMBER CHECKSUM       durable now
 *   stopped                  SIGTERM was obeyed */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define BLOCKS 2048
#define BLOCKS_OF_A_RECORD 4
#define SCRATCH_EVERY 8
#define SCRATCH_FILES 4
#define SCRATCH_BYTES (512 << 10)

/* 1000 bytes, so that appending rewrites the last block of the log. */
struct record {
    char magic[8];
    uint64_t number, seed;
    uint32_t blocks[BLOCKS_OF_A_RECORD];
    unsigned char filler[952];
    uint64_t checksum;
};

struct block {
    char magic[8];
    uint64_t number, seed, index; /* the record that wrote it; 0 when the file was made */
    unsigned char filler[4096 - 40];
    uint64_t checksum;
};

struct writer {
    uint64_t number, seed;
};

static int log_file, data_file, data_directory;
static uint64_t records, run_seed;
static struct writer last[BLOCKS], before[BLOCKS];
static struct record latest;
static volatile sig_atomic_t stopping;

__attribute__((format(printf, 1, 2))) static void bad(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    dprintf(STDOUT_FILENO, "bad ");
    vdprintf(STDOUT_FILENO, format, arguments);
    dprintf(STDOUT_FILENO, "\n");
    va_end(arguments);
    exit(1);
}

static void broken(const char *what) {
    bad("%s: %s", what, strerror(errno));
}

static void stop(int number) {
    (void)number;
    stopping = 1;
}

/* FNV-1a, but a word at a time: emulated processors are slow. */
static uint64_t checksum(const void *bytes, size_t size) {
    uint64_t sum = 0xcbf29ce484222325u, word;
    for (size_t at = 0; at + sizeof(word) <= size; at += sizeof(word)) {
        memcpy(&word, (const char *)bytes + at, sizeof(word));
        sum = (sum ^ word) * 0x100000001b3u;
        sum ^= sum >> 29;
    }
    return sum;
}

static uint64_t next(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static uint64_t stream(uint64_t seed, uint64_t number, uint64_t index) {
    return (seed * 0x9e3779b97f4a7c15u) ^ (number * 0xbf58476d1ce4e5b9u) ^ (index << 40) ^ 1;
}

static void fill(unsigned char *bytes, size_t size, uint64_t state) {
    for (size_t at = 0; at < size; at++)
        bytes[at] = (unsigned char)(next(&state) >> 32);
}

static void write_all(int file, const void *bytes, size_t size, uint64_t offset) {
    if (pwrite(file, bytes, size, (off_t)offset) != (ssize_t)size)
        broken("write");
}

static void make_durable(int file) {
    if (fsync(file) != 0)
        broken("fsync");
}

static int open_in(int directory, const char *name) {
    int file = openat(directory, name, O_RDWR | O_CREAT, 0600);
    if (file < 0)
        broken(name);
    make_durable(directory);
    return file;
}

static int open_directory(const char *path) {
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    if (directory < 0)
        broken(path);
    return directory;
}

static void write_block(uint64_t index, struct writer by) {
    struct block block = {.number = by.number, .seed = by.seed, .index = index};
    memcpy(block.magic, "WSBLOCK1", sizeof(block.magic));
    fill(block.filler, sizeof(block.filler), stream(by.seed, by.number, index));
    block.checksum = checksum(&block, offsetof(struct block, checksum));
    write_all(data_file, &block, sizeof(block), index * sizeof(block));
}

static void apply(const struct record *record) {
    struct writer by = {record->number, record->seed};
    for (int i = 0; i < BLOCKS_OF_A_RECORD; i++)
        write_block(record->blocks[i], by);
    make_durable(data_file);
}

static void note(const struct record *record) {
    struct writer by = {record->number, record->seed};
    for (int i = 0; i < BLOCKS_OF_A_RECORD; i++) {
        uint32_t index = record->blocks[i];
        if (last[index].number != by.number) /* a record may name a block twice */
            before[index] = last[index];
        last[index] = by;
    }
    latest = *record;
    records = record->number;
}

static int is_whole(const struct record *record, uint64_t number) {
    if (memcmp(record->magic, "WSRECORD", 8) != 0 || record->number != number)
        return 0;
    return record->checksum == checksum(record, offsetof(struct record, checksum));
}

static void read_log(void) {
    struct record record;
    struct stat status;
    while (pread(log_file, &record, sizeof(record), (off_t)(records * sizeof(record))) ==
               (ssize_t)sizeof(record) &&
           is_whole(&record, records + 1)) {
        note(&record);
        dprintf(STDOUT_FILENO, "found %ju %016jx\n", (uintmax_t)records,
                (uintmax_t)record.checksum);
    }
    if (fstat(log_file, &status) != 0)
        broken("log");
    uint64_t rest = (uint64_t)status.st_size - records * sizeof(record);
    if (rest > sizeof(record)) /* only the last one may have been cut short */
        bad("log: %ju bytes after record %ju", (uintmax_t)rest, (uintmax_t)records);
    if (ftruncate(log_file, (off_t)(records * sizeof(record))) != 0)
        broken("log");
    make_durable(log_file);
}

static void check_block(uint64_t index) {
    struct block block;
    struct writer by = last[index];
    int is_latest = records > 0 && by.number == records;
    int whole =
        pread(data_file, &block, sizeof(block), (off_t)(index * sizeof(block))) == sizeof(block) &&
        memcmp(block.magic, "WSBLOCK1", 8) == 0 && block.index == index &&
        block.checksum == checksum(&block, offsetof(struct block, checksum));
    if (whole && block.number == by.number && block.seed == by.seed)
        return;
    if (whole && block.number > records)
        bad("block %ju: of record %ju, the log ends at %ju", (uintmax_t)index,
            (uintmax_t)block.number, (uintmax_t)records);
    if (is_latest && (!whole || (block.number == before[index].number)))
        return; /* the crash came between log and data: it is applied again */
    bad("block %ju: %s of record %ju, not %ju", (uintmax_t)index, whole ? "old" : "damaged",
        (uintmax_t)block.number, (uintmax_t)by.number);
}

static void replay(void) {
    struct writer nobody = {0, 0};
    for (uint64_t index = 0; index < BLOCKS; index++)
        if (records == 0)
            write_block(index, nobody);
        else
            check_block(index);
    make_durable(data_file);
    if (records > 0)
        apply(&latest);
    dprintf(STDOUT_FILENO, "checked %ju %d\n", (uintmax_t)records, BLOCKS);
}

static void scratch(uint64_t turn) {
    static unsigned char bytes[SCRATCH_BYTES];
    char name[32], old[32];
    snprintf(name, sizeof(name), "scratch.%ju", (uintmax_t)turn);
    snprintf(old, sizeof(old), "scratch.%ju", (uintmax_t)(turn - SCRATCH_FILES));
    int file = open_in(data_directory, name);
    fill(bytes, sizeof(bytes), stream(run_seed, turn, 0));
    write_all(file, bytes, sizeof(bytes), 0);
    make_durable(file);
    close(file);
    unlinkat(data_directory, old, 0);
}

static void write_record(uint64_t *chance) {
    struct record record = {.number = records + 1, .seed = run_seed};
    memcpy(record.magic, "WSRECORD", sizeof(record.magic));
    for (int i = 0; i < BLOCKS_OF_A_RECORD; i++)
        record.blocks[i] = (uint32_t)(next(chance) % BLOCKS);
    fill(record.filler, sizeof(record.filler), stream(run_seed, record.number, BLOCKS));
    record.checksum = checksum(&record, offsetof(struct record, checksum));
    write_all(log_file, &record, sizeof(record), records * sizeof(record));
    make_durable(log_file);
    apply(&record);
    records = record.number;
    dprintf(STDOUT_FILENO, "ack %ju %016jx\n", (uintmax_t)records, (uintmax_t)record.checksum);
    if (records % SCRATCH_EVERY == 0)
        scratch(records / SCRATCH_EVERY);
}

int main(int count, char **words) {
    if (count != 5)
        bad("usage: program LOG_DIRECTORY DATA_DIRECTORY SEED PAUSE_MS");
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    run_seed = strtoull(words[3], NULL, 10);
    uint64_t chance = stream(run_seed, 1, 1);
    long pause_ms = strtol(words[4], NULL, 10);
    struct timespec pause = {pause_ms / 1000, pause_ms % 1000 * 1000000};
    struct statvfs room;
    data_directory = open_directory(words[2]);
    log_file = open_in(open_directory(words[1]), "log");
    data_file = open_in(data_directory, "data");
    if (fstatvfs(data_directory, &room) != 0)
        broken("statvfs");
    dprintf(STDOUT_FILENO, "size %ju\n", (uintmax_t)room.f_blocks * room.f_frsize);
    read_log();
    replay();
    while (!stopping) {
        write_record(&chance);
        nanosleep(&pause, NULL);
    }
    dprintf(STDOUT_FILENO, "stopped\n");
    return 0;
}
