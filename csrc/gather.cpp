#include "gather.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crc32c.hpp"
#include "file.hpp"
#include "piece.hpp"

namespace resilient_train {
namespace {

void check(const std::vector<Rows>& rows, std::uint64_t total, bool placed) {
  std::uint64_t end = 0;
  for (const Rows& some : rows) {
    if (placed && some.count > 1 && some.spread < some.size)
      throw std::invalid_argument("rows would be written on top of each other");
    // In this order, so that nothing overflows.
    if (some.size == 0 || some.count == 0 || some.at < end || some.at > total || some.size > total - some.at ||
        (some.count > 1 && (some.stride < some.size || some.stride > total ||
                            some.count - 1 > (total - some.at - some.size) / some.stride)))
      throw std::invalid_argument("the rows are not in order within the blocks");
    end = some.at + (some.count > 1 ? (some.count - 1) * some.stride : 0) + some.size;
  }
}

// Calls gap(at, n), row(target, at, n) for all bytes in order, in pieces that are within a block, and ended(block) after
// each block; `target` is where the piece of a row belongs.
template <class Gap, class Row, class Ended>
void walk(std::uint64_t total, const std::vector<Rows>& rows, Gap gap, Row row, Ended ended) {
  std::uint64_t at = 0;
  const auto until = [&](std::uint64_t end, const auto& part) {
    while (at < end) {
      const std::uint64_t n = std::min<std::uint64_t>(end - at, kBlock - at % kBlock);
      part(at, n);
      at += n;
      if (at % kBlock == 0 || at == total) ended((at - 1) / kBlock);
    }
  };
  for (const Rows& some : rows) {
    for (std::uint64_t index = 0; index < some.count; ++index) {
      const std::uint64_t begin = some.at + (index > 0 ? index * some.stride : 0);
      until(begin, gap);
      const std::uint64_t target = some.target + (index > 0 ? index * some.spread : 0);
      until(begin + some.size,
            [&](std::uint64_t place, std::uint64_t n) { row(target + (place - begin), place, n); });
    }
  }
  until(total, gap);
}

// Makes rows visible to other threads, however its scope is left.
struct RowsDone {
  ~RowsDone() { rows_done(); }
};

// `bytes(at)` gives the address of byte `at` of the blocks, of which those up to the end of its block stand there; it is
// asked in order, and first for the beginning of each block.
template <class Bytes>
std::ptrdiff_t placed(Bytes bytes, std::uint64_t total, const std::vector<Rows>& rows,
                      const std::vector<std::uint32_t>& sums) {
  check(rows, total, true);
  if (sums.size() != (total + kBlock - 1) / kBlock)
    throw std::invalid_argument("the checksums are not those of the blocks");
  const RowsDone done;
  std::ptrdiff_t bad = -1;
  std::uint32_t crc = 0;
  walk(
      total, rows, [&](std::uint64_t at, std::uint64_t n) { crc = crc32c(crc, bytes(at), n); },
      [&](std::uint64_t target, std::uint64_t at, std::uint64_t n) {
        crc = row_crc32c(crc, reinterpret_cast<unsigned char*>(target), bytes(at), n);
      },
      [&](std::uint64_t block) {
        if (bad < 0 && crc != sums[block]) bad = static_cast<std::ptrdiff_t>(block);
        crc = 0;
      });
  return bad;
}

}  // namespace

std::vector<std::uint32_t> gather_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                                       unsigned char* target) {
  check(rows, total, false);
  std::vector<std::uint32_t> gaps((total + kBlock - 1) / kBlock);
  constexpr std::uint32_t kRaw = ~0u;  // An initial value of zero, as crc32c() complements it.
  std::uint32_t crc = kRaw;
  walk(
      total, rows, [&](std::uint64_t at, std::uint64_t n) { crc = crc32c(crc, source + at, n); },
      [&](std::uint64_t, std::uint64_t at, std::uint64_t n) {
        std::memcpy(target, source + at, n);
        target += n;
        crc = crc32c_zeros(crc, static_cast<std::uint32_t>(n));
      },
      [&](std::uint64_t block) {
        gaps[block] = ~crc;
        crc = kRaw;
      });
  return gaps;
}

std::ptrdiff_t scatter_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                            const std::vector<std::uint32_t>& gaps, const std::vector<std::uint32_t>& sums) {
  check(rows, total, true);
  if (sums.size() != (total + kBlock - 1) / kBlock || gaps.size() != sums.size())
    throw std::invalid_argument("the checksums are not those of the blocks");
  std::ptrdiff_t bad = -1;
  std::uint32_t crc = 0;
  walk(
      total, rows,
      [&](std::uint64_t, std::uint64_t n) { crc = crc32c_zeros(crc, static_cast<std::uint32_t>(n)); },
      [&](std::uint64_t target, std::uint64_t, std::uint64_t n) {
        crc = row_crc32c(crc, reinterpret_cast<unsigned char*>(target), source, n);
        source += n;
      },
      [&](std::uint64_t block) {
        if (bad < 0 && (crc ^ gaps[block]) != sums[block]) bad = static_cast<std::ptrdiff_t>(block);
        crc = 0;
      });
  rows_done();
  return bad;
}

std::ptrdiff_t place_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                          const std::vector<std::uint32_t>& sums) {
  return placed([source](std::uint64_t at) { return source + at; }, total, rows, sums);
}

std::ptrdiff_t place_file_rows(int handle, std::uint64_t offset, std::uint64_t total, const std::vector<Rows>& rows,
                               const std::vector<std::uint32_t>& sums) {
  unsigned char* block = scratch();
  const auto bytes = [&](std::uint64_t at) {
    if (at % kBlock == 0) read_file(handle, offset + at, block, std::min<std::uint64_t>(kBlock, total - at));
    return block + at % kBlock;
  };
  return placed(bytes, total, rows, sums);
}

}  // namespace resilient_train
