#include "context.hpp"

#include <utility>

namespace resilient_train::cuda {
namespace {

constexpr unsigned kNonBlocking = 1;             // CU_STREAM_NON_BLOCKING
constexpr unsigned kSleepingWithoutTime = 1 | 2;  // CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING
constexpr unsigned kPortable = 1;                // CU_MEMHOSTALLOC_PORTABLE

}  // namespace

Context::Context(const std::string& library, int device) : driver_(library) {
  driver_.get_device(&device_, device);
  driver_.retain_primary(&handle_, device_);
}

Context::~Context() { driver_.release_primary.quietly(device_); }

Current::Current(const Context& context) : context_(context), capture_mode_(kRelaxed) {
  context.driver().push(context.handle_);
  context.driver().exchange_capture_mode.quietly(&capture_mode_);
}

Current::~Current() {
  context_.driver().exchange_capture_mode.quietly(&capture_mode_);
  ContextHandle mine = nullptr;
  context_.driver().pop.quietly(&mine);
}

Stream::Stream(Shared context) : context_(std::move(context)) {
  const Current current(*context_);
  context_->driver().stream_create(&handle_, kNonBlocking);
}

Stream::~Stream() {
  context_->quietly([this](const Driver& driver) {
    driver.stream_wait.quietly(handle_);
    driver.stream_destroy.quietly(handle_);
  });
}

Event::Event(Shared context) : context_(std::move(context)) {
  const Current current(*context_);
  context_->driver().event_create(&handle_, kSleepingWithoutTime);
}

Event::~Event() {
  context_->quietly([this](const Driver& driver) { driver.event_destroy.quietly(handle_); });
}

void Event::record(StreamHandle stream) const { context_->driver().event_record(handle_, stream); }

void Event::wait() const { context_->driver().event_wait(handle_); }

void Event::wait_quietly() const noexcept {
  context_->quietly([this](const Driver& driver) { driver.event_wait.quietly(handle_); });
}

void Event::hold_back(StreamHandle stream) const { context_->driver().stream_wait_event(stream, handle_, 0); }

DeviceMemory::DeviceMemory(Shared context, std::size_t size) : context_(std::move(context)) {
  const Current current(*context_);
  context_->driver().device_alloc(&address_, size);
}

DeviceMemory::~DeviceMemory() {
  context_->quietly([this](const Driver& driver) { driver.device_free.quietly(address_); });
}

PinnedMemory::PinnedMemory(Shared context, std::size_t size) : context_(std::move(context)) {
  const Current current(*context_);
  context_->driver().host_alloc(&data_, size, kPortable);
}

PinnedMemory::~PinnedMemory() {
  context_->quietly([this](const Driver& driver) { driver.host_free.quietly(data_); });
}

namespace {

constexpr Status kInvalidValue = 1, kNotSupported = 801;

// By one call; false if there is none or it is refused.
bool copy_batch(const Driver& driver, const std::vector<Copy>& copies, StreamHandle stream) {
  if ((!driver.batch && !driver.batch_12) || driver.batch_refused) return false;
  std::vector<Pointer> targets, sources;
  std::vector<std::size_t> sizes;
  for (const Copy& copy : copies) {
    targets.push_back(copy.target);
    sources.push_back(copy.source);
    sizes.push_back(copy.size);
  }
  CopyAttributes attributes{kStreamOrder, {0, 0}, {0, 0}, kBesideCompute};
  std::size_t first = 0, failed = 0;
  try {
    if (driver.batch)
      driver.batch(targets.data(), sources.data(), sizes.data(), sizes.size(), &attributes, &first, 1, stream);
    else
      driver.batch_12(targets.data(), sources.data(), sizes.data(), sizes.size(), &attributes, &first, 1, &failed,
                      stream);
  } catch (const Error& error) {
    if (error.status != kInvalidValue && error.status != kNotSupported) throw;
    // What is wrong with the copies themselves, the single calls will say.
    driver.batch_refused = true;
    return false;
  }
  return true;
}

}  // namespace

void copy_to_host(const Driver& driver, const std::vector<Copy>& copies, StreamHandle stream) {
  if (copies.size() > 1 && copy_batch(driver, copies, stream)) return;
  for (const Copy& copy : copies)
    driver.to_host(reinterpret_cast<void*>(copy.target), copy.source, copy.size, stream);
}

}  // namespace resilient_train::cuda
