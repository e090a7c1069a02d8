// The tile instructions of AMX, and whether they may be used. They are written as assembly since the intrinsics of GCC
// take no template parameters, and do not tell the compiler that memory is read: it could drop what was stored there.
#pragma once

#include <cpuid.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Tiles of palette 1 as this code wants them: leaf 0x1D of `cpuid`.
inline bool tiles_are_whole() {
    unsigned a, b, c, d;
    return __get_cpuid_count(0x1D, 1, &a, &b, &c, &d) && a >> 16 >= TILE_BYTES && (b & 0xFFFF) >= TILE_LINE &&
           b >> 16 >= TILE_REGISTERS && (c & 0xFFFF) >= TILE_LINES;
}

// Whether the system saves tiles when it switches threads: state components 17 and 18.
inline bool system_saves_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & 3u << 17) == 3u << 17;
}

// Linux reserves room for tiles only in processes that ask for it. That holds for all threads of the process.
inline bool tiles_are_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

// bfloat16 and integer products both.
inline bool supports_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, ALL = BF16 | TILE | INT8;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
    static const bool granted = tiles_are_whole() && system_saves_tiles() && tiles_are_granted();
    return granted;
}

inline void tile_configure(const TileConfig &config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Lines are `stride` bytes apart.
template <int T>
inline void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}

// The same of what will not be read again soon: it takes no room in the first-level cache from what will.
template <int T>
inline void tile_stream(const void *from, int64_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}

template <int T>
inline void tile_store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}

// C [16, 16] float32 += A [16, 16, 2] B [16, 16, 2] bfloat16: line m of A, line k of B, pairs of columns in both.
template <int C, int A, int B>
inline void tile_dp_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C [16, 16] int32 += A [16, 16, 4] unsigned bytes times B [16, 16, 4] signed bytes.
template <int C, int A, int B>
inline void tile_dp_busd() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
