// Copies the pieces of a shard image in the background, block checksums fused in.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "download.hpp"
#include "piece.hpp"

namespace resilient_train {

// One image's copy plan, used again and again. All methods may be called from any thread; start() and changed() not
// while a copy is running. The caller keeps sources and image alive until wait() has returned or thrown: nothing here
// owns a tensor, and torch's allocator would give freed memory to others while it is still being read.
class Copier {
 public:
  // `pieces` follow each other without holes from `data_start` to `table_start`, where the checksums of the blocks
  // between the two are written as little-endian 32-bit words. Throws std::invalid_argument if they do not.
  // `device`: where remote pieces stand; null if there are none. Throws cuda::Error if it refuses what that takes.
  Copier(std::vector<Piece> pieces, std::size_t data_start, std::size_t table_start, unsigned threads,
         std::shared_ptr<cuda::Device> device = nullptr);
  // Waits.
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Begins to fill the image at `image`: pieces marked `now` (all of them, if `all_now`) are copied before it returns,
  // remote ones before later work of `compute`, the stream that has written them.
  // Throws std::logic_error if a copy is running, std::system_error if no thread can be started, cuda::Error.
  void start(unsigned char* image, bool all_now, cuda::StreamHandle compute = nullptr);
  // Whether a copy is running.
  bool running() const;
  // Blocks until no copy is running. Throws the cuda::Error that ended the copy early; the image is not complete then.
  void wait();
  // Afterwards remote pieces may be changed by work that `compute` is given from now on, and the others by anybody. The
  // host does not wait for remote ones. Sources of an `all_now` copy are looked at once more. May be called again, for
  // other streams. Throws cuda::Error.
  void fence(cuda::StreamHandle compute);
  // Indices of the pieces, those marked `now` left out, whose bytes differ from those in the image that was filled last:
  // as they were at the first fence() of an `all_now` copy; without fence(), as they are, remote ones left out.
  std::vector<std::size_t> changed();

 private:
  void run(bool first);
  void join() noexcept;
  std::vector<std::size_t> differing() const;
  void copy_block(std::size_t block);
  std::size_t blocks() const { return (table_start_ - data_start_ + kBlock - 1) / kBlock; }

  const std::vector<Piece> pieces_;
  const std::size_t data_start_, table_start_;
  const unsigned wanted_;
  std::unique_ptr<cuda::Download> download_;  // null without remote pieces
  bool lazy_here_ = false;                    // some piece of the host is copied in the background
  std::vector<std::size_t> first_;  // block -> its first piece
  unsigned char* image_ = nullptr;
  bool placed_ = false;  // all sources were copied by start()
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  unsigned busy_ = 0;
  std::exception_ptr error_;
  bool fenced_ = false;
  std::vector<std::size_t> differed_;
};

}  // namespace resilient_train
