// Blocks of an image of which only some bytes travel: one end gathers these, the other puts them where they belong and
// verifies whole blocks all the same.
//
// Theory of operation.  Without its initial value and final complement a CRC is linear over GF(2): that of a block is
// the exclusive or of that of the wanted bytes, with zeros in their gaps, and that of the gaps, with zeros in place of
// the wanted bytes.  So one number for each block, the second, stands for all bytes of the gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace resilient_train {

// `count` times `size` bytes, one every `stride` bytes, the first at byte `at` of the blocks.
struct Rows {
  std::uint64_t at;
  std::uint64_t size;
  std::uint64_t stride;
  std::uint64_t count;
  std::uint64_t target;  // address of the first
  std::uint64_t spread;  // bytes from the address of one to that of the next
};

// Copies the rows of the blocks at `source`, `total` bytes, to `target`, one behind the other.
//
// Returns for each block the CRC32C of what is not in the rows, zeros in place of the rows, without initial value and
// final complement.  Throws std::invalid_argument unless the rows are in order, disjoint and within the blocks.
// Thread-safe.
std::vector<std::uint32_t> gather_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                                       unsigned char* target);

// The other end: copies the rows, which stand one behind the other at `source`, to their targets, and checks each block
// of them and its gaps against `sums`.
//
// Returns the index of the first block whose checksum differs, or -1.  Throws std::invalid_argument as above, if rows
// would be written on top of each other, and if there are not as many `gaps` and `sums` as blocks.  Thread-safe.
std::ptrdiff_t scatter_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                            const std::vector<std::uint32_t>& gaps, const std::vector<std::uint32_t>& sums);

// Copies the rows to their targets out of the blocks themselves, which stand at `source`, and checks these; otherwise as
// `scatter_rows`.
std::ptrdiff_t place_rows(const unsigned char* source, std::uint64_t total, const std::vector<Rows>& rows,
                          const std::vector<std::uint32_t>& sums);

// The same of blocks that stand in a file, from byte `offset` on.  Throws FileError and EndOfFile, too.
std::ptrdiff_t place_file_rows(int handle, std::uint64_t offset, std::uint64_t total, const std::vector<Rows>& rows,
                               const std::vector<std::uint32_t>& sums);

}  // namespace resilient_train
