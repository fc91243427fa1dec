#include "crc32c.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#include <wmmintrin.h>

#define RT_CRC __attribute__((target("sse4.2,pclmul")))
#endif

namespace resilient_train {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // reflected 0x1edc6f41

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (std::size_t slice = 1; slice < 8; ++slice)
    for (std::size_t byte = 0; byte < 256; ++byte)
      tables[slice][byte] = (tables[slice - 1][byte] >> 8) ^ tables[0][tables[slice - 1][byte] & 0xff];
  return tables;
}

constexpr Tables kTables = make_tables();

// What a number of zero bytes does to the register: a linear map over GF(2), as tables by the register's bytes.
using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

std::uint32_t apply(const Shift& shift, std::uint32_t crc) {
  return shift[0][crc & 0xff] ^ shift[1][crc >> 8 & 0xff] ^ shift[2][crc >> 16 & 0xff] ^ shift[3][crc >> 24];
}

// The map that takes each bit of the register to what `image(bit)` says.
template <class Image>
Shift make_shift(Image image) {
  Shift shift{};
  for (int part = 0; part < 4; ++part) {
    std::array<std::uint32_t, 8> basis;
    for (int bit = 0; bit < 8; ++bit) basis[bit] = image(1u << (8 * part + bit));
    for (std::uint32_t byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) shift[part][byte] ^= basis[bit];
  }
  return shift;
}

// By 1, 2, 4, ... zero bytes, each the one before it twice.
const std::array<Shift, 32>& shifts() {
  static const std::array<Shift, 32> powers = [] {
    std::array<Shift, 32> made;
    made[0] = make_shift([](std::uint32_t crc) { return (crc >> 8) ^ kTables[0][crc & 0xff]; });
    for (std::size_t k = 1; k < made.size(); ++k)
      made[k] = make_shift([&](std::uint32_t crc) { return apply(made[k - 1], apply(made[k - 1], crc)); });
    return made;
  }();
  return powers;
}

#if defined(__x86_64__)
// One chain of crc32 instructions has a latency of 3 cycles and a throughput of 1, so three independent lanes run at
// full speed; their results are joined by shifting the CRC over the following lanes' bytes.
constexpr std::size_t kLane = 4096;
constexpr std::size_t kShort = 128;  // What is left, and rows of matrices.
constexpr std::size_t kAhead = 3072;

bool has_instructions() {
  static const bool both = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
  return both;
}

// Shifts a register over `bytes` bytes when multiplied with it and reduced by a crc32 instruction over the product:
// x^(8 * bytes - 33) modulo the polynomial, bits reversed.  The product is one bit short of where a register's bits would
// stand, and the instruction multiplies with x^32 itself.
constexpr std::uint32_t multiplier(std::size_t bytes) {
  std::uint32_t power = 0x80000000;
  for (std::size_t n = 8 * bytes - 33; n > 0; --n) power = (power >> 1) ^ ((power & 1) ? kPolynomial : 0);
  return power;
}

// The register after three lanes of `kBytes` bytes, of which `a` went through the first, and `b` and `c`, zero before,
// through the others.
template <std::size_t kBytes>
RT_CRC inline std::uint64_t joined(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  constexpr std::uint32_t one = multiplier(kBytes), two = multiplier(2 * kBytes);
  const auto times = [](std::uint64_t crc, std::uint32_t power) RT_CRC {
    return _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(crc)), _mm_cvtsi32_si128(static_cast<int>(power)),
                                0);
  };
  const __m128i product = _mm_xor_si128(times(a, two), times(b, one));
  return _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product))) ^ c;
}

std::uint64_t load(const unsigned char* at) {
  std::uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

// The register after as many of the bytes as three lanes have, again and again; takes them off.
template <std::size_t lane>
RT_CRC std::uint64_t in_lanes(std::uint64_t a, const unsigned char*& at, std::size_t& size) {
  for (; size >= 3 * lane; size -= 3 * lane, at += 3 * lane) {
    std::uint64_t b = 0, c = 0;
    for (std::size_t i = 0; i < lane; i += 8) {
      // The processor foresees three streams, but not one that is read at three places.
      if (lane < kLane && i % 64 == 0)
        for (int part = 0; part < 3; ++part) _mm_prefetch(at + part * lane + i + kAhead, _MM_HINT_T0);
      a = _mm_crc32_u64(a, load(at + i));
      b = _mm_crc32_u64(b, load(at + lane + i));
      c = _mm_crc32_u64(c, load(at + 2 * lane + i));
    }
    a = joined<lane>(a, b, c);
  }
  return a;
}

RT_CRC std::uint32_t crc32c_sse42(std::uint32_t crc, const void* data, std::size_t size) {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t a = ~crc;
  if (size >= 3 * kLane) a = in_lanes<kLane>(a, at, size);
  if (size >= 3 * kShort) a = in_lanes<kShort>(a, at, size);
  for (; size >= 8; size -= 8, at += 8) a = _mm_crc32_u64(a, load(at));
  auto rest = static_cast<std::uint32_t>(a);
  for (; size > 0; --size, ++at) rest = _mm_crc32_u8(rest, *at);
  return ~rest;
}

// 64 bytes past the caches, and their checksum; `to` is 16-byte aligned.
__attribute__((target("sse4.2,pclmul"), always_inline)) inline std::uint64_t stream_line(
    std::uint64_t crc, unsigned char* to, const unsigned char* from) {
  for (std::size_t i = 0; i < 64; i += 16) {
    const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), word);
    crc = _mm_crc32_u64(crc, static_cast<std::uint64_t>(_mm_cvtsi128_si64(word)));
    crc = _mm_crc32_u64(crc, static_cast<std::uint64_t>(_mm_extract_epi64(word, 1)));
  }
  return crc;
}

