// A CUDA driver on the host's memory, for tests: what the engine calls of libcuda, really asynchronous.
//
// Each stream is a thread that carries out what it was given in order. "Device memory" is memory that was allocated here
// or declared by fake_device_memory(). What real CUDA would make slow or wrong is an error here: a call without a current
// context, a copy to memory that is not page-locked, a batch on the default stream. Kernels are kernels.cu itself, as
// host code, thread after thread. fake_* are the tests' controls.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace device_code {

struct Index {
  unsigned x = 0;
};
thread_local Index threadIdx, blockIdx, blockDim;

void atomicAdd(unsigned long long* to, unsigned long long value) {
  std::atomic_ref<unsigned long long>(*to).fetch_add(value);
}

#define __global__
#define __device__
#include "../../csrc/kernels.cu"
#undef __global__
#undef __device__

}  // namespace device_code

namespace {

using Status = int;
using Pointer = unsigned long long;
constexpr Status kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidContext = 201, kAlreadyRegistered = 712,
                 kNotRegistered = 713, kNotFound = 500;

struct Event;

// What an event was recorded as most recently; waiting means waiting for one of these.
struct Record {
  bool done = false;
};

struct Stream {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> work;
  bool busy = false, stop = false;
  std::thread thread;

  Stream() : thread([this] { run(); }) {}
  ~Stream() {
    {
      std::lock_guard guard(mutex);
      stop = true;
    }
    wake.notify_all();
    thread.join();
  }
  void give(std::function<void()> action) {
    {
      std::lock_guard guard(mutex);
      work.push_back(std::move(action));
    }
    wake.notify_all();
  }
  void drain() {
    std::unique_lock lock(mutex);
    wake.wait(lock, [this] { return work.empty() && !busy; });
  }
  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait(lock, [this] { return stop || !work.empty(); });
      if (work.empty()) return;
      auto action = std::move(work.front());
      work.pop_front();
      busy = true;
      lock.unlock();
      action();
      lock.lock();
      busy = false;
      wake.notify_all();
    }
  }
};

struct Event {
  std::shared_ptr<Record> last;
};

// Some calls that fail.
struct Failure {
  int before, times;  // calls that do not, then calls that do
  Status status;
};

struct World {
  std::mutex mutex;
  std::condition_variable progress;
  int version = 13000;
  bool addresses = true;  // has cuGetProcAddress_v2
  std::atomic<int> copy_delay{0};  // microseconds before each copy
  std::map<std::string, Failure> failures;
  std::map<std::string, int> calls;
  std::map<const unsigned char*, std::size_t> device, pinned;  // memory
  std::set<const void*> allocated, registered;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::unique_ptr<Stream> standard;  // the legacy default stream
  int contexts = 0, modules = 0;
  std::string misuse;
};

World& world() {
  static World* const it = new World;
  return *it;
}

thread_local std::vector<int> current;
thread_local int capture_mode = 0;  // global: what waits or allocates would end another thread's capture of a graph

// What begins every call: counts it, and fails it if a test wants that or no context is current.
Status enter(const char* name, bool context = true) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  ++w.calls[name];
  const auto failure = w.failures.find(name);
  if (failure != w.failures.end() && --failure->second.before < 0 && --failure->second.times >= 0)
    return failure->second.status;
  if (context && current.empty()) {
    w.misuse = std::string(name) + " without a current context";
    return kInvalidContext;
  }
  if (context && capture_mode != 2) {
    w.misuse = std::string(name) + " would disturb the capture of a graph";
    return kInvalidValue;
  }
  return 0;
}

bool within(const std::map<const unsigned char*, std::size_t>& memory, const void* at, std::size_t size) {
  const auto* first = static_cast<const unsigned char*>(at);
  const auto after = memory.upper_bound(first);
  if (after == memory.begin()) return false;
  const auto& [begin, length] = *std::prev(after);
  return static_cast<std::size_t>(first - begin) + size <= length;
}

Status misuse(const std::string& what) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  w.misuse = what;
  return kInvalidValue;
}

bool on_device(Pointer at, std::size_t size) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  return within(w.device, reinterpret_cast<void*>(at), size);
}

bool is_pinned(const void* at, std::size_t size) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  return within(w.pinned, at, size);
}

