#include "device.hpp"

#include <cstdint>
#include <utility>

#ifdef RESILIENT_TRAIN_KERNELS
asm(".pushsection .rodata\n"
    ".balign 64\n"
    "resilient_train_kernels:\n"
    ".incbin \"" RESILIENT_TRAIN_KERNELS "\"\n"
    "resilient_train_kernels_end:\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" const char resilient_train_kernels[] __attribute__((visibility("hidden")));
extern "C" const char resilient_train_kernels_end[] __attribute__((visibility("hidden")));
#endif

namespace resilient_train::cuda {
namespace {

constexpr unsigned kPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE

}  // namespace

std::string embedded_kernels() {
#ifdef RESILIENT_TRAIN_KERNELS
  return {resilient_train_kernels, resilient_train_kernels_end};
#else
  return {};
#endif
}

Kernels::Kernels(Shared context, const std::string& image) : context_(std::move(context)), image_(image) {
  const Current current(*context_);
  const Driver& driver = context_->driver();
  driver.module_load(&module_, image_.data());
  try {
    driver.module_function(&pack_, module_, "rt_pack");
    driver.module_function(&fingerprint_, module_, "rt_fingerprint");
  } catch (...) {
    driver.module_unload.quietly(module_);
    throw;
  }
}

Kernels::~Kernels() {
  context_->quietly([this](const Driver& driver) { driver.module_unload.quietly(module_); });
}

void Kernels::pack(Pointer tiles, std::size_t count, StreamHandle stream) const {
  void* arguments[] = {&tiles};
  context_->driver().launch(pack_, static_cast<unsigned>(count), 1, 1, kThreads, 1, 1, 0, stream, arguments, nullptr);
}

void Kernels::fingerprint(Pointer tiles, std::size_t count, Pointer sums, StreamHandle stream) const {
  void* arguments[] = {&tiles, &sums};
  context_->driver().launch(fingerprint_, static_cast<unsigned>(count), 1, 1, kThreads, 1, 1, 0, stream, arguments,
                            nullptr);
}

Device::Device(int index, const std::string& library, const std::string& kernels)
    : context_(std::make_shared<const Context>(library, index)) {
  if (kernels.empty()) {
    why_no_kernels_ = "the engine was built without nvcc";
    return;
  }
  try {
    kernels_ = std::make_unique<Kernels>(context_, kernels);
  } catch (const Error& error) {
    why_no_kernels_ = error.what();
  }
}

Device::~Device() {
  for (const auto& [memory, size] : locked_)
    context_->quietly([at = memory](const Driver& driver) {
      driver.host_unregister.quietly(const_cast<unsigned char*>(at));
    });
}

void Device::lock(void* memory, std::size_t size) {
  const std::lock_guard guard(mutex_);
  const auto* first = static_cast<const unsigned char*>(memory);
  const auto found = locked_.find(first);
  if (found != locked_.end() && found->second >= size) return;
  const Current current(*context_);
  driver().host_register(memory, size, kPortable);
  locked_[first] = size;
}

void Device::unlock(void* memory) {
  const std::lock_guard guard(mutex_);
  if (locked_.erase(static_cast<const unsigned char*>(memory)) == 0) return;
  const Current current(*context_);
  driver().host_unregister(memory);
}

bool Device::locked(const void* memory, std::size_t size) const {
  const std::lock_guard guard(mutex_);
  const auto* first = static_cast<const unsigned char*>(memory);
  const auto after = locked_.upper_bound(first);
  if (after == locked_.begin()) return false;
  const auto& [begin, length] = *std::prev(after);
  return static_cast<std::size_t>(first - begin) + size <= length;
}

}  // namespace resilient_train::cuda
