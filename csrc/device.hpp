// One CUDA device as the engine uses it: its context, the kernels, and which memory of the host is page-locked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "context.hpp"
#include "kernels.hpp"

namespace resilient_train::cuda {

// The compiled kernels (csrc/kernels.cu) that are part of the engine; empty if it was built without nvcc.
std::string embedded_kernels();

// The kernels on one device.
class Kernels {
 public:
  // Throws Error if the driver takes none of the forms in `image`, a fat binary.
  Kernels(Shared context, const std::string& image);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;
  // Enqueues one block of threads for each of `count` tiles, which stand in the device's memory. The context is current.
  void pack(Pointer tiles, std::size_t count, StreamHandle stream) const;
  void fingerprint(Pointer tiles, std::size_t count, Pointer sums, StreamHandle stream) const;

 private:
  const Shared context_;
  const std::string image_;  // The driver may load from it as late as with the first launch.
  ModuleHandle module_ = nullptr;
  FunctionHandle pack_ = nullptr, fingerprint_ = nullptr;
};

// Thread-safe.
class Device {
 public:
  // `library`: the driver's path; `kernels`: a fat binary of kernels.cu, or empty to go without. Throws Error if there
  // is no driver or no such device.
  Device(int index, const std::string& library, const std::string& kernels);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Page-locks `size` bytes of mapped memory, so that copies to and from it are asynchronous; at once if it is locked
  // already. Throws Error if that is refused.
  void lock(void* memory, std::size_t size);
  // Undoes lock(), before the memory is unmapped. Copies from and to it have ended. Nothing happens if it is not locked.
  void unlock(void* memory);
  // Whether all of this memory is page-locked by lock().
  bool locked(const void* memory, std::size_t size) const;

  const Shared& context() const { return context_; }
  const Driver& driver() const { return context_->driver(); }
  // Null where there are none.
  const Kernels* kernels() const { return kernels_.get(); }
  // Why there are none.
  const std::string& why_no_kernels() const { return why_no_kernels_; }

 private:
  const Shared context_;
  std::unique_ptr<Kernels> kernels_;
  std::string why_no_kernels_;
  mutable std::mutex mutex_;
  std::map<const unsigned char*, std::size_t> locked_;
};

// A table in the device's memory.
template <typename T>
class Table {
 public:
  Table(const Shared& context, const std::vector<T>& rows)
      : size_(rows.size()), memory_(context, std::max<std::size_t>(1, rows.size() * sizeof(T))) {
    if (rows.empty()) return;
    // Not by the default stream, which would wait for the computation.
    const Stream stream(context);
    const Current current(*context);
    context->driver().to_device(memory_.address(), rows.data(), rows.size() * sizeof(T), stream);
    context->driver().stream_wait(stream);
  }
  std::size_t size() const { return size_; }
  Pointer address() const { return memory_.address(); }

 private:
  const std::size_t size_;
  const DeviceMemory memory_;
};

}  // namespace resilient_train::cuda
