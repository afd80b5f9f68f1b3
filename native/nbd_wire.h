/* One connection. Private to nbd_*.c. */
#ifndef WARMSYNC_NBD_WIRE_H
#define WARMSYNC_NBD_WIRE_H

#include "nbd_impl.h"

#include <libnbd.h>

#define WS_NBD_ALLOCATION "base:allocation"

/* -errno of the last libnbd call of this thread. */
int ws_nbd_error(void);

/* Connect, asking for these meta contexts; -errno, and nothing is left open. */
int ws_nbd_connect(const struct ws_nbd_place *place, const char *const *contexts, size_t count,
                   struct nbd_handle **handle);

/* Wait until something has happened; -errno. */
int ws_nbd_wait(struct nbd_handle *handle, unsigned patience_ms);

/* Ask for the status of [from, end) until all is told; `tell` gets each extent of each context. */
typedef int (*ws_nbd_tell)(void *who, const char *context, uint64_t offset, uint64_t length,
                           uint32_t flags);
int ws_nbd_ask(struct nbd_handle *handle, uint64_t from, uint64_t end, unsigned patience_ms,
               ws_nbd_tell tell, void *who);

/* A connection of the pool for one job; -errno. */
int ws_nbd_borrow(struct ws_nbd *nbd, size_t *index, struct nbd_handle **handle,
                  unsigned *patience_ms);
/* `broken`: it may be in the middle of something. */
void ws_nbd_give_back(struct ws_nbd *nbd, size_t index, bool broken);

#endif
