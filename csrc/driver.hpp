// The CUDA driver, found when the program runs: nothing of CUDA is needed to build or to link the engine.
#pragma once

#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace resilient_train::cuda {

// CUresult, CUdeviceptr and the handles of cuda.h.
using Status = int;
using Pointer = unsigned long long;
using ContextHandle = struct CUctx_st*;
using StreamHandle = struct CUstream_st*;
using EventHandle = struct CUevent_st*;
using ModuleHandle = struct CUmod_st*;
using FunctionHandle = struct CUfunc_st*;

// CUmemcpyAttributes: how the copies of a batch treat their sources.
struct CopyAttributes {
  int source_order;
  int source_hint[2], target_hint[2];
  unsigned flags;
};
inline constexpr int kStreamOrder = 1;        // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
inline constexpr unsigned kBesideCompute = 1;  // CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE

// A call of the driver that failed; the text names the call and the error.
class Error : public std::runtime_error {
 public:
  Error(const std::string& text, Status status) : std::runtime_error(text), status(status) {}
  const Status status;
};

class Driver;

// One function of the driver. Throws Error when it reports one.
template <typename... Args>
class Call {
 public:
  // `version`: the CUDA version in which the function got the parameters used here (12080 is 12.8); `exported`: the
  // library's symbol with those parameters.
  Call(const Driver& driver, const char* name, int version, const char* exported, bool optional = false);
  void operator()(Args... args) const;
  // For destructors: whatever it reports, there is nobody to tell.
  Status quietly(Args... args) const noexcept { return function_(args...); }
  explicit operator bool() const { return function_ != nullptr; }

 private:
  const Driver& driver_;
  const char* name_;
  Status (*function_)(Args...);
};

// libcuda and the functions of it that the engine uses. Thread-safe; the library is never unloaded.
class Driver {
 public:
  // `path`: a library to load in place of the system's driver. Throws Error if there is no driver or no device.
  explicit Driver(const std::string& path);
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Address of a function, null if the driver has none.
  void* find(const char* name, int version, const char* exported) const;
  // Throws the Error that call `name` reported.
  [[noreturn]] void fail(const char* name, Status status) const;
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
  void* const library_;
  Status (*find_)(const char*, void**, int, unsigned long long, int*);
  const int version_;

