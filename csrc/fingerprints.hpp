// 64-bit fingerprints of tensors where they stand, to find out later whether they were changed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "device.hpp"

namespace resilient_train::cuda {

// `size` bytes in the device's memory.
struct Range {
  Pointer address;
  std::size_t size;
};

// The fingerprints of many ranges, taken up to twice. Not thread-safe.
class Fingerprints {
 public:
  // The device has kernels. Throws Error if there is no memory.
  Fingerprints(std::shared_ptr<Device> device, const std::vector<Range>& ranges);
  ~Fingerprints();
  Fingerprints(const Fingerprints&) = delete;
  Fingerprints& operator=(const Fingerprints&) = delete;
  // Has the fingerprints taken when `stream` gets there. `which`: 0 or 1.
  void take(int which, StreamHandle stream);
  // What was taken; waits for it.
  std::vector<std::uint64_t> values(int which) const;

 private:
  const std::shared_ptr<Device> device_;
  const std::size_t count_;
  const Table<FingerprintTile> tiles_;
  const DeviceMemory sums_;
  const PinnedMemory results_;
  std::array<Event, 2> taken_;
};

}  // namespace resilient_train::cuda
