// Copies the pieces of a shard image in the background, block checksums fused in.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace resilient_train {

// Bytes covered by one checksum of an image.
inline constexpr std::size_t kBlock = 1 << 20;

// `size` bytes that belong at byte `at` of the image.
struct Piece {
  std::uint64_t at;
  std::uint64_t source;  // address; 0 if the bytes stand in the image already
  std::uint64_t size;
  bool now;  // copied before start() returns
};

// One image's copy plan, used again and again. All methods may be called from any thread; start() and changed() not
// while a copy is running. The caller keeps sources and image alive until wait() has returned.
class Copier {
 public:
  // `pieces` follow each other without holes from `data_start` to `table_start`, where the checksums of the blocks
  // between the two are written as little-endian 32-bit words. Throws std::invalid_argument if they do not.
  Copier(std::vector<Piece> pieces, std::size_t data_start, std::size_t table_start, unsigned threads);
  // Waits.
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Begins to fill the image at `image`: pieces marked `now` (all of them, if `all_now`) are copied before it returns.
  // Throws std::logic_error if a copy is running, std::system_error if no thread can be started.
  void start(unsigned char* image, bool all_now);
  // Whether a copy is running.
  bool running() const;
  // Blocks until no copy is running.
  void wait();
  // Indices of the pieces, those marked `now` left out, whose bytes differ from those in the image that was filled last.
  std::vector<std::size_t> changed() const;

 private:
  void run();
  void copy_block(std::size_t block);
  std::size_t blocks() const { return (table_start_ - data_start_ + kBlock - 1) / kBlock; }

  const std::vector<Piece> pieces_;
  const std::size_t data_start_, table_start_;
  const unsigned wanted_;
  std::vector<std::size_t> first_;  // block -> its first piece
  unsigned char* image_ = nullptr;
  bool placed_ = false;  // all sources were copied by start()
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  unsigned busy_ = 0;
};

}  // namespace resilient_train
