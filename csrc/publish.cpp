#include "publish.hpp"

#include <atomic>

namespace resilient_train {

void publish(std::uint64_t* word, std::uint64_t value) noexcept {
  std::atomic_ref<std::uint64_t>(*word).store(value, std::memory_order_release);
}

void retract(std::uint64_t* word) noexcept {
  std::atomic_ref<std::uint64_t>(*word).store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

std::uint64_t observe(const std::uint64_t* word) noexcept {
  return std::atomic_ref<std::uint64_t>(*const_cast<std::uint64_t*>(word)).load(std::memory_order_acquire);
}

}  // namespace resilient_train
