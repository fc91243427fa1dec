// The engine's kernels. No thread waits for another, so that tests can run the same source on the host, thread after
// thread (tests/image/fake_cuda.cpp).
#include "kernels.hpp"

namespace {

using resilient_train::cuda::FingerprintTile;
using resilient_train::cuda::PackTile;
using Word = unsigned long long;

struct alignas(16) Quad {
  Word low, high;
};

template <typename T>
__device__ void copy(const PackTile& tile) {
  const T* from = reinterpret_cast<const T*>(tile.source);
  T* to = reinterpret_cast<T*>(tile.target);
  for (Word i = threadIdx.x; i < tile.size / sizeof(T); i += blockDim.x) to[i] = from[i];
}

// A bijection in which every bit of the result depends on every bit of `x`.
__device__ Word mix(Word x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

__device__ Word at_place(Word place, Word word) { return mix(word ^ ((place + 1) * 0x9e3779b97f4a7c15ull)); }

// `count` (1 to 8) bytes as the low bytes of a word.
__device__ Word assemble(const unsigned char* from, Word count) {
  Word word = 0;
  for (Word i = 0; i < count; ++i) word |= static_cast<Word>(from[i]) << (8 * i);
  return word;
}

__device__ Word load(const unsigned char* from, bool aligned) {
  return aligned ? *reinterpret_cast<const Word*>(from) : assemble(from, 8);
}

}  // namespace

// Copies one tile a block.
extern "C" __global__ void rt_pack(const PackTile* tiles) {
  const PackTile tile = tiles[blockIdx.x];
  const Word alignment = tile.source | tile.target | tile.size;
  if (alignment % 16 == 0)
    copy<Quad>(tile);
  else if (alignment % 4 == 0)
    copy<unsigned>(tile);
  else
    copy<unsigned char>(tile);
}

// Adds one tile a block to its tensor's sum, which begins as 0: the sum over all words of at_place(its number, it). It
// depends on the order, is the same for any alignment and any tiling, and shows every change of a single word.
extern "C" __global__ void rt_fingerprint(const FingerprintTile* tiles, Word* sums) {
  const FingerprintTile tile = tiles[blockIdx.x];
  const unsigned char* from = reinterpret_cast<const unsigned char*>(tile.source);
  const bool aligned = tile.source % 8 == 0;
  const Word whole = tile.size / 8, rest = tile.size % 8;
  Word sum = 0;
#ifdef __CUDACC__
#pragma unroll 8
#endif
  for (Word i = threadIdx.x; i < whole; i += blockDim.x)
    sum += at_place(tile.word + i, load(from + 8 * i, aligned));
  if (rest > 0 && whole % blockDim.x == threadIdx.x)
    sum += at_place(tile.word + whole, assemble(from + 8 * whole, rest));
  if (sum != 0) atomicAdd(sums + tile.sum, sum);
}
