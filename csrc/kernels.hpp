// What the kernels work on: tables in the device's memory, one entry for each block of threads.
#pragma once

namespace resilient_train::cuda {

inline constexpr unsigned kThreads = 256;
inline constexpr unsigned long long kPackTile = 16 << 10;        // bytes that one block packs
inline constexpr unsigned long long kFingerprintTile = 1 << 20;  // bytes that one block sums up; a multiple of 8

// `size` bytes from `source` to `target`.
struct PackTile {
  unsigned long long source, target, size;
};

// `size` bytes at `source`, the words of a tensor from number `word` on; added to `sums[sum]`.
struct FingerprintTile {
  unsigned long long source, size, word, sum;
};

}  // namespace resilient_train::cuda
