#include "ebpf_impl.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#define MAX_LINKS 16
#define MAX_MAPS 16
#define MAX_LOADS 20
#define BIO_PREFIX "bio_" /* of programs for bio-based disks; the others begin with "rq_" */

/* libbpf has one print function for the process; it is told here who is asking. */
static __thread ws_failure *current;

static int keep_log(enum libbpf_print_level level, const char *format, va_list arguments) {
    if (current == NULL || level == LIBBPF_DEBUG)
        return 0;
    char text[sizeof(current->log)];
    int wanted = vsnprintf(text, sizeof(text), format, arguments);
    size_t bytes = wanted < (int)sizeof(text) ? (size_t)wanted : sizeof(text) - 1;
    size_t room = sizeof(current->log) - 1;
    if (current->log_bytes + bytes > room) {
        size_t excess = current->log_bytes + bytes - room;
        memmove(current->log, current->log + excess, current->log_bytes - excess);
        current->log_bytes -= excess;
    }
    memcpy(current->log + current->log_bytes, text, bytes);
    current->log_bytes += bytes;
    current->log[current->log_bytes] = '\0';
    return wanted;
}

__attribute__((constructor)) static void take_log(void) {
    libbpf_set_print(keep_log);
}

__attribute__((format(printf, 3, 4))) static int fail(ws_failure *failure, int error,
                                                      const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(failure->attempt, sizeof(failure->attempt), format, arguments);
    va_end(arguments);
    return error < 0 ? -error : error;
}

static int join(char path[PATH_MAX], const char *directory, const char *name, ws_failure *failure) {
    int length = snprintf(path, PATH_MAX, "%s/%s", directory, name);
    return length < PATH_MAX ? 0 : fail(failure, ENAMETOOLONG, "name a pin in %s", directory);
}

static void link_name(char name[NAME_MAX], unsigned index) {
    snprintf(name, NAME_MAX, "link_%u", index);
}

/* ---- the object ---- */

static bool is_wanted(const struct bpf_program *program, bool bio_based) {
    bool bio = strncmp(bpf_program__name(program), BIO_PREFIX, strlen(BIO_PREFIX)) == 0;
    return bio == bio_based;
}

static unsigned select_programs(struct bpf_object *object, bool bio_based) {
    unsigned count = 0;
    struct bpf_program *program;
    bpf_object__for_each_program(program, object) {
        bool wanted = is_wanted(program, bio_based);
        bpf_program__set_autoload(program, wanted);
        count += wanted;
    }
    return count;
}

static int set_constants(struct bpf_object *object, const struct dirty_range *range) {
    struct dirty_watch watch = {
        .major = range->major,
        .minor = range->minor,
        .start_sector = range->start_sector,
        .sector_count = range->sector_count,
        .block_shift = (unsigned)__builtin_ctzll(range->block_size_bytes >> DIRTY_SECTOR_SHIFT),
        .word_count = range->word_count,
        .queue_count = range->queue_count,
        .queue_depth = range->queue_depth,
    };
    struct bpf_map *constants = bpf_object__find_map_by_name(object, ".rodata");
    if (constants == NULL)
        return ENOENT;
    return -bpf_map__set_initial_value(constants, &watch, sizeof(watch));
}

static uint32_t slot_count(const struct dirty_range *range) {
    return range->queue_count * range->queue_depth;
}

static int configure(struct bpf_object *object, struct dirty_range *range) {
    struct bpf_map *dirty = bpf_object__find_map_by_name(object, "dirty");
    struct bpf_map *slots = bpf_object__find_map_by_name(object, "slots");
    struct bpf_map *bios = bpf_object__find_map_by_name(object, "bios");
    struct bpf_map *sums = bpf_object__find_map_by_name(object, "sums");
    int cpus = libbpf_num_possible_cpus();
    if (dirty == NULL || slots == NULL || bios == NULL || sums == NULL)
        return ENOENT;
    if (cpus < 0)
        return -cpus;
    range->link_count = select_programs(object, range->bio_based);
    int error = set_constants(object, range);
    if (!error)
        error = -bpf_map__set_max_entries(dirty, range->word_count);
    if (!error)
        error = -bpf_map__set_max_entries(sums, (unsigned)cpus);
    if (!error && !range->bio_based)
        error = -bpf_map__set_max_entries(slots, slot_count(range));
    if (!error)
        error = -bpf_map__set_autocreate(range->bio_based ? slots : bios, false);
    return error;
}

