#include "upload.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "signals.hpp"

namespace resilient_train::cuda {
namespace {

constexpr std::size_t kChunk = 4 << 20;
constexpr std::size_t kChunksOfThread = 2;  // One is filled while the other is on its way.

const void* host(Pointer address) { return reinterpret_cast<const void*>(address); }

}  // namespace

Upload::Upload(std::shared_ptr<Device> device, const std::vector<Copy>& copies, StreamHandle compute, unsigned threads)
    : device_(std::move(device)), stream_(device_->context()), begun_(device_->context()) {
  std::size_t room = 0, through_chunks = 0;
  for (const Copy& copy : copies) {
    if (copy.size == 0) continue;
    if (device_->locked(host(copy.source), copy.size)) {
      loads_.push_back({{copy}, true});
      room = 0;
      continue;
    }
    for (std::size_t at = 0; at < copy.size;) {
      if (room == 0) {
        loads_.push_back({{}, false});
        room = kChunk;
        ++through_chunks;
      }
      const std::size_t n = std::min(room, copy.size - at);
      loads_.back().copies.push_back({copy.target + at, copy.source + at, n});
      at += n;
      room -= n;
    }
  }
  if (loads_.empty()) return;
  const std::size_t count = std::clamp<std::size_t>(std::min<std::size_t>(threads, through_chunks), 1, 16);
  if (through_chunks > 0)
    memory_ = std::make_unique<PinnedMemory>(device_->context(), count * kChunksOfThread * kChunk);
  {
    const Current current(*device_->context());
    begun_.record(compute);
    begun_.hold_back(stream_);
  }
  const SignalsBlocked blocked;
  for (std::size_t i = 0; i < count; ++i) {
    unsigned char* chunks = memory_ != nullptr ? memory_->data() + i * kChunksOfThread * kChunk : nullptr;
    try {
      threads_.emplace_back([this, chunks] { run(chunks); });
    } catch (...) {
      if (i == 0) throw;
      break;  // The others do its share.
    }
  }
}

Upload::~Upload() {
  for (auto& thread : threads_) thread.join();
}

void Upload::wait() {
  for (auto& thread : threads_) thread.join();
  threads_.clear();
  const std::lock_guard guard(mutex_);
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Upload::run(unsigned char* chunks) {
  try {
    const Current current(*device_->context());
    const std::array<Event, kChunksOfThread> left{Event(device_->context()), Event(device_->context())};
    std::size_t turn = 0;
    for (std::size_t i; (i = next_.fetch_add(1)) < loads_.size();) {
      const std::size_t which = turn++ % kChunksOfThread;
      if (turn > kChunksOfThread) left[which].wait();
      carry(loads_[i], loads_[i].direct ? nullptr : chunks + which * kChunk);
      left[which].record(stream_);
    }
    device_->driver().stream_wait(stream_);
  } catch (...) {
    next_ = loads_.size();
    // What is under way reads and writes memory that is about to be given back.
    device_->context()->quietly([this](const Driver& driver) { driver.stream_wait.quietly(stream_); });
    const std::lock_guard guard(mutex_);
    if (error_ == nullptr) error_ = std::current_exception();
  }
}

void Upload::carry(const Load& load, unsigned char* chunk) {
  for (const Copy& copy : load.copies) {
    const void* from = host(copy.source);
    if (!load.direct) {
      from = std::memcpy(chunk, from, copy.size);
      chunk += copy.size;
    }
    device_->driver().to_device(copy.target, from, copy.size, stream_);
  }
}

}  // namespace resilient_train::cuda
