#include "copier.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "crc32c.hpp"
#include "signals.hpp"

namespace resilient_train {
namespace {

const unsigned char* bytes(std::uint64_t address) { return reinterpret_cast<const unsigned char*>(address); }

}  // namespace

Copier::Copier(std::vector<Piece> pieces, std::size_t data_start, std::size_t table_start, unsigned threads,
               std::shared_ptr<cuda::Device> device)
    : pieces_(std::move(pieces)), data_start_(data_start), table_start_(table_start), wanted_(std::max(1u, threads)) {
  std::size_t at = data_start_;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (piece.at != at || piece.size > table_start_ - at)
      throw std::invalid_argument("piece " + std::to_string(i) + " does not follow the one before it");
    if (piece.size == 0) continue;
    if (piece.remote && device == nullptr)
      throw std::invalid_argument("piece " + std::to_string(i) + " is remote, and there is no device");
    lazy_here_ |= piece.source != 0 && !piece.remote && !piece.now;
    while (data_start_ + first_.size() * kBlock < at + piece.size) first_.push_back(i);
    at += piece.size;
  }
  if (at != table_start_) throw std::invalid_argument("the pieces end before the checksums begin");
  if (device != nullptr)
    download_ = std::make_unique<cuda::Download>(std::move(device), pieces_, data_start_, table_start_);
}

Copier::~Copier() { join(); }

void Copier::join() noexcept {
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void Copier::start(unsigned char* image, bool all_now, cuda::StreamHandle compute) {
  {
    std::lock_guard lock(mutex_);
    if (busy_ > 0) throw std::logic_error("a copy is running already");
  }
  join();
  image_ = image;
  placed_ = all_now;
  fenced_ = false;
  error_ = nullptr;
  // First of all: it marks the instant.
  if (download_ != nullptr) download_->begin(image, compute, all_now);
  for (const Piece& piece : pieces_)
    if (!piece.remote && piece.source != 0 && (all_now || piece.now))
      std::memcpy(image + piece.at, bytes(piece.source), piece.size);
  next_ = 0;
  const SignalsBlocked blocked;
  const auto count = static_cast<unsigned>(std::min<std::size_t>(wanted_, blocks()));
  for (unsigned i = 0; i < count; ++i) {
    {
      std::lock_guard lock(mutex_);
      ++busy_;
    }
    try {
      threads_.emplace_back([this, i] { run(i == 0); });
    } catch (...) {
      {
        std::lock_guard lock(mutex_);
        --busy_;
      }
      if (i == 0) throw;
      break;  // The others do its share.
    }
  }
  if (download_ == nullptr) return;
  try {
    download_->hold_back(compute, all_now);
  } catch (...) {
    wait();
    throw;
  }
}

bool Copier::running() const {
  std::lock_guard lock(mutex_);
  return busy_ > 0;
}

void Copier::wait() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return busy_ == 0; });
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Copier::fence(cuda::StreamHandle compute) {
  // Without kernels an audit compares with the image, which has to be complete for that.
  const bool compares = download_ != nullptr && placed_ && !fenced_ && !download_->takes_fingerprints();
  if (download_ == nullptr || lazy_here_ || compares) wait();
  if (download_ != nullptr) {
    try {
      download_->hold_back(compute, true);
    } catch (...) {
      wait();  // It knows better what happened.
      throw;
    }
  }
  if (fenced_ || !placed_) return;
  if (download_ != nullptr) download_->look_again(compute);
  differed_ = differing();
  fenced_ = true;
}

std::vector<std::size_t> Copier::changed() {
  std::vector<std::size_t> found = fenced_ ? differed_ : differing();
  if (fenced_ && download_ != nullptr)
    for (const std::size_t piece : download_->changed()) found.push_back(piece);
  return found;
}

std::vector<std::size_t> Copier::differing() const {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (piece.source != 0 && !piece.remote && !piece.now && piece.size > 0 &&
        std::memcmp(image_ + piece.at, bytes(piece.source), piece.size) != 0)
      found.push_back(i);
  }
  return found;
}

void Copier::run(bool first) {
  std::exception_ptr error;
  try {
    if (first && download_ != nullptr) download_->enqueue();
    for (std::size_t block; (block = next_.fetch_add(1)) < blocks();) copy_block(block);
  } catch (...) {
    error = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  if (error != nullptr) {
    // The first one is the reason, the others follow from it.
    if (error_ == nullptr) error_ = error;
    next_ = blocks();
    download_->abandon();
  }
  if (busy_ == 1 && error_ != nullptr) {
    // Nobody else hands copies to the device now, and nobody may touch the image while one is under way.
    lock.unlock();
    download_->drain();
    lock.lock();
  }
  if (--busy_ == 0) idle_.notify_all();
}

void Copier::copy_block(std::size_t block) {
  std::size_t at = data_start_ + block * kBlock;
  const std::size_t end = std::min(at + kBlock, table_start_);
  std::uint32_t crc = 0;
  for (std::size_t i = first_[block]; at < end; ++i) {
    const Piece& piece = pieces_[i];
    if (piece.size == 0) continue;
    const std::size_t n = std::min<std::size_t>(end, piece.at + piece.size) - at;
    const unsigned char* from = piece.remote ? download_->arrived(i, block, at) : nullptr;
    if (from != nullptr && from != image_ + at)
      crc = stream_crc32c(crc, image_ + at, from, n);
    else if (from != nullptr || piece.source == 0 || piece.now || placed_)
      crc = crc32c(crc, image_ + at, n);
    else
      crc = stream_crc32c(crc, image_ + at, bytes(piece.source) + (at - piece.at), n);
    at += n;
  }
  if (download_ != nullptr) download_->consumed(block);
  unsigned char* word = image_ + table_start_ + 4 * block;
  for (int i = 0; i < 4; ++i) word[i] = static_cast<unsigned char>(crc >> (8 * i));
}

}  // namespace resilient_train