Stream* stream_of(void* handle) {
  World& w = world();
  if (handle != nullptr) return static_cast<Stream*>(handle);
  std::lock_guard guard(w.mutex);
  if (w.standard == nullptr) w.standard = std::make_unique<Stream>();
  return w.standard.get();
}

void copy(void* to, const void* from, std::size_t size) {
  if (const int delay = world().copy_delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
  std::memcpy(to, from, size);
}

void wait_for(const std::shared_ptr<Record>& record) {
  if (record == nullptr) return;
  World& w = world();
  std::unique_lock lock(w.mutex);
  w.progress.wait(lock, [&] { return record->done; });
}

}  // namespace

extern "C" {

// ---- the tests' controls ----------------------------------------------------------------------------------------------

// Forgets failures and counts; version as cuDriverGetVersion reports it.
void fake_reset(int version, int addresses) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  w.version = version;
  w.addresses = addresses != 0;
  w.failures.clear();
  w.calls.clear();
  w.misuse.clear();
  w.copy_delay = 0;
}

// Calls from number `nth` of `name` from now on report `status`, so many times.
void fake_fail(const char* name, int nth, int status, int times) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  w.failures[name] = {nth - 1, times, status};
}

void fake_delay(int microseconds) { world().copy_delay = microseconds; }

int fake_calls(const char* name) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  return w.calls[name];
}

// Memory of the tests that is to count as the device's.
void fake_device_memory(const void* at, std::size_t size) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  if (size > 0)
    w.device[static_cast<const unsigned char*>(at)] = size;
  else
    w.device.erase(static_cast<const unsigned char*>(at));
}

// Number of objects that were made and not destroyed.
int fake_alive() {
  World& w = world();
  std::lock_guard guard(w.mutex);
  return static_cast<int>(w.allocated.size() + w.registered.size() + w.streams.size() + w.events.size()) + w.contexts +
         w.modules;
}

int fake_registered() {
  World& w = world();
  std::lock_guard guard(w.mutex);
  return static_cast<int>(w.registered.size());
}

// What real CUDA would not have put up with; empty if nothing.
int fake_misuse(char* text, int size) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  std::strncpy(text, w.misuse.c_str(), size - 1);
  text[size - 1] = 0;
  return static_cast<int>(w.misuse.size());
}

// A computation that takes a while and then fills device memory with one byte.
void fake_compute(void* stream, void* at, std::size_t size, int byte, int microseconds) {
  stream_of(stream)->give([=] {
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    std::memset(at, byte, size);
  });
}

void* fake_stream() { return new Stream; }
void fake_stream_wait(void* stream) { stream_of(stream)->drain(); }
void fake_stream_free(void* stream) { delete static_cast<Stream*>(stream); }

// ---- the driver -------------------------------------------------------------------------------------------------------

Status cuInit(unsigned) { return enter("cuInit", false); }

Status cuDriverGetVersion(int* version) {
  *version = world().version;
  return 0;
}

