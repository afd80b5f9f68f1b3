/* One-time tokens: what was handed out, what is spent. */
#include "stream_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct entry {
    uint8_t id[WS_TOKEN_ID_BYTES];
    uint8_t secret[WS_TOKEN_SECRET_BYTES];
    uint64_t deadline_ns;
    bool spent;
};

struct ws_tokens {
    pthread_mutex_t lock;
    struct entry *entries;
    size_t count, room;
};

/* A token is remembered for so long after its time, so that its late user is told why. */
#define REMEMBERED_NS UINT64_C(60000000000)

struct ws_tokens *ws_tokens_new(void) {
    struct ws_tokens *tokens = calloc(1, sizeof(*tokens));
    if (tokens != NULL)
        pthread_mutex_init(&tokens->lock, NULL);
    return tokens;
}

void ws_tokens_free(struct ws_tokens *tokens) {
    if (tokens == NULL)
        return;
    pthread_mutex_destroy(&tokens->lock);
    if (tokens->entries != NULL)
        explicit_bzero(tokens->entries, tokens->room * sizeof(struct entry));
    free(tokens->entries);
    free(tokens);
}

static void forget_old(struct ws_tokens *tokens) {
    uint64_t now = ws_now_ns();
    size_t kept = 0;
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->entries[i].deadline_ns + REMEMBERED_NS > now)
            tokens->entries[kept++] = tokens->entries[i];
    explicit_bzero(tokens->entries + kept, (tokens->count - kept) * sizeof(struct entry));
    tokens->count = kept;
}

static int add(struct ws_tokens *tokens, const uint8_t *token, uint64_t deadline_ns) {
    if (tokens->count > 0)
        forget_old(tokens);
    if (tokens->count == tokens->room) {
        size_t room = tokens->room == 0 ? 16 : 2 * tokens->room;
        struct entry *entries = calloc(room, sizeof(*entries));
        if (entries == NULL)
            return -ENOMEM;
        if (tokens->count > 0) {
            memcpy(entries, tokens->entries, tokens->count * sizeof(*entries));
            explicit_bzero(tokens->entries, tokens->count * sizeof(*entries));
        }
        free(tokens->entries);
        tokens->entries = entries;
        tokens->room = room;
    }
    struct entry *entry = &tokens->entries[tokens->count++];
    memcpy(entry->id, token, WS_TOKEN_ID_BYTES);
    memcpy(entry->secret, token + WS_TOKEN_ID_BYTES, WS_TOKEN_SECRET_BYTES);
    entry->deadline_ns = deadline_ns;
    entry->spent = false;
    return 0;
}

int ws_tokens_add(struct ws_tokens *tokens, const uint8_t token[WS_TOKEN_BYTES],
                  uint64_t deadline_ns) {
    pthread_mutex_lock(&tokens->lock);
    int rc = add(tokens, token, deadline_ns);
    pthread_mutex_unlock(&tokens->lock);
    return rc;
}

void ws_tokens_revoke(struct ws_tokens *tokens, const uint8_t id[WS_TOKEN_ID_BYTES]) {
    pthread_mutex_lock(&tokens->lock);
    for (size_t i = 0; i < tokens->count; i++)
        if (memcmp(tokens->entries[i].id, id, WS_TOKEN_ID_BYTES) == 0) {
            tokens->entries[i] = tokens->entries[--tokens->count];
            explicit_bzero(&tokens->entries[tokens->count], sizeof(struct entry));
            break;
        }
    pthread_mutex_unlock(&tokens->lock);
}

static enum ws_token_verdict spend(struct entry *entry, uint8_t *secret) {
    if (entry->spent)
        return WS_TOKEN_USED;
    if (entry->deadline_ns <= ws_now_ns())
        return WS_TOKEN_EXPIRED;
    memcpy(secret, entry->secret, WS_TOKEN_SECRET_BYTES);
    explicit_bzero(entry->secret, WS_TOKEN_SECRET_BYTES);
    entry->spent = true;
    return WS_TOKEN_GOOD;
}

enum ws_token_verdict ws_tokens_spend(struct ws_tokens *tokens, const uint8_t id[WS_TOKEN_ID_BYTES],
                                      uint8_t secret[WS_TOKEN_SECRET_BYTES]) {
    enum ws_token_verdict verdict = WS_TOKEN_UNKNOWN;
    pthread_mutex_lock(&tokens->lock);
    for (size_t i = 0; i < tokens->count && verdict == WS_TOKEN_UNKNOWN; i++)
        if (memcmp(tokens->entries[i].id, id, WS_TOKEN_ID_BYTES) == 0)
            verdict = spend(&tokens->entries[i], secret);
    pthread_mutex_unlock(&tokens->lock);
    return verdict;
}

size_t ws_tokens_count(struct ws_tokens *tokens) {
    uint64_t now = ws_now_ns();
    size_t count = 0;
    pthread_mutex_lock(&tokens->lock);
    for (size_t i = 0; i < tokens->count; i++)
        count += tokens->entries[i].deadline_ns > now;
    pthread_mutex_unlock(&tokens->lock);
    return count;
}
