/* The chunk kernel for the architecture's baseline. */
#define WS_KERNEL ws_chunk_portable
#define WS_KERNEL_NAME "portable"
#include "chunk_body.h"
