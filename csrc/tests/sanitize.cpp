// Exercises the native engine under sanitizers (`make sanitize`): every copy is checked against a plain one.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../copier.hpp"
#include "../crc32c.hpp"
#include "../file.hpp"
#include "../gather.hpp"
#include "../parity.hpp"
#include "../publish.hpp"
#include "../scatter.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace rt = resilient_train;

namespace {

void check(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::uint32_t word(const std::vector<unsigned char>& image, std::size_t at) {
  return image[at] | image[at + 1] << 8 | image[at + 2] << 16 | static_cast<std::uint32_t>(image[at + 3]) << 24;
}

void copies(std::mt19937& chance) {
  std::vector<unsigned char> source(5 << 20);
  for (auto& byte : source) byte = static_cast<unsigned char>(chance());
  const std::size_t start = 4096 + chance() % 64;
  std::vector<rt::Piece> pieces;
  std::vector<unsigned char> expected;
  std::size_t at = start;
  const std::size_t sizes[] = {0, 1, 63, 4096, 50000, 1500000};
  while (expected.size() < (4u << 20)) {
    const std::size_t size = sizes[chance() % 6];
    const std::size_t begin = chance() % (source.size() - size);
    pieces.push_back({at, reinterpret_cast<std::uint64_t>(source.data() + begin), size, chance() % 3 == 0});
    expected.insert(expected.end(), source.begin() + begin, source.begin() + begin + size);
    at += size;
  }
  const std::size_t blocks = (expected.size() + rt::kBlock - 1) / rt::kBlock;
  // Exactly as long as it must be, so that one byte too far is an error.
  std::vector<unsigned char> image(at + 4 * blocks);
  rt::Copier copier(pieces, start, at, 1 + chance() % 4);
  for (bool all_now : {false, true, false}) {
    copier.start(image.data(), all_now);
    std::thread other([&] { copier.wait(); });  // Whoever is first publishes; both may wait.
    copier.wait();
    other.join();
    check(std::memcmp(image.data() + start, expected.data(), expected.size()) == 0, "the copy");
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::size_t n = std::min(rt::kBlock, expected.size() - block * rt::kBlock);
      check(word(image, at + 4 * block) == rt::crc32c_portable(0, expected.data() + block * rt::kBlock, n), "a sum");
    }
  }
  check(copier.changed().empty(), "nothing changed");
}

std::FILE* written(const std::vector<unsigned char>& bytes) {
  std::FILE* file = std::tmpfile();
  check(file != nullptr && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && std::fflush(file) == 0,
        "a file to read from");
  return file;
}

// Memory that was never touched, the pages around it that nobody may write, and a place between two pages.
void populates(std::mt19937& chance) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), pages = 700;
  void* mapped = mmap(nullptr, (pages + 2) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(mapped != MAP_FAILED, "mapped memory");
  auto* begin = static_cast<unsigned char*>(mapped);
  check(mprotect(begin, page, PROT_NONE) == 0 && mprotect(begin + (pages + 1) * page, page, PROT_NONE) == 0, "guards");
  unsigned char* target = begin + page + chance() % page;
  const std::size_t size = begin + (pages + 1) * page - target - chance() % 100;
  target[size / 2] = 7;
  rt::populate(target, size);
  std::vector<unsigned char> there(pages);
  check(mincore(begin + page, pages * page, there.data()) == 0, "which pages are there");
  const bool supported = madvise(begin + page, page, MADV_POPULATE_WRITE) == 0;
  for (const unsigned char state : there) check((state & 1) != 0 || !supported, "every page is there");
  for (std::size_t i = 0; i < size; ++i) check(target[i] == (i == size / 2 ? 7 : 0), "nothing is written");
  munmap(mapped, (pages + 2) * page);
}

void scatters(std::mt19937& chance) {
  std::vector<unsigned char> image((2u << 20) + chance() % 100000);
  for (auto& byte : image) byte = static_cast<unsigned char>(chance());
  std::vector<std::uint32_t> sums;
  for (std::size_t at = 0; at < image.size(); at += rt::kBlock)
    sums.push_back(rt::crc32c_portable(0, image.data() + at, std::min(rt::kBlock, image.size() - at)));
  std::vector<unsigned char> target(image.size());
  std::vector<rt::Segment> segments;
  for (std::size_t at = 0; at < image.size();) {
    const std::size_t size = std::min<std::size_t>(image.size() - at, chance() % 300000);
    segments.push_back({reinterpret_cast<std::uint64_t>(target.data() + at), size});
    at += size;
  }
  check(rt::scatter(image.data(), segments, sums) == -1 && target == image, "every segment stands in its place");
  check(rt::scatter(nullptr, segments, sums) == -1, "and is checked there");
  std::fill(target.begin(), target.end(), 0);
  std::FILE* file = written(image);
  check(rt::scatter_file(fileno(file), 0, segments, sums) == -1 && target == image, "every segment is read to its place");
  bool ended = false;
  try {
    rt::scatter_file(fileno(file), 1, segments, sums);
  } catch (const rt::EndOfFile&) {
    ended = true;
  }
  check(ended, "a file that ends too early is named");
  std::fclose(file);
  std::copy(image.begin(), image.end(), target.begin());
  populates(chance);
  target[rt::kBlock] ^= 1;
  check(rt::scatter(nullptr, segments, sums) == 1, "the damaged block is named");
}

