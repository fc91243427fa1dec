// Takes blocks of a shard image apart: their bytes go where they belong, and their checksums are verified on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "file.hpp"

namespace resilient_train {

// The next `size` bytes of the image, and where they belong.
struct Segment {
  std::uint64_t target;  // address; 0 if nobody wants them
  std::uint64_t size;
};

// Checks consecutive blocks of an image, the first of which begins with the first segment, against `sums`.
//
// With a `source`, the image's bytes stand there and are copied to the targets in the same pass, for which pages that are
// missing are asked for at once; without one (null), they stand at the targets already, all of which must be given.
// Returns the index of the first block whose checksum differs, or -1.  Throws std::invalid_argument if there are not as
// many checksums as the segments have blocks.
std::ptrdiff_t scatter(const unsigned char* source, const std::vector<Segment>& segments,
                       const std::vector<std::uint32_t>& sums);

// The same of blocks that stand in a file, from byte `offset` on: they are read to their targets, and checked while they
// are in the caches.  Throws FileError and EndOfFile, too.
std::ptrdiff_t scatter_file(int handle, std::uint64_t offset, const std::vector<Segment>& segments,
                            const std::vector<std::uint32_t>& sums);

}  // namespace resilient_train