Status cuGetErrorName(Status status, const char** name) {
  static const std::map<Status, const char*> names = {
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNoDevice, "CUDA_ERROR_NO_DEVICE"},              {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
      {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"}, {800, "CUDA_ERROR_NOT_PERMITTED"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}};
  const auto found = names.find(status);
  *name = found != names.end() ? found->second : nullptr;
  return found != names.end() ? 0 : kInvalidValue;
}

Status cuGetErrorString(Status, const char** text) {
  *text = "as the test wants it";
  return 0;
}

Status cuDeviceGet(int* device, int index) {
  *device = index;
  const Status status = enter("cuDeviceGet", false);
  return status != 0 ? status : index == 0 ? 0 : kNoDevice;
}

Status cuDevicePrimaryCtxRetain(void** context, int) {
  if (const Status status = enter("cuDevicePrimaryCtxRetain", false)) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  ++w.contexts;
  *context = &w;
  return 0;
}

Status cuDevicePrimaryCtxRelease_v2(int) {
  World& w = world();
  std::lock_guard guard(w.mutex);
  --w.contexts;
  return 0;
}

Status cuCtxPushCurrent_v2(void*) {
  if (const Status status = enter("cuCtxPushCurrent", false)) return status;
  current.push_back(1);
  return 0;
}

Status cuCtxPopCurrent_v2(void**) {
  if (current.empty()) return misuse("cuCtxPopCurrent without a current context");
  current.pop_back();
  if (current.empty() && capture_mode != 0) return misuse("the thread's capture mode is not what it was");
  return 0;
}

Status cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(capture_mode, *mode);
  return 0;
}

Status cuMemHostRegister_v2(void* at, std::size_t size, unsigned) {
  if (const Status status = enter("cuMemHostRegister")) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  if (!w.registered.insert(at).second) return kAlreadyRegistered;
  w.pinned[static_cast<unsigned char*>(at)] = size;
  return 0;
}

Status cuMemHostUnregister(void* at) {
  if (const Status status = enter("cuMemHostUnregister")) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  if (w.registered.erase(at) == 0) return kNotRegistered;
  w.pinned.erase(static_cast<unsigned char*>(at));
  return 0;
}

static Status allocate(const char* name, void** at, std::size_t size, std::map<const unsigned char*, std::size_t>& kind) {
  if (const Status status = enter(name)) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  *at = ::operator new(size, std::align_val_t(256));
  w.allocated.insert(*at);
  kind[static_cast<unsigned char*>(*at)] = size;
  return 0;
}

static Status release(const char* name, void* at, std::map<const unsigned char*, std::size_t>& kind) {
  if (const Status status = enter(name)) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  if (w.allocated.erase(at) == 0) return kInvalidValue;
  kind.erase(static_cast<unsigned char*>(at));
  ::operator delete(at, std::align_val_t(256));
  return 0;
}

Status cuMemHostAlloc(void** at, std::size_t size, unsigned) {
  return allocate("cuMemHostAlloc", at, size, world().pinned);
}

Status cuMemFreeHost(void* at) { return release("cuMemFreeHost", at, world().pinned); }

Status cuMemAlloc_v2(Pointer* at, std::size_t size) {
  return allocate("cuMemAlloc", reinterpret_cast<void**>(at), size, world().device);
}

Status cuMemFree_v2(Pointer at) { return release("cuMemFree", reinterpret_cast<void*>(at), world().device); }

Status cuStreamCreate(void** stream, unsigned flags) {
  if (const Status status = enter("cuStreamCreate")) return status;
  if (flags != 1) return misuse("a stream that waits for the default stream");
  auto* made = new Stream;
  World& w = world();
  std::lock_guard guard(w.mutex);
  w.streams.insert(made);
  *stream = made;
  return 0;
}

Status cuStreamDestroy_v2(void* stream) {
  if (const Status status = enter("cuStreamDestroy")) return status;
  World& w = world();
  {
    std::lock_guard guard(w.mutex);
    if (w.streams.erase(static_cast<Stream*>(stream)) == 0) return kInvalidValue;
  }
  delete static_cast<Stream*>(stream);
  return 0;
}

Status cuStreamSynchronize(void* stream) {
  if (const Status status = enter("cuStreamSynchronize")) return status;
  stream_of(stream)->drain();
  return 0;
}

Status cuStreamWaitEvent(void* stream, void* event, unsigned) {
  if (const Status status = enter("cuStreamWaitEvent")) return status;
  std::shared_ptr<Record> record;
  {
    std::lock_guard guard(world().mutex);
    record = static_cast<Event*>(event)->last;
  }
  stream_of(stream)->give([record] { wait_for(record); });
  return 0;
}

Status cuEventCreate(void** event, unsigned flags) {
  if (const Status status = enter("cuEventCreate")) return status;
  if (flags != 3) return misuse("an event that spins or takes the time");
  auto* made = new Event;
  World& w = world();
  std::lock_guard guard(w.mutex);
  w.events.insert(made);
  *event = made;
  return 0;
}

Status cuEventDestroy_v2(void* event) {
  if (const Status status = enter("cuEventDestroy")) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  if (w.events.erase(static_cast<Event*>(event)) == 0) return kInvalidValue;
  delete static_cast<Event*>(event);
  return 0;
}

Status cuEventRecord(void* event, void* stream) {
  if (const Status status = enter("cuEventRecord")) return status;
  auto record = std::make_shared<Record>();
  {
    std::lock_guard guard(world().mutex);
    static_cast<Event*>(event)->last = record;
  }
  stream_of(stream)->give([record] {
    World& w = world();
    std::lock_guard guard(w.mutex);
    record->done = true;
    w.progress.notify_all();
  });
  return 0;
}

Status cuEventSynchronize(void* event) {
  if (const Status status = enter("cuEventSynchronize")) return status;
  std::shared_ptr<Record> record;
  {
    std::lock_guard guard(world().mutex);
    record = static_cast<Event*>(event)->last;
  }
  wait_for(record);
  return 0;
}

Status cuMemcpyDtoHAsync_v2(void* to, Pointer from, std::size_t size, void* stream) {
  if (const Status status = enter("cuMemcpyDtoHAsync")) return status;
  if (!is_pinned(to, size)) return misuse("a copy to memory that is not page-locked");
  if (!on_device(from, size)) return misuse("a copy from memory that is not the device's");
  stream_of(stream)->give([=] { copy(to, reinterpret_cast<void*>(from), size); });
  return 0;
}

Status cuMemcpyHtoDAsync_v2(Pointer to, const void* from, std::size_t size, void* stream) {
  if (const Status status = enter("cuMemcpyHtoDAsync")) return status;
  if (!on_device(to, size)) return misuse("a copy to memory that is not the device's");
  stream_of(stream)->give([=] { copy(reinterpret_cast<void*>(to), from, size); });
  return 0;
}

Status cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, std::size_t size, void* stream) {
  if (const Status status = enter("cuMemcpyDtoDAsync")) return status;
  if (!on_device(to, size) || !on_device(from, size)) return misuse("a copy of memory that is not the device's");
  stream_of(stream)->give([=] { copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size); });
  return 0;
}