/* BPF tracing relies on preemption being off in tracepoints to bound how deep programs nest;
 * real-time kernels are about to give that up. */
static int refuse_realtime(ws_failure *failure) {
    struct utsname name;
    if (uname(&name) == 0 && strstr(name.version, "PREEMPT_RT") != NULL)
        return fail(failure, EOPNOTSUPP, "track writes on a real-time kernel (PREEMPT_RT)");
    return 0;
}

static int load_once(const char *file, struct dirty_range *range, struct bpf_object **loaded,
                     ws_failure *failure) {
    struct bpf_object *object = bpf_object__open_file(file, NULL);
    if (object == NULL)
        return fail(failure, errno, "open the eBPF object %s", file);
    int error = configure(object, range);
    if (error)
        fail(failure, error, "configure the eBPF object %s", file);
    else if ((error = -bpf_object__load(object)) != 0)
        fail(failure, error, "load the eBPF programs into the kernel");
    if (error)
        bpf_object__close(object);
    else
        *loaded = object;
    return error;
}

/* The verifier gives up with EAGAIN when a signal is pending (a profiler's, say); libbpf tries a
 * few times and no more. */
static int load(const char *file, struct dirty_range *range, struct bpf_object **loaded,
                ws_failure *failure) {
    int error = refuse_realtime(failure);
    if (error)
        return error;
    for (int turn = 0; turn < MAX_LOADS; turn++) {
        error = load_once(file, range, loaded, failure);
        if (error != EAGAIN)
            break;
    }
    return error;
}

int ws_tracker_check(const char *file, ws_failure *failure) {
    current = failure;
    int error = 0;
    for (unsigned bio_based = 0; bio_based < 2 && !error; bio_based++) {
        struct dirty_range range = {.sector_count = 1,
                                    .block_size_bytes = 4096,
                                    .bio_based = bio_based,
                                    .word_count = 1,
                                    .queue_count = 1,
                                    .queue_depth = 1};
        struct bpf_object *object = NULL;
        error = load(file, &range, &object, failure);
        if (!error)
            bpf_object__close(object);
    }
    current = NULL;
    return error;
}

/* ---- memory ---- */

static int map_memory(int fd, size_t bytes, void **memory) {
    *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return *memory == MAP_FAILED ? errno : 0;
}

