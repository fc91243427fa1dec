// Memory of the host to a CUDA device, for restores: through page-locked chunks, or from where it is page-locked itself.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "device.hpp"

namespace resilient_train::cuda {

// Copies to a device that are under way. The caller keeps sources and targets alive until wait() has returned or thrown.
class Upload {
 public:
  // Begins `copies` behind the work that `compute` has been given so far, which may still be using the targets.
  // Throws Error; nothing is under way then.
  Upload(std::shared_ptr<Device> device, const std::vector<Copy>& copies, StreamHandle compute, unsigned threads);
  // Waits.
  ~Upload();
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  // Blocks until everything is on the device. Throws the Error that ended it early.
  void wait();

 private:
  // Copies that fill one chunk, or one whose source is page-locked.
  struct Load {
    std::vector<Copy> copies;
    bool direct;
  };

  void run(unsigned char* chunks);
  void carry(const Load& load, unsigned char* chunk);

  const std::shared_ptr<Device> device_;
  const Stream stream_;
  const Event begun_;
  std::vector<Load> loads_;
  std::unique_ptr<PinnedMemory> memory_;
  std::atomic<std::size_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace resilient_train::cuda