Status cuMemsetD8Async(Pointer at, unsigned char byte, std::size_t size, void* stream) {
  if (const Status status = enter("cuMemsetD8Async")) return status;
  if (!on_device(at, size)) return misuse("memory that is not the device's is filled");
  stream_of(stream)->give([=] { std::memset(reinterpret_cast<void*>(at), byte, size); });
  return 0;
}

struct Attributes {
  int order, hints[4];
  unsigned flags;
};

static Status batch(Pointer* to, Pointer* from, std::size_t* sizes, std::size_t count, const Attributes* attributes,
                    const std::size_t* first, std::size_t kinds, void* stream) {
  if (const Status status = enter("cuMemcpyBatchAsync")) return status;
  if (stream == nullptr) return misuse("a batch on the default stream");
  if (kinds != 1 || first[0] != 0 || attributes->order != 1) return misuse("a batch whose attributes are wrong");
  std::vector<std::function<void()>> copies;
  for (std::size_t i = 0; i < count; ++i) {
    if (!is_pinned(reinterpret_cast<void*>(to[i]), sizes[i])) return misuse("a batch to memory that is not page-locked");
    if (!on_device(from[i], sizes[i])) return misuse("a batch from memory that is not the device's");
    copies.push_back([to = to[i], from = from[i], size = sizes[i]] {
      copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    });
  }
  // Nothing is promised about the order within a batch.
  std::reverse(copies.begin(), copies.end());
  for (auto& action : copies) static_cast<Stream*>(stream)->give(std::move(action));
  return 0;
}

Status cuMemcpyBatchAsync(Pointer* to, Pointer* from, std::size_t* sizes, std::size_t count, Attributes* attributes,
                          std::size_t* first, std::size_t kinds, std::size_t* failed, void* stream) {
  *failed = 0;
  return batch(to, from, sizes, count, attributes, first, kinds, stream);
}

Status cuMemcpyBatchAsync_v2(Pointer* to, Pointer* from, std::size_t* sizes, std::size_t count, Attributes* attributes,
                             std::size_t* first, std::size_t kinds, void* stream) {
  return batch(to, from, sizes, count, attributes, first, kinds, stream);
}

Status cuModuleLoadData(void** module, const void*) {
  if (const Status status = enter("cuModuleLoadData")) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  ++w.modules;
  *module = &w;
  return 0;
}

Status cuModuleUnload(void*) {
  if (const Status status = enter("cuModuleUnload")) return status;
  World& w = world();
  std::lock_guard guard(w.mutex);
  --w.modules;
  return 0;
}

static char pack_name, fingerprint_name;

Status cuModuleGetFunction(void** function, void*, const char* name) {
  if (const Status status = enter("cuModuleGetFunction")) return status;
  *function = std::string(name) == "rt_pack" ? &pack_name : std::string(name) == "rt_fingerprint" ? &fingerprint_name
                                                                                                  : nullptr;
  return *function != nullptr ? 0 : kNotFound;
}

