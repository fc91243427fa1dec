#include "copier.hpp"

#include <algorithm>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <string>

#include "crc32c.hpp"

namespace resilient_train {
namespace {

const unsigned char* bytes(std::uint64_t address) { return reinterpret_cast<const unsigned char*>(address); }

// The process's signals are for the interpreter's threads.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

Copier::Copier(std::vector<Piece> pieces, std::size_t data_start, std::size_t table_start, unsigned threads)
    : pieces_(std::move(pieces)), data_start_(data_start), table_start_(table_start), wanted_(std::max(1u, threads)) {
  std::size_t at = data_start_;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (piece.at != at || piece.size > table_start_ - at)
      throw std::invalid_argument("piece " + std::to_string(i) + " does not follow the one before it");
    if (piece.size == 0) continue;
    while (data_start_ + first_.size() * kBlock < at + piece.size) first_.push_back(i);
    at += piece.size;
  }
  if (at != table_start_) throw std::invalid_argument("the pieces end before the checksums begin");
}

Copier::~Copier() {
  wait();
  for (auto& thread : threads_) thread.join();
}

void Copier::start(unsigned char* image, bool all_now) {
  {
    std::lock_guard lock(mutex_);
    if (busy_ > 0) throw std::logic_error("a copy is running already");
  }
  for (auto& thread : threads_) thread.join();
  threads_.clear();
  image_ = image;
  placed_ = all_now;
  for (const Piece& piece : pieces_)
    if (piece.source != 0 && (all_now || piece.now)) std::memcpy(image + piece.at, bytes(piece.source), piece.size);
  next_ = 0;
  const SignalsBlocked blocked;
  const auto count = static_cast<unsigned>(std::min<std::size_t>(wanted_, blocks()));
  for (unsigned i = 0; i < count; ++i) {
    {
      std::lock_guard lock(mutex_);
      ++busy_;
    }
    try {
      threads_.emplace_back([this] { run(); });
    } catch (...) {
      {
        std::lock_guard lock(mutex_);
        --busy_;
      }
      if (i > 0) return;  // The others do its share.
      throw;
    }
  }
}

bool Copier::running() const {
  std::lock_guard lock(mutex_);
  return busy_ > 0;
}

void Copier::wait() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return busy_ == 0; });
}

std::vector<std::size_t> Copier::changed() const {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (piece.source != 0 && !piece.now && piece.size > 0 &&
        std::memcmp(image_ + piece.at, bytes(piece.source), piece.size) != 0)
      found.push_back(i);
  }
  return found;
}

void Copier::run() {
  for (std::size_t block; (block = next_.fetch_add(1)) < blocks();) copy_block(block);
  std::lock_guard lock(mutex_);
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
    if (piece.source == 0 || piece.now || placed_)
      crc = crc32c(crc, image_ + at, n);
    else
      crc = stream_crc32c(crc, image_ + at, bytes(piece.source) + (at - piece.at), n);
    at += n;
  }
  unsigned char* word = image_ + table_start_ + 4 * block;
  for (int i = 0; i < 4; ++i) word[i] = static_cast<unsigned char>(crc >> (8 * i));
}

}  // namespace resilient_train