static size_t whole_pages(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static int map_range(int fd, ws_tracker *tracker, ws_failure *failure) {
    void *memory;
    int error = map_memory(fd, whole_pages(sizeof(struct dirty_range)), &memory);
    if (error)
        return fail(failure, error, "map the tracker's description");
    tracker->range = memory;
    return 0;
}

static int map_words(int fd, ws_tracker *tracker, ws_failure *failure) {
    void *memory;
    size_t bytes = whole_pages((size_t)tracker->range->word_count * sizeof(uint64_t));
    int error = map_memory(fd, bytes, &memory);
    if (error)
        return fail(failure, error, "map the tracker's %zu bytes of bitmap", bytes);
    tracker->words = memory;
    tracker->words_bytes = bytes;
    return 0;
}

static size_t slots_bytes(const struct dirty_range *range) {
    return whole_pages((size_t)slot_count(range) * sizeof(struct dirty_slot));
}

/* Keep the map of bios, or map the slots. `fd` stays the caller's. */
static int map_in_flight(int fd, ws_tracker *tracker, ws_failure *failure) {
    void *memory;
    if (tracker->range->bio_based) {
        tracker->bios = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        return tracker->bios < 0 ? fail(failure, errno, "keep the map of bios") : 0;
    }
    int error = map_memory(fd, slots_bytes(tracker->range), &memory);
    if (error)
        return fail(failure, error, "map the tracker's slots");
    tracker->slots = memory;
    return 0;
}

static size_t sums_bytes(unsigned cpus) {
    return whole_pages((size_t)cpus * sizeof(struct dirty_sum));
}

static int map_sums(int fd, unsigned cpus, ws_tracker *tracker, ws_failure *failure) {
    void *memory;
    int error = map_memory(fd, sums_bytes(cpus), &memory);
    if (error)
        return fail(failure, error, "map the tracker's sums");
    tracker->sums = memory;
    tracker->cpus = cpus;
    return 0;
}

void ws_tracker_unmap(ws_tracker *tracker) {
    if (tracker->sums != NULL)
        munmap(tracker->sums, sums_bytes(tracker->cpus));
    tracker->sums = NULL;
    if (tracker->slots != NULL)
        munmap(tracker->slots, slots_bytes(tracker->range));
    if (tracker->bios >= 0)
        close(tracker->bios);
    if (tracker->range != NULL)
        munmap(tracker->range, whole_pages(sizeof(*tracker->range)));
    tracker->range = NULL;
    tracker->slots = NULL;
    tracker->bios = -1;
}

void ws_tracker_unmap_words(uint64_t *words, size_t bytes) {
    if (words != NULL)
        munmap(words, bytes);
}

static void unmap(ws_tracker *tracker) {
    ws_tracker_unmap(tracker);
    ws_tracker_unmap_words(tracker->words, tracker->words_bytes);
    tracker->words = NULL;
}

static const char *in_flight_map(const struct dirty_range *range) {
    return range->bio_based ? "bios" : "slots";
}

/* ---- writes in flight ---- */

static int64_t list_slots(const ws_tracker *tracker, ws_in_flight *out, size_t room) {
    size_t found = 0, count = slot_count(tracker->range);
    for (size_t i = 0; i < count; i++) {
        uint64_t state = __atomic_load_n(&tracker->slots[i].state, __ATOMIC_ACQUIRE);
        if ((uint32_t)state == 0)
            continue;
        if (found < room)
            out[found] = (ws_in_flight){i, tracker->slots[i].sector, state};
        /* Reused while we looked: the old write was marked by who reused it, and the range is of
         * either: too much is marked, never too little. */
        found++;
    }
    return (int64_t)found;
}

static int64_t list_bios(const ws_tracker *tracker, ws_in_flight *out, size_t room) {
    size_t found = 0;
    __u64 key = 0, next;
    struct dirty_slot note;
    void *from = NULL;
    while (bpf_map_get_next_key(tracker->bios, from, &next) == 0) {
        if (bpf_map_lookup_elem(tracker->bios, &next, &note) == 0) {
            if (found < room)
                out[found] = (ws_in_flight){next, note.sector, note.state};
            found++;
        }
        if (found > DIRTY_MAX_INFLIGHT)
            return -ELOOP; /* a key that vanished makes the walk start again: give up at last */
        key = next;
        from = &key;
    }
    return errno == ENOENT ? (int64_t)found : -errno;
}

int64_t ws_tracker_in_flight(const ws_tracker *tracker, ws_in_flight *out, size_t room) {
    if (tracker->range->bio_based)
        return list_bios(tracker, out, room);
    return list_slots(tracker, out, room);
}

static void add_to_sums(const ws_tracker *tracker, uint64_t sectors) {
    __atomic_fetch_add(&tracker->sums[0].written, sectors, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&tracker->sums[0].discarded, sectors, __ATOMIC_SEQ_CST);
}

int ws_tracker_forget(const ws_tracker *tracker, const ws_in_flight *write) {
    if (tracker->range->bio_based) {
        __u64 key = write->key;
        return bpf_map_delete_elem(tracker->bios, &key) && errno != ENOENT ? -errno : 0;
    }
    struct dirty_slot *slot = &tracker->slots[write->key];
    uint64_t expected = write->state, born = __atomic_load_n(&slot->born, __ATOMIC_ACQUIRE);
    /* It has landed, unseen. Before its note goes: the sums and the notes are never too little. */
    add_to_sums(tracker, (uint32_t)write->state);
    if (__atomic_compare_exchange_n(&slot->state, &expected, expected >> 32 << 32, false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        __atomic_store_n(&slot->forgotten, born, __ATOMIC_RELEASE);
    else
        add_to_sums(tracker, -(uint64_t)(uint32_t)write->state);
    return 0;
}

/* The barrier: what the caller has read before stays before. */
void ws_tracker_sum(const ws_tracker *tracker, uint64_t *written, uint64_t *discarded) {
    *written = *discarded = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < tracker->cpus; i++) {
        *written += ws_tracker_load(&tracker->sums[i].written);
        *discarded += ws_tracker_load(&tracker->sums[i].discarded);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

uint64_t ws_tracker_load(const __u64 *counter) {
    return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

/* ---- attach ---- */

static int map_object(struct bpf_object *object, const struct dirty_range *range,
                      ws_tracker *tracker, ws_failure *failure) {
    int error = map_range(bpf_object__find_map_fd_by_name(object, "range"), tracker, failure);
    if (error)
        return error;
    *tracker->range = *range;
    error = map_words(bpf_object__find_map_fd_by_name(object, "dirty"), tracker, failure);
    if (error)
        return error;
    struct bpf_map *sums = bpf_object__find_map_by_name(object, "sums");
    error = map_sums(bpf_map__fd(sums), bpf_map__max_entries(sums), tracker, failure);
    if (error)
        return error;
    int fd = bpf_object__find_map_fd_by_name(object, in_flight_map(range));
    return map_in_flight(fd, tracker, failure);
}

static int pin_map(struct bpf_object *object, const char *map, const char *name,
                   const char *pin_dir, ws_failure *failure) {
    char path[PATH_MAX];
    int error = join(path, pin_dir, name, failure);
    if (!error && bpf_obj_pin(bpf_object__find_map_fd_by_name(object, map), path))
        error = fail(failure, errno, "pin a map at %s", path);
    return error;
}

static int attach_program(struct bpf_program *program, unsigned index, const char *pin_dir,
                          ws_failure *failure) {
    char name[NAME_MAX], path[PATH_MAX];
    link_name(name, index);
    int error = join(path, pin_dir, name, failure);
    if (error)
        return error;
    struct bpf_link *link = bpf_program__attach(program);
    if (link == NULL)
        return fail(failure, errno, "attach %s", bpf_program__name(program));
    error = -bpf_link__pin(link, path);
    bpf_link__destroy(link); /* closes our descriptor; the pin holds the link */
    return error ? fail(failure, error, "pin a link at %s", path) : 0;
}

/* In the object's order: what notes writes first, lest one issued meanwhile complete unknown. */
static int attach_programs(struct bpf_object *object, bool bio_based, const char *pin_dir,
                           ws_failure *failure) {
    unsigned index = 0;
    int error = 0;
    struct bpf_program *program;
    bpf_object__for_each_program(program, object) {
        if (!error && is_wanted(program, bio_based))
            error = attach_program(program, index++, pin_dir, failure);
    }
    return error;
}

static int require_bpffs(const char *pin_dir, ws_failure *failure) {
    struct statfs filesystem;
    int error = statfs(pin_dir, &filesystem) ? errno : 0;
    if (!error && (unsigned long)filesystem.f_type != BPF_FS_MAGIC)
        error = EINVAL;
    return error ? fail(failure, error, "use %s, which must be on a mounted bpffs", pin_dir) : 0;
}

static int make_directory(const char *pin_dir, ws_failure *failure) {
    if (mkdir(pin_dir, 0700))
        return fail(failure, errno, "make the directory %s", pin_dir);
    int error = require_bpffs(pin_dir, failure);
    if (error)
        rmdir(pin_dir);
    return error;
}

static int publish(struct bpf_object *object, const struct dirty_range *range, const char *pin_dir,
                   ws_failure *failure) {
    int error = make_directory(pin_dir, failure);
    if (error)
        return error;
    error = pin_map(object, "dirty", "dirty", pin_dir, failure);
    if (!error)
        error = pin_map(object, "range", "range", pin_dir, failure);
    if (!error)
        error = pin_map(object, in_flight_map(range), "inflight", pin_dir, failure);
    if (!error)
        error = pin_map(object, "sums", "sums", pin_dir, failure);
    if (!error)
        error = attach_programs(object, range->bio_based, pin_dir, failure);
    if (error) {
        ws_failure ignored; /* the first failure is the one to tell */
        ws_tracker_remove(pin_dir, &ignored);
    }
    return error;
}

int ws_tracker_attach(const char *file, const struct dirty_range *wanted, const char *pin_dir,
                      ws_tracker *tracker, ws_failure *failure) {
    struct dirty_range range = *wanted;
    struct bpf_object *object = NULL;
    range.magic = DIRTY_MAGIC;
    range.version = DIRTY_VERSION;
    current = failure;
    int error = load(file, &range, &object, failure);
    if (!error) {
        error = map_object(object, &range, tracker, failure);
        if (!error)
            error = publish(object, &range, pin_dir, failure);
        bpf_object__close(object);
    }
    current = NULL;
    if (error)
        unmap(tracker);
    return error;
}

/* ---- open ---- */

static int open_pin(const char *pin_dir, const char *name, int *fd, ws_failure *failure) {
    char path[PATH_MAX];
    int error = join(path, pin_dir, name, failure);
    if (error)
        return error;
    *fd = bpf_obj_get(path);
    return *fd < 0 ? fail(failure, errno, "open the pin %s", path) : 0;
}

static int describe_map(int fd, struct bpf_map_info *info, ws_failure *failure) {
    __u32 bytes = sizeof(*info);
    memset(info, 0, sizeof(*info));
    if (bpf_obj_get_info_by_fd(fd, info, &bytes))
        return fail(failure, errno, "ask what a pinned map is");
    if (info->type != BPF_MAP_TYPE_ARRAY || !(info->map_flags & BPF_F_MMAPABLE))
        return fail(failure, EINVAL, "use a pinned map, which is not a tracker's");
    return 0;
}

static int open_range(const char *pin_dir, ws_tracker *tracker, __u32 *map_id,
                      ws_failure *failure) {
    int fd;
    struct bpf_map_info info;
    int error = open_pin(pin_dir, "range", &fd, failure);
    if (error)
        return error;
    error = describe_map(fd, &info, failure);
    *map_id = info.id;
    if (!error && info.value_size < sizeof(struct dirty_range))
        error = fail(failure, EINVAL, "use the pins in %s, which are not a tracker's", pin_dir);
    if (!error)
        error = map_range(fd, tracker, failure);
    close(fd);
    if (error)
        return error;
    const struct dirty_range *range = tracker->range;
    if (range->magic != DIRTY_MAGIC || range->version != DIRTY_VERSION ||
        range->link_count > MAX_LINKS)
        return fail(failure, EINVAL, "use the pins in %s: another version's, or no tracker's",
                    pin_dir);
    return 0;
}

static int open_words(const char *pin_dir, ws_tracker *tracker, ws_failure *failure) {
    int fd;
    struct bpf_map_info info;
    int error = open_pin(pin_dir, "dirty", &fd, failure);
    if (error)
        return error;
    error = describe_map(fd, &info, failure);
    if (!error &&
        (info.value_size != sizeof(uint64_t) || info.max_entries != tracker->range->word_count))
        error = fail(failure, EINVAL, "use the bitmap in %s, whose size is wrong", pin_dir);
    if (!error)
        error = map_words(fd, tracker, failure);
    close(fd);
    return error;
}

static int open_sums(const char *pin_dir, ws_tracker *tracker, ws_failure *failure) {
    int fd;
    struct bpf_map_info info;
    int error = open_pin(pin_dir, "sums", &fd, failure);
    if (error)
        return error;
    error = describe_map(fd, &info, failure);
    if (!error && info.value_size != sizeof(struct dirty_sum))
        error = fail(failure, EINVAL, "use the sums in %s, whose size is wrong", pin_dir);
    if (!error)
        error = map_sums(fd, info.max_entries, tracker, failure);
    close(fd);
    return error;
}

static int open_in_flight(const char *pin_dir, ws_tracker *tracker, ws_failure *failure) {
    int fd;
    struct bpf_map_info info = {0};
    __u32 bytes = sizeof(info);
    const struct dirty_range *range = tracker->range;
    int error = open_pin(pin_dir, "inflight", &fd, failure);
    if (error)
        return error;
    if (bpf_obj_get_info_by_fd(fd, &info, &bytes))
        error = fail(failure, errno, "ask what a pinned map is");
    else if (info.value_size != sizeof(struct dirty_slot) ||
             info.type != (range->bio_based ? BPF_MAP_TYPE_LRU_HASH : BPF_MAP_TYPE_ARRAY) ||
             (!range->bio_based && info.max_entries != slot_count(range)))
        error = fail(failure, EINVAL, "use the map of writes in flight in %s", pin_dir);
    else
        error = map_in_flight(fd, tracker, failure);
    close(fd);
    return error;
}

/* The program behind a link; negative errno. */
static int open_program(int link) {
    struct bpf_link_info info = {0};
    __u32 bytes = sizeof(info);
    if (bpf_obj_get_info_by_fd(link, &info, &bytes))
        return -errno;
    return bpf_prog_get_fd_by_id(info.prog_id);
}

static int program_uses(int program, __u32 map_id) {
    __u32 maps[MAX_MAPS], bytes = sizeof(struct bpf_prog_info);
    struct bpf_prog_info info = {.nr_map_ids = MAX_MAPS, .map_ids = (__u64)(uintptr_t)maps};
    if (bpf_obj_get_info_by_fd(program, &info, &bytes))
        return errno;
    for (__u32 i = 0; i < info.nr_map_ids && i < MAX_MAPS; i++)
        if (maps[i] == map_id)
            return 0;
    return EINVAL;
}

/* A link of that name exists, and its program belongs to these maps (each counts in range). */
static int check_link(const char *pin_dir, unsigned index, __u32 map_id, ws_failure *failure) {
    char name[NAME_MAX];
    int link;
    link_name(name, index);
    int error = open_pin(pin_dir, name, &link, failure);
    if (error)
        return error;
    int program = open_program(link);
    error = program < 0 ? -program : program_uses(program, map_id);
    if (program >= 0)
        close(program);
    close(link);
    return error ? fail(failure, error, "find the program behind %s/%s", pin_dir, name) : 0;
}

int ws_tracker_open(const char *pin_dir, ws_tracker *tracker, ws_failure *failure) {
    __u32 map_id = 0;
    current = failure;
    int error = open_range(pin_dir, tracker, &map_id, failure);
    if (!error)
        error = open_words(pin_dir, tracker, failure);
    if (!error)
        error = open_sums(pin_dir, tracker, failure);
    if (!error)
        error = open_in_flight(pin_dir, tracker, failure);
    for (unsigned i = 0; !error && i < tracker->range->link_count; i++)
        error = check_link(pin_dir, i, map_id, failure);
    current = NULL;
    if (error)
        unmap(tracker);
    return error;
}

/* ---- remove ---- */

static int remove_pin(const char *pin_dir, const char *name, ws_failure *failure) {
    char path[PATH_MAX];
    int error = join(path, pin_dir, name, failure);
    if (!error && unlink(path) && errno != ENOENT)
        error = fail(failure, errno, "remove the pin %s", path);
    return error;
}

int ws_tracker_remove(const char *pin_dir, ws_failure *failure) {
    int error = require_bpffs(pin_dir, failure);
    if (error == ENOENT)
        return 0;
    for (unsigned i = 0; i < MAX_LINKS && !error; i++) {
        char name[NAME_MAX];
        link_name(name, i);
        error = remove_pin(pin_dir, name, failure);
    }
    if (!error)
        error = remove_pin(pin_dir, "dirty", failure);
    if (!error)
        error = remove_pin(pin_dir, "range", failure);
    if (!error)
        error = remove_pin(pin_dir, "inflight", failure);
    if (!error)
        error = remove_pin(pin_dir, "sums", failure);
    if (!error && rmdir(pin_dir) && errno != ENOENT)
        error = fail(failure, errno, "remove the directory %s", pin_dir);
    return error;
}