Status cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                      void* stream, void** arguments, void**) {
  if (const Status status = enter("cuLaunchKernel")) return status;
  if (blocks == 0) return misuse("a launch of nothing");
  std::function<void()> kernel;
  const auto tiles = *static_cast<Pointer*>(arguments[0]);
  if (function == &pack_name) {
    kernel = [tiles] { device_code::rt_pack(reinterpret_cast<device_code::PackTile*>(tiles)); };
  } else {
    const auto sums = *static_cast<Pointer*>(arguments[1]);
    kernel = [tiles, sums] {
      device_code::rt_fingerprint(reinterpret_cast<device_code::FingerprintTile*>(tiles),
                                  reinterpret_cast<unsigned long long*>(sums));
    };
  }
  stream_of(stream)->give([kernel, blocks, threads] {
    device_code::blockDim.x = threads;
    for (unsigned block = 0; block < blocks; ++block)
      for (unsigned thread = 0; thread < threads; ++thread) {
        device_code::blockIdx.x = block;
        device_code::threadIdx.x = thread;
        kernel();
      }
  });
  return 0;
}

Status cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long long, int* answer) {
  static const std::map<std::string, std::pair<int, void*>> functions = {
#define RT_FAKE(name, exported, version) {name, {version, reinterpret_cast<void*>(exported)}}
      RT_FAKE("cuGetErrorName", cuGetErrorName, 6000),
      RT_FAKE("cuGetErrorString", cuGetErrorString, 6000),
      RT_FAKE("cuInit", cuInit, 2000),
      RT_FAKE("cuDeviceGet", cuDeviceGet, 2000),
      RT_FAKE("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, 7000),
      RT_FAKE("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2, 11000),
      RT_FAKE("cuCtxPushCurrent", cuCtxPushCurrent_v2, 4000),
      RT_FAKE("cuCtxPopCurrent", cuCtxPopCurrent_v2, 4000),
      RT_FAKE("cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode, 10010),
      RT_FAKE("cuMemHostRegister", cuMemHostRegister_v2, 6050),
      RT_FAKE("cuMemHostUnregister", cuMemHostUnregister, 4000),
      RT_FAKE("cuMemHostAlloc", cuMemHostAlloc, 2020),
      RT_FAKE("cuMemFreeHost", cuMemFreeHost, 2000),
      RT_FAKE("cuMemAlloc", cuMemAlloc_v2, 3020),
      RT_FAKE("cuMemFree", cuMemFree_v2, 3020),
      RT_FAKE("cuStreamCreate", cuStreamCreate, 2000),
      RT_FAKE("cuStreamDestroy", cuStreamDestroy_v2, 4000),
      RT_FAKE("cuStreamSynchronize", cuStreamSynchronize, 2000),
      RT_FAKE("cuStreamWaitEvent", cuStreamWaitEvent, 3020),
      RT_FAKE("cuEventCreate", cuEventCreate, 2000),
      RT_FAKE("cuEventDestroy", cuEventDestroy_v2, 4000),
      RT_FAKE("cuEventRecord", cuEventRecord, 2000),
      RT_FAKE("cuEventSynchronize", cuEventSynchronize, 2000),
      RT_FAKE("cuMemcpyDtoHAsync", cuMemcpyDtoHAsync_v2, 3020),
      RT_FAKE("cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2, 3020),
      RT_FAKE("cuMemcpyDtoDAsync", cuMemcpyDtoDAsync_v2, 3020),
      RT_FAKE("cuMemsetD8Async", cuMemsetD8Async, 3020),
      RT_FAKE("cuModuleLoadData", cuModuleLoadData, 2000),
      RT_FAKE("cuModuleUnload", cuModuleUnload, 2000),
      RT_FAKE("cuModuleGetFunction", cuModuleGetFunction, 2000),
      RT_FAKE("cuLaunchKernel", cuLaunchKernel, 4000),
#undef RT_FAKE
  };
  World& w = world();
  *answer = 1;
  if (!w.addresses) return kNotFound;
  if (std::string(name) == "cuMemcpyBatchAsync") {
    if (version > w.version || version < 12080) return kNotFound;
    *found = version >= 13000 ? reinterpret_cast<void*>(cuMemcpyBatchAsync_v2) : reinterpret_cast<void*>(cuMemcpyBatchAsync);
    *answer = 0;
    return 0;
  }
  const auto entry = functions.find(name);
  if (entry == functions.end() || version < entry->second.first) return kNotFound;
  *found = entry->second.second;
  *answer = 0;
  return 0;
}

}  // extern "C"
