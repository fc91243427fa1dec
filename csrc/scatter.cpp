#include "scatter.hpp"

#include <algorithm>
#include <stdexcept>

#include "copier.hpp"
#include "crc32c.hpp"

namespace resilient_train {

std::ptrdiff_t scatter(const unsigned char* source, const std::vector<Segment>& segments,
                       const std::vector<std::uint32_t>& sums) {
  std::uint64_t total = 0;
  for (const Segment& segment : segments) {
    if (source == nullptr && segment.target == 0 && segment.size > 0)
      throw std::invalid_argument("bytes that stand nowhere cannot be checked");
    total += segment.size;
  }
  if ((total + kBlock - 1) / kBlock != sums.size())
    throw std::invalid_argument("the segments do not fill the blocks");
  std::ptrdiff_t bad = -1;
  std::uint32_t crc = 0;
  std::uint64_t at = 0;
  for (const Segment& segment : segments) {
    for (std::uint64_t done = 0; done < segment.size;) {
      const std::uint64_t n = std::min(segment.size - done, kBlock - at % kBlock);
      auto* target = reinterpret_cast<unsigned char*>(segment.target);
      if (source == nullptr)
        crc = crc32c(crc, target + done, n);
      else if (target == nullptr)
        crc = crc32c(crc, source + at, n);
      else
        crc = stream_crc32c(crc, target + done, source + at, n);
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

}  // namespace resilient_train
