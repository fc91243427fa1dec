// What an image is made of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace resilient_train {

// Bytes covered by one checksum of an image.
inline constexpr std::size_t kBlock = 1 << 20;

// `size` bytes that belong at byte `at` of the image.
struct Piece {
  std::uint64_t at;
  std::uint64_t source;  // address; 0 if the bytes stand in the image already
  std::uint64_t size;
  bool now;             // what it is when start() is called, however soon it is changed afterwards
  bool remote = false;  // the address is one of a CUDA device
};

}  // namespace resilient_train
