/* The chunk kernel for x86-64 with AVX2. */
#include "chunk_kernel.h"

#ifdef WS_HAVE_AVX
#pragma GCC target("avx2")
#ifndef __AVX2__
#error "the compiler did not switch to AVX2: xxhash.h would quietly pick slower code"
#endif
#define WS_KERNEL ws_chunk_avx2
#define WS_KERNEL_NAME "avx2"
#include "chunk_body.h"
#endif
