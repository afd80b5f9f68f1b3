/* Page-aligned memory for direct I/O. From the heap rather than from mmap, so that
 * AddressSanitizer sees an overrun by a single byte. */
#include "buffer_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void *ws_buffer_new(size_t size) {
    void *data = NULL;
    int error = posix_memalign(&data, WS_BUFFER_ALIGN, size);
    if (error != 0) {
        errno = error;
        return NULL;
    }
    /* Heap memory may hold what another migration moved: it must not show in a short frame. */
    memset(data, 0, size);
    return data;
}

void ws_buffer_free(void *data) {
    free(data);
}
