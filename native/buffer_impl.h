/* Page-aligned memory for direct I/O. */
#ifndef WARMSYNC_BUFFER_IMPL_H
#define WARMSYNC_BUFFER_IMPL_H

#include <stddef.h>

/* What O_DIRECT wants at most: the page size, and the largest logical block size in use. */
#define WS_BUFFER_ALIGN 4096

/* Return zeroed memory, or NULL with errno set. */
void *ws_buffer_new(size_t size);
void ws_buffer_free(void *data);

#endif