RT_CRC std::uint32_t stream_sse42(std::uint32_t crc, void* target, const void* source, std::size_t size) {
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
  const std::size_t head = std::min<std::size_t>(size, -reinterpret_cast<std::uintptr_t>(to) & 63);
  std::memcpy(to, from, head);
  crc = crc32c_sse42(crc, from, head);
  to += head, from += head, size -= head;
  while (size >= 3 * kLane) {
    std::uint64_t a = static_cast<std::uint32_t>(~crc), b = 0, c = 0;
    for (std::size_t i = 0; i < kLane; i += 64) {
      a = stream_line(a, to + i, from + i);
      b = stream_line(b, to + kLane + i, from + kLane + i);
      c = stream_line(c, to + 2 * kLane + i, from + 2 * kLane + i);
    }
    crc = ~static_cast<std::uint32_t>(joined<kLane>(a, b, c));
    to += 3 * kLane, from += 3 * kLane, size -= 3 * kLane;
  }
  _mm_sfence();
  std::memcpy(to, from, size);
  return crc32c_sse42(crc, from, size);
}

// Whole lines past the caches, so that memory need not be read to be written, however short a row is.
void stream_short(void* target, const void* source, std::size_t size) {
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
  const std::size_t head = std::min<std::size_t>(size, -reinterpret_cast<std::uintptr_t>(to) & 63);
  std::memcpy(to, from, head);
  to += head, from += head, size -= head;
  for (; size >= 64; to += 64, from += 64, size -= 64)
    for (std::size_t i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  std::memcpy(to, from, size);
}
#endif

}  // namespace

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t size) noexcept {
  const auto* at = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; size -= 8, at += 8) {
    const std::uint32_t low = crc ^ (at[0] | at[1] << 8 | at[2] << 16 | static_cast<std::uint32_t>(at[3]) << 24);
    crc = kTables[7][low & 0xff] ^ kTables[6][low >> 8 & 0xff] ^ kTables[5][low >> 16 & 0xff] ^
          kTables[4][low >> 24] ^ kTables[3][at[4]] ^ kTables[2][at[5]] ^ kTables[1][at[6]] ^ kTables[0][at[7]];
  }
  for (; size > 0; --size, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xff];
  return ~crc;
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size) noexcept {
#if defined(__x86_64__)
  if (has_instructions()) return crc32c_sse42(crc, data, size);
#endif
  return crc32c_portable(crc, data, size);
}

std::uint32_t crc32c_zeros(std::uint32_t crc, std::uint32_t size) noexcept {
  const std::array<Shift, 32>& powers = shifts();
  crc = ~crc;
  for (std::size_t k = 0; size > 0; ++k, size >>= 1)
    if (size & 1) crc = apply(powers[k], crc);
  return ~crc;
}

std::uint32_t copy_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept {
  // Piecewise, so that the checksum finds each piece in the cache that the copy has just filled.
  constexpr std::size_t kPiece = 64 << 10;
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
  while (size > 0) {
    const std::size_t n = std::min(size, kPiece);
    std::memcpy(to, from, n);
    crc = crc32c(crc, from, n);
    to += n;
    from += n;
    size -= n;
  }
  return crc;
}

std::uint32_t stream_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept {
#if defined(__x86_64__)
  // Less than this is in the caches anyway.
  if (has_instructions() && size >= (32 << 10)) return stream_sse42(crc, target, source, size);
#endif
  return copy_crc32c(crc, target, source, size);
}

std::uint32_t row_crc32c(std::uint32_t crc, void* target, const void* source, std::size_t size) noexcept {
#if defined(__x86_64__)
  if (has_instructions() && size < (32 << 10)) {
    stream_short(target, source, size);
    return crc32c_sse42(crc, source, size);
  }
#endif
  return stream_crc32c(crc, target, source, size);
}

void rows_done() noexcept {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace resilient_train
