#include "scatter.hpp"

#include <algorithm>
#include <stdexcept>

#include "copier.hpp"
#include "crc32c.hpp"

namespace resilient_train {
namespace {

// What is read before it is summed: little enough to be in a core's own cache still.
constexpr std::uint64_t kStep = 512 << 10;

// Calls summed(crc, target, at, n), which extends `crc`, for all bytes in order, in pieces of at most `step` bytes that
// are within a segment and a block; the index of the first block that has another sum than it should, or -1.
template <class Summed>
std::ptrdiff_t walk(const std::vector<Segment>& segments, const std::vector<std::uint32_t>& sums, std::uint64_t step,
                    Summed summed) {
  std::uint64_t total = 0;
  for (const Segment& segment : segments) total += segment.size;
  if ((total + kBlock - 1) / kBlock != sums.size()) throw std::invalid_argument("the segments do not fill the blocks");
  std::ptrdiff_t bad = -1;
  std::uint32_t crc = 0;
  std::uint64_t at = 0;
  for (const Segment& segment : segments) {
    for (std::uint64_t done = 0; done < segment.size;) {
      const std::uint64_t n = std::min({segment.size - done, kBlock - at % kBlock, step});
      crc = summed(crc, segment.target == 0 ? nullptr : reinterpret_cast<unsigned char*>(segment.target + done), at, n);
      done += n;
      at += n;
      if (at % kBlock != 0 && at != total) continue;
      const auto block = static_cast<std::ptrdiff_t>((at - 1) / kBlock);
      if (bad < 0 && crc != sums[block]) bad = block;
      crc = 0;
    }
  }
  return bad;
}

}  // namespace

std::ptrdiff_t scatter(const unsigned char* source, const std::vector<Segment>& segments,
                       const std::vector<std::uint32_t>& sums) {
  for (const Segment& segment : segments)
    if (source == nullptr && segment.target == 0 && segment.size > 0)
      throw std::invalid_argument("bytes that stand nowhere cannot be checked");
  return walk(segments, sums, kBlock,
              [source](std::uint32_t crc, unsigned char* target, std::uint64_t at, std::uint64_t n) {
                if (source == nullptr) return crc32c(crc, target, n);
                if (target == nullptr) return crc32c(crc, source + at, n);
                populate(target, n);
                return stream_crc32c(crc, target, source + at, n);
              });
}

std::ptrdiff_t scatter_file(int handle, std::uint64_t offset, const std::vector<Segment>& segments,
                            const std::vector<std::uint32_t>& sums) {
  return walk(segments, sums, kStep,
              [handle, offset](std::uint32_t crc, unsigned char* target, std::uint64_t at, std::uint64_t n) {
                if (target == nullptr)
                  target = scratch();
                else
                  populate(target, n);
                read_file(handle, offset + at, target, n);
                return crc32c(crc, target, n);
              });
}

}  // namespace resilient_train