void gathers(std::mt19937& chance) {
  const std::size_t total = (1u << 20) + chance() % (1u << 20);
  std::vector<unsigned char> image(total), target(total);
  for (auto& byte : image) byte = static_cast<unsigned char>(chance());
  std::vector<std::uint32_t> sums;
  for (std::size_t at = 0; at < total; at += rt::kBlock)
    sums.push_back(rt::crc32c_portable(0, image.data() + at, std::min(rt::kBlock, total - at)));
  std::vector<rt::Rows> rows;
  std::vector<unsigned char> expected(total);
  std::size_t wanted = 0;
  for (std::size_t at = chance() % 100000;;) {
    const std::size_t size = 1 + chance() % (chance() % 2 ? 100 : 50000), stride = size + chance() % 3000;
    const std::size_t count = 1 + chance() % 20;
    if (at + stride * (count - 1) + size > total) break;
    rows.push_back({at, size, stride, count, reinterpret_cast<std::uint64_t>(target.data() + at), stride});
    for (std::size_t i = 0; i < count; ++i)
      std::memcpy(expected.data() + at + i * stride, image.data() + at + i * stride, size);
    wanted += size * count;
    at += stride * (count - 1) + size + chance() % 2 * (chance() % 10000);
  }
  // Exactly as long as it must be, so that one byte too far is an error.
  std::vector<unsigned char> travelled(wanted);
  const std::vector<std::uint32_t> gaps = rt::gather_rows(image.data(), total, rows, travelled.data());
  check(rt::scatter_rows(travelled.data(), total, rows, gaps, sums) == -1 && target == expected, "rows in their places");
  std::fill(target.begin(), target.end(), 0);
  check(rt::place_rows(image.data(), total, rows, sums) == -1 && target == expected, "rows of blocks in their places");
  std::fill(target.begin(), target.end(), 0);
  std::FILE* file = written(image);
  check(rt::place_file_rows(fileno(file), 0, total, rows, sums) == -1 && target == expected, "rows of a file's blocks");
  std::fclose(file);
  image[total - 1] ^= 1;
  const std::vector<std::uint32_t> other = rt::gather_rows(image.data(), total, rows, travelled.data());
  check(rt::scatter_rows(travelled.data(), total, rows, other, sums) == 1, "the block with a damaged gap is named");
  check(rt::place_rows(image.data(), total, rows, sums) == 1, "the block with a damaged gap is named, in place");
  rows.assign(1, {1, 1, ~0ull, 3, 0, 0});
  bool thrown = false;
  try {
    rt::gather_rows(image.data(), total, rows, travelled.data());
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  check(thrown, "rows outside of the blocks are refused");
}

void parities(std::mt19937& chance) {
  const std::size_t size = chance() % 1000;
  std::vector<unsigned char> one(size), two(size);
  for (auto& byte : one) byte = static_cast<unsigned char>(chance());
  for (auto& byte : two) byte = static_cast<unsigned char>(chance());
  std::vector<unsigned char> both = one;
  rt::xor_into(both.data(), two.data(), size);
  rt::xor_into(both.data(), one.data(), size);
  check(both == two, "what is lost is the parity of what is left");
}

void words() {
  alignas(8) std::uint64_t published = 0;
  std::uint64_t data = 0;
  std::thread reader([&] {
    while (rt::observe(&published) == 0) std::this_thread::yield();
    check(data == 42, "what was written before publication is seen");
  });
  data = 42;
  rt::publish(&published, 7);
  reader.join();
  rt::retract(&published);
  check(rt::observe(&published) == 0, "retracted");
}

void refusals() {
  bool thrown = false;
  try {
    rt::Copier({{10, 0, 5, true}}, 0, 10, 1);
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  check(thrown, "a plan with a hole is refused");
}

}  // namespace

int main() {
  std::mt19937 chance(1);
  for (int round = 0; round < 20; ++round) copies(chance);
  for (int round = 0; round < 20; ++round) scatters(chance);
  for (int round = 0; round < 20; ++round) gathers(chance);
  for (int round = 0; round < 50; ++round) parities(chance);
  words();
  refusals();
  std::puts("native engine: all checks passed");
}
