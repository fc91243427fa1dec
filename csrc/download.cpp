#include "download.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace resilient_train::cuda {
namespace {

constexpr std::size_t kNone = static_cast<std::size_t>(-1);
constexpr std::size_t kAlignment = 16;
constexpr std::size_t kMostGroups = 256;

}  // namespace

Download::Download(std::shared_ptr<Device> device, const std::vector<Piece>& pieces, std::size_t data_start,
                   std::size_t table_start)
    : device_(std::move(device)),
      pieces_(pieces),
      data_start_(data_start),
      table_start_(table_start),
      blocks_((table_start - data_start + kBlock - 1) / kBlock),
      stream_(device_->context()),
      begun_(device_->context()),
      packed_at_(pieces.size(), kNone),
      landed_(device_->context()),
      urgent_(device_->context()),
      end_(device_->context()) {
  std::vector<Range> ranges;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (!piece.remote || piece.now || piece.size == 0) continue;
    lazy_.push_back(i);
    ranges.push_back({piece.source, piece.size});
  }
  plan_pack();
  if (device_->kernels() != nullptr) prints_ = std::make_unique<Fingerprints>(device_, ranges);
}

Download::~Download() { drain(); }

void Download::plan_pack() {
  std::size_t large = 0;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (!piece.remote || piece.size == 0) continue;
    if (piece.size >= kSmall) {
      if (!piece.now || large + piece.size > kPackedAtMost) continue;
      large += piece.size;
    }
    packed_at_[i] = packed_;
    packed_ += (piece.size + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (packed_ == 0) return;
  staging_ = std::make_unique<DeviceMemory>(device_->context(), packed_);
  landing_ = std::make_unique<PinnedMemory>(device_->context(), packed_);
  const bool kernel = device_->kernels() != nullptr;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    if (packed_at_[i] == kNone) continue;
    const Piece& piece = pieces_[i];
    const std::size_t tile = kernel ? kPackTile : piece.size;
    for (std::size_t at = 0; at < piece.size; at += tile)
      tiles_.push_back({piece.source + at, staging_->address() + packed_at_[i] + at, std::min(tile, piece.size - at)});
  }
  if (kernel) table_ = std::make_unique<Table<PackTile>>(device_->context(), tiles_);
}

void Download::pack(StreamHandle compute) {
  if (table_ != nullptr) {
    device_->kernels()->pack(table_->address(), table_->size(), compute);
    return;
  }
  for (const PackTile& tile : tiles_) device_->driver().on_device(tile.target, tile.source, tile.size, compute);
}

void Download::plan_groups(bool direct) {
  if (planned_ && direct == direct_) return;
  planned_ = false;
  direct_ = direct;
  group_blocks_ = direct ? std::max(kGroupBlocks, (blocks_ + kMostGroups - 1) / kMostGroups) : kChunkBlocks;
  groups_.assign((blocks_ + group_blocks_ - 1) / group_blocks_, {});
  urgent_parts_.clear();
  const std::size_t length = group_blocks_ * kBlock;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (!piece.remote || piece.size == 0 || packed_at_[i] != kNone) continue;
    if (piece.now) urgent_parts_.push_back({piece.source, piece.at, piece.size});
    if (piece.now && direct) continue;
    for (std::size_t at = piece.at, end = piece.at + piece.size; at < end;) {
      const std::size_t group = (at - data_start_) / length;
      const std::size_t n = std::min(end, data_start_ + (group + 1) * length) - at;
      groups_[group].push_back({piece.source + (at - piece.at), at, n});
      at += n;
    }
  }
  while (marks_.size() < groups_.size()) marks_.emplace_back(device_->context());
  while (unread_.size() < groups_.size()) unread_.emplace_back(0);
  planned_ = true;
}

void Download::begin(unsigned char* image, StreamHandle compute, bool audit) {
  plan_groups(device_->locked(image + data_start_, table_start_ - data_start_));
  const bool empty = std::all_of(groups_.begin(), groups_.end(), [](const auto& parts) { return parts.empty(); });
  if (!direct_ && !empty && ring_ == nullptr)
    ring_ = std::make_unique<PinnedMemory>(device_->context(), kChunks * kChunkBlocks * kBlock);
  image_ = image;
  audited_ = audit;
  looked_ = false;
  {
    const std::lock_guard guard(mutex_);
    for (Mark& mark : marks_) reset(mark);
    for (Mark* mark : {&landed_, &urgent_, &end_}) reset(*mark);
    enqueued_ = 0;
    abandoned_ = false;
  }
  for (std::size_t group = 0; group < groups_.size(); ++group)
    unread_[group] = std::min(group_blocks_, blocks_ - group * group_blocks_);
  const Current current(*device_->context());
  try {
    if (packed_ > 0) pack(compute);
    if (audit && prints_ != nullptr) prints_->take(0, compute);
    begun_.record(compute);
    begun_.hold_back(stream_);
  } catch (...) {
    // What was handed over writes to memory that goes with this object, and our stream knows nothing of it.
    device_->driver().stream_wait.quietly(compute);
    throw;
  }
}

