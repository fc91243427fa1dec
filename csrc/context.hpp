// A device's primary context, which torch uses too, and what is made in it: each belongs to one object and goes with it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "driver.hpp"

namespace resilient_train::cuda {

inline constexpr int kRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

// The primary context of a device, kept alive.
class Context {
 public:
  // Throws Error if the driver or the device are not there.
  Context(const std::string& library, int device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  const Driver& driver() const { return driver_; }
  // For destructors: `action(driver)` with the context current. At the end of the process the driver may be gone.
  template <typename Action>
  void quietly(Action action) const {
    ContextHandle before = nullptr;
    if (driver_.push.quietly(handle_) != 0) return;
    int mode = kRelaxed;
    driver_.exchange_capture_mode.quietly(&mode);
    action(driver_);
    driver_.exchange_capture_mode.quietly(&mode);
    driver_.pop.quietly(&before);
  }

 private:
  friend class Current;
  const Driver driver_;
  int device_ = 0;
  ContextHandle handle_ = nullptr;
};

using Shared = std::shared_ptr<const Context>;

// While it lives, the context is this thread's current one; then the one before is again. What the thread calls meanwhile
// does not disturb another thread that captures a CUDA graph.
class Current {
 public:
  explicit Current(const Context& context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Context& context_;
  int capture_mode_;
};

// A stream of our own that does not synchronise with the legacy default stream. Its end waits for what it was given.
class Stream {
 public:
  explicit Stream(Shared context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator StreamHandle() const { return handle_; }

 private:
  const Shared context_;
  StreamHandle handle_ = nullptr;
};

// A point in a stream's work. A host thread that waits for it sleeps.
class Event {
 public:
  explicit Event(Shared context);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  // All methods want the context to be current.
  void record(StreamHandle stream) const;
  void wait() const;
  void wait_quietly() const noexcept;
  // Later work of `stream` waits for it.
  void hold_back(StreamHandle stream) const;

 private:
  const Shared context_;
  EventHandle handle_ = nullptr;
};

// Memory on the device.
class DeviceMemory {
 public:
  DeviceMemory(Shared context, std::size_t size);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  Pointer address() const { return address_; }

 private:
  const Shared context_;
  Pointer address_ = 0;
};

// Page-locked memory of the host.
class PinnedMemory {
 public:
  PinnedMemory(Shared context, std::size_t size);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  unsigned char* data() const { return static_cast<unsigned char*>(data_); }

 private:
  const Shared context_;
  void* data_ = nullptr;
};

// `size` bytes from `source` to `target`.
struct Copy {
  Pointer target, source;
  std::size_t size;
};

// Enqueues copies from the device to page-locked memory, which do not overlap, in any order: by one call where the
// driver has it. The context is current.
void copy_to_host(const Driver& driver, const std::vector<Copy>& copies, StreamHandle stream);

}  // namespace resilient_train::cuda
