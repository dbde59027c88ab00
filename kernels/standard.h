// Standard headers of the kernels. They come before any file switches its instruction set: what they
// define inline is shared by the whole library and must run everywhere.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#define SAMBAY_X86 1
#include <immintrin.h>
#if defined(_MSC_VER) || __has_include(<avxvnniintrin.h>)
#define SAMBAY_COMPILES_AVX_VNNI 1  // GCC 11, clang 12
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define SAMBAY_ARM 1
#include <arm_neon.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

// SAMBAY_TARGET(text): the rest of the file may use these instructions. MSVC needs no permission.
#define SAMBAY_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SAMBAY_TARGET(text) \
  SAMBAY_PRAGMA(clang attribute push(__attribute__((target(text))), apply_to = function))
#define SAMBAY_TARGET_END SAMBAY_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define SAMBAY_TARGET(text) SAMBAY_PRAGMA(GCC target(text))
#define SAMBAY_TARGET_END
#else
#define SAMBAY_TARGET(text)
#define SAMBAY_TARGET_END
#endif
