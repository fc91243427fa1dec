// The pieces of an image that stand on a CUDA device: copied by its own stream while it goes on computing.
//
// The computing stream packs small pieces, and those that are wanted as they are now, into one buffer on the device.
// Behind that our stream copies: the buffer to the host at once, then the large pieces in the order of the image, in
// groups of some 16 MiB that threads of the host can follow. Where the image's memory is page-locked the pieces land in
// it; where it is not, in a small ring of page-locked chunks, from which those threads bring them to the image.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "device.hpp"
#include "fingerprints.hpp"
#include "piece.hpp"

namespace resilient_train::cuda {

inline constexpr std::size_t kSmall = 64 << 10;       // bytes up to which a piece is packed
inline constexpr std::size_t kPackedAtMost = 64 << 20;  // bytes of larger pieces that are packed
inline constexpr std::size_t kGroupBlocks = 16;        // of one event
inline constexpr std::size_t kChunkBlocks = 4;         // of one chunk of the ring
inline constexpr std::size_t kChunks = 4;

// One image's pieces on one device, copied again and again. begin() comes first, by one thread, and ends the copy
// before; then one thread calls enqueue(), and any threads arrived() and consumed(). All may throw Error.
class Download {
 public:
  // `pieces` outlive it; those that are not remote are left out.
  Download(std::shared_ptr<Device> device, const std::vector<Piece>& pieces, std::size_t data_start,
           std::size_t table_start);
  ~Download();
  Download(const Download&) = delete;
  Download& operator=(const Download&) = delete;

  // Marks the instant: what `compute` does from here on is not in the image, as far as it comes behind a hold_back().
  // `audit`: fingerprints are taken.
  void begin(unsigned char* image, StreamHandle compute, bool audit);
  // Hands all copies to the device (of a ring, the first).
  void enqueue();
  // Later work of `stream` waits until the sources have been read: all of them, or only what is wanted as it is now.
  // The host waits for no copy, except where it goes through the ring.
  void hold_back(StreamHandle stream, bool all);
  // Waits until the bytes of piece number `piece` that belong into block `block` are on the host; where the one for byte
  // `at` of the image stands.
  const unsigned char* arrived(std::size_t piece, std::size_t block, std::size_t at);
  // The block has been read.
  void consumed(std::size_t block);
  // Nothing is handed to the device any more, and who waits gets an Error.
  void abandon() noexcept;
  // Waits until the device has left image and ring alone. Whatever it reports, it is done with them.
  void drain() noexcept;

  // Whether audits take fingerprints; else they compare with the image, which is complete then.
  bool takes_fingerprints() const { return prints_ != nullptr; }
  // After an audited copy: has the sources looked at again, when `stream` gets there.
  void look_again(StreamHandle stream);
  // Which pieces, those wanted at once left out, differed then; waits for it.
  std::vector<std::size_t> changed();

 private:
  // A point in our stream that is not there before it was handed to the device.
  struct Mark {
    explicit Mark(const Shared& context) : event(context) {}
    const Event event;
    bool enqueued = false;
    std::atomic<bool> arrived{false};
  };
  // `size` bytes at `source` that belong at byte `at`.
  struct Part {
    Pointer source;
    std::size_t at, size;
  };

  void plan_pack();
  void pack(StreamHandle compute);
  void plan_groups(bool direct);
  void enqueue_group(std::size_t group);
  void set(Mark& mark);
  void reset(Mark& mark);
  void await_enqueued(const Mark& mark);
  void await(Mark& mark);
  std::vector<std::size_t> differing(StreamHandle stream);

  const std::shared_ptr<Device> device_;
  const std::vector<Piece>& pieces_;
  const std::size_t data_start_, table_start_, blocks_;
  const Stream stream_;
  const Event begun_;
  std::vector<std::size_t> lazy_;         // pieces that may not change behind begin()
  std::vector<std::size_t> packed_at_;    // piece -> place in the packed buffer
  std::vector<PackTile> tiles_;           // whole pieces, without kernels
  std::unique_ptr<Table<PackTile>> table_;
  std::size_t packed_ = 0;                // bytes
  std::unique_ptr<DeviceMemory> staging_;
  std::unique_ptr<PinnedMemory> landing_, ring_;
  std::unique_ptr<Fingerprints> prints_;
  bool audited_ = false, looked_ = false;
  std::vector<std::size_t> differed_;

  unsigned char* image_ = nullptr;
  bool direct_ = true, planned_ = false;
  std::size_t group_blocks_ = kGroupBlocks;
  std::vector<std::vector<Part>> groups_;
  std::vector<Part> urgent_parts_;
  std::deque<Mark> marks_;  // of the groups
  Mark landed_, urgent_, end_;
  std::deque<std::atomic<std::size_t>> unread_;  // blocks of each group

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t enqueued_ = 0;
  bool abandoned_ = false;
};

}  // namespace resilient_train::cuda
