#include "fingerprints.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace resilient_train::cuda {
namespace {

std::vector<FingerprintTile> cut(const std::vector<Range>& ranges) {
  std::vector<FingerprintTile> tiles;
  for (std::size_t i = 0; i < ranges.size(); ++i)
    for (std::size_t at = 0; at < ranges[i].size; at += kFingerprintTile)
      tiles.push_back({ranges[i].address + at, std::min<Pointer>(kFingerprintTile, ranges[i].size - at), at / 8, i});
  return tiles;
}

}  // namespace

Fingerprints::Fingerprints(std::shared_ptr<Device> device, const std::vector<Range>& ranges)
    : device_(std::move(device)),
      count_(ranges.size()),
      tiles_(device_->context(), cut(ranges)),
      sums_(device_->context(), 8 * std::max<std::size_t>(1, count_)),
      results_(device_->context(), 16 * std::max<std::size_t>(1, count_)),
      taken_{Event(device_->context()), Event(device_->context())} {}

Fingerprints::~Fingerprints() {
  for (const Event& event : taken_) event.wait_quietly();
}

void Fingerprints::take(int which, StreamHandle stream) {
  const Current current(*device_->context());
  const Driver& driver = device_->driver();
  try {
    if (count_ > 0) {
      driver.fill(sums_.address(), 0, 8 * count_, stream);
      if (tiles_.size() > 0) device_->kernels()->fingerprint(tiles_.address(), tiles_.size(), sums_.address(), stream);
      driver.to_host(results_.data() + which * 8 * count_, sums_.address(), 8 * count_, stream);
    }
    taken_[which].record(stream);
  } catch (...) {
    // What was handed over uses memory that goes with this object.
    driver.stream_wait.quietly(stream);
    throw;
  }
}

std::vector<std::uint64_t> Fingerprints::values(int which) const {
  const Current current(*device_->context());
  taken_[which].wait();
  std::vector<std::uint64_t> values(count_);
  if (count_ > 0) std::memcpy(values.data(), results_.data() + which * 8 * count_, 8 * count_);
  return values;
}

}  // namespace resilient_train::cuda