void Download::enqueue() {
  const Current current(*device_->context());
  const Driver& driver = device_->driver();
  if (packed_ > 0) driver.to_host(landing_->data(), staging_->address(), packed_, stream_);
  set(landed_);
  if (direct_) {
    std::vector<Copy> copies;
    for (const Part& part : urgent_parts_)
      copies.push_back({reinterpret_cast<Pointer>(image_ + part.at), part.source, part.size});
    copy_to_host(driver, copies, stream_);
    set(urgent_);
  }
  const std::size_t first = direct_ ? groups_.size() : std::min(kChunks, groups_.size());
  for (std::size_t group = 0; group < first; ++group) enqueue_group(group);
}

void Download::enqueue_group(std::size_t group) {
  const std::size_t begin = data_start_ + group * group_blocks_ * kBlock;
  std::vector<Copy> copies;
  for (const Part& part : groups_[group]) {
    unsigned char* target = direct_ ? image_ + part.at
                                    : ring_->data() + group % kChunks * kChunkBlocks * kBlock + (part.at - begin);
    copies.push_back({reinterpret_cast<Pointer>(target), part.source, part.size});
  }
  {
    const std::lock_guard guard(mutex_);
    if (abandoned_) return;
  }
  copy_to_host(device_->driver(), copies, stream_);
  set(marks_[group]);
  bool last;
  {
    const std::lock_guard guard(mutex_);
    last = ++enqueued_ == groups_.size();
  }
  if (last) set(end_);
}

void Download::set(Mark& mark) {
  mark.event.record(stream_);
  const std::lock_guard guard(mutex_);
  mark.enqueued = true;
  changed_.notify_all();
}

void Download::reset(Mark& mark) {
  mark.enqueued = false;
  mark.arrived = false;
}

void Download::await_enqueued(const Mark& mark) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return mark.enqueued || abandoned_; });
  if (!mark.enqueued) throw Error("the copy from the device was given up", 0);
}

void Download::await(Mark& mark) {
  if (mark.arrived.load(std::memory_order_acquire)) return;
  await_enqueued(mark);
  const Current current(*device_->context());
  mark.event.wait();
  mark.arrived.store(true, std::memory_order_release);
}

void Download::hold_back(StreamHandle stream, bool all) {
  if (!all && urgent_parts_.empty()) return;
  const Mark& mark = all || !direct_ ? end_ : urgent_;
  await_enqueued(mark);
  const Current current(*device_->context());
  mark.event.hold_back(stream);
}

const unsigned char* Download::arrived(std::size_t piece, std::size_t block, std::size_t at) {
  if (packed_at_[piece] != kNone) {
    await(landed_);
    return landing_->data() + packed_at_[piece] + (at - pieces_[piece].at);
  }
  const std::size_t group = block / group_blocks_;
  await(marks_[group]);
  if (direct_) return image_ + at;
  return ring_->data() + group % kChunks * kChunkBlocks * kBlock + (at - data_start_ - group * group_blocks_ * kBlock);
}

void Download::consumed(std::size_t block) {
  const std::size_t group = block / group_blocks_;
  if (direct_ || unread_[group].fetch_sub(1) != 1 || group + kChunks >= groups_.size()) return;
  // A group without pieces of ours is through before its turn, while the one before it in the chunk is still read.
  await(marks_[group]);
  const Current current(*device_->context());
  enqueue_group(group + kChunks);
}

void Download::abandon() noexcept {
  const std::lock_guard guard(mutex_);
  abandoned_ = true;
  changed_.notify_all();
}

void Download::drain() noexcept {
  device_->context()->quietly([this](const Driver& driver) { driver.stream_wait.quietly(stream_); });
}

void Download::look_again(StreamHandle stream) {
  if (!audited_ || looked_) return;
  if (prints_ != nullptr)
    prints_->take(1, stream);
  else
    differed_ = differing(stream);
  looked_ = true;
}

std::vector<std::size_t> Download::changed() {
  if (!looked_) return {};
  if (prints_ == nullptr) return differed_;
  std::vector<std::size_t> found;
  const auto before = prints_->values(0), after = prints_->values(1);
  for (std::size_t i = 0; i < lazy_.size(); ++i)
    if (before[i] != after[i]) found.push_back(lazy_[i]);
  return found;
}

std::vector<std::size_t> Download::differing(StreamHandle stream) {
  constexpr std::size_t kChunk = 4 << 20;
  const PinnedMemory copy(device_->context(), kChunk);
  const Current current(*device_->context());
  const auto same = [&](const Piece& piece, std::size_t at) {
    const std::size_t n = std::min<std::size_t>(kChunk, piece.size - at);
    device_->driver().to_host(copy.data(), piece.source + at, n, stream);
    device_->driver().stream_wait(stream);
    return std::memcmp(image_ + piece.at + at, copy.data(), n) == 0;
  };
  std::vector<std::size_t> found;
  try {
    for (const std::size_t i : lazy_) {
      std::size_t at = 0;
      while (at < pieces_[i].size && same(pieces_[i], at)) at += kChunk;
      if (at < pieces_[i].size) found.push_back(i);
    }
  } catch (...) {
    device_->driver().stream_wait.quietly(stream);
    throw;
  }
  return found;
}

}  // namespace resilient_train::cuda