 public:
  const Call<Status, const char**> error_name{*this, "cuGetErrorName", 6000, "cuGetErrorName"};
  const Call<Status, const char**> error_text{*this, "cuGetErrorString", 6000, "cuGetErrorString"};
  const Call<unsigned> init{*this, "cuInit", 2000, "cuInit"};
  const Call<int*, int> get_device{*this, "cuDeviceGet", 2000, "cuDeviceGet"};
  const Call<ContextHandle*, int> retain_primary{*this, "cuDevicePrimaryCtxRetain", 7000, "cuDevicePrimaryCtxRetain"};
  const Call<int> release_primary{*this, "cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2"};
  const Call<ContextHandle> push{*this, "cuCtxPushCurrent", 4000, "cuCtxPushCurrent_v2"};
  const Call<ContextHandle*> pop{*this, "cuCtxPopCurrent", 4000, "cuCtxPopCurrent_v2"};
  const Call<int*> exchange_capture_mode{*this, "cuThreadExchangeStreamCaptureMode", 10010,
                                         "cuThreadExchangeStreamCaptureMode"};
  const Call<void*, std::size_t, unsigned> host_register{*this, "cuMemHostRegister", 6050, "cuMemHostRegister_v2"};
  const Call<void*> host_unregister{*this, "cuMemHostUnregister", 4000, "cuMemHostUnregister"};
  const Call<void**, std::size_t, unsigned> host_alloc{*this, "cuMemHostAlloc", 2020, "cuMemHostAlloc"};
  const Call<void*> host_free{*this, "cuMemFreeHost", 2000, "cuMemFreeHost"};
  const Call<Pointer*, std::size_t> device_alloc{*this, "cuMemAlloc", 3020, "cuMemAlloc_v2"};
  const Call<Pointer> device_free{*this, "cuMemFree", 3020, "cuMemFree_v2"};
  const Call<StreamHandle*, unsigned> stream_create{*this, "cuStreamCreate", 2000, "cuStreamCreate"};
  const Call<StreamHandle> stream_destroy{*this, "cuStreamDestroy", 4000, "cuStreamDestroy_v2"};
  const Call<StreamHandle> stream_wait{*this, "cuStreamSynchronize", 2000, "cuStreamSynchronize"};
  const Call<StreamHandle, EventHandle, unsigned> stream_wait_event{*this, "cuStreamWaitEvent", 3020,
                                                                    "cuStreamWaitEvent"};
  const Call<EventHandle*, unsigned> event_create{*this, "cuEventCreate", 2000, "cuEventCreate"};
  const Call<EventHandle> event_destroy{*this, "cuEventDestroy", 4000, "cuEventDestroy_v2"};
  const Call<EventHandle, StreamHandle> event_record{*this, "cuEventRecord", 2000, "cuEventRecord"};
  const Call<EventHandle> event_wait{*this, "cuEventSynchronize", 2000, "cuEventSynchronize"};
  const Call<void*, Pointer, std::size_t, StreamHandle> to_host{*this, "cuMemcpyDtoHAsync", 3020,
                                                                "cuMemcpyDtoHAsync_v2"};
  const Call<Pointer, const void*, std::size_t, StreamHandle> to_device{*this, "cuMemcpyHtoDAsync", 3020,
                                                                        "cuMemcpyHtoDAsync_v2"};
  const Call<Pointer, Pointer, std::size_t, StreamHandle> on_device{*this, "cuMemcpyDtoDAsync", 3020,
                                                                    "cuMemcpyDtoDAsync_v2"};
  const Call<Pointer, unsigned char, std::size_t, StreamHandle> fill{*this, "cuMemsetD8Async", 3020,
                                                                     "cuMemsetD8Async"};
  // From 12.8 on; with 13.0 it lost the parameter that says which copy was at fault. One of the two, or neither.
  const Call<Pointer*, Pointer*, std::size_t*, std::size_t, CopyAttributes*, std::size_t*, std::size_t, StreamHandle>
      batch{*this, "cuMemcpyBatchAsync", 13000, "cuMemcpyBatchAsync_v2", true};
  const Call<Pointer*, Pointer*, std::size_t*, std::size_t, CopyAttributes*, std::size_t*, std::size_t, std::size_t*,
             StreamHandle>
      batch_12{*this, "cuMemcpyBatchAsync", 12080, "cuMemcpyBatchAsync", true};
  // The driver has it, and does not take it.
  mutable std::atomic<bool> batch_refused{false};
  const Call<ModuleHandle*, const void*> module_load{*this, "cuModuleLoadData", 2000, "cuModuleLoadData"};
  const Call<ModuleHandle> module_unload{*this, "cuModuleUnload", 2000, "cuModuleUnload"};
  const Call<FunctionHandle*, ModuleHandle, const char*> module_function{*this, "cuModuleGetFunction", 2000,
                                                                         "cuModuleGetFunction"};
  const Call<FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, StreamHandle, void**,
             void**>
      launch{*this, "cuLaunchKernel", 4000, "cuLaunchKernel"};
};

template <typename... Args>
Call<Args...>::Call(const Driver& driver, const char* name, int version, const char* exported, bool optional)
    : driver_(driver),
      name_(name),
      function_(reinterpret_cast<Status (*)(Args...)>(driver.find(name, version, exported))) {
  if (function_ == nullptr && !optional) throw Error(driver.path() + " has no " + name, 0);
}

template <typename... Args>
void Call<Args...>::operator()(Args... args) const {
  if (const Status status = function_(args...)) driver_.fail(name_, status);
}

}  // namespace resilient_train::cuda
