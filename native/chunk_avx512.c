/* The chunk kernel for x86-64 with AVX-512 (foundation only). */
#include "chunk_kernel.h"

#ifdef WS_HAVE_AVX
#pragma GCC target("avx512f")
#ifndef __AVX512F__
#error "the compiler did not switch to AVX-512: xxhash.h would quietly pick slower code"
#endif
#define WS_KERNEL ws_chunk_avx512
#define WS_KERNEL_NAME "avx512"
#include "chunk_body.h"
#endif
