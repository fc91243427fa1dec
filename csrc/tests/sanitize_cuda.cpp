// Exercises the engine's device half under sanitizers, on the fake driver of tests/image/fake_cuda.cpp (`make sanitize`).
// The argument is the fake driver's path.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../copier.hpp"
#include "../crc32c.hpp"
#include "../upload.hpp"

namespace rt = resilient_train;
namespace cuda = resilient_train::cuda;

extern "C" {
void fake_reset(int version, int addresses);
void fake_fail(const char* name, int nth, int status, int times);
void fake_delay(int microseconds);
void fake_device_memory(const void* at, std::size_t size);
int fake_alive();
int fake_misuse(char* text, int size);
void fake_compute(void* stream, void* at, std::size_t size, int byte, int microseconds);
void* fake_stream();
void fake_stream_wait(void* stream);
void fake_stream_free(void* stream);
}

namespace {

void check(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void copies(const char* library, std::mt19937& chance, bool kernels, bool locked, int version) {
  fake_reset(version, chance() % 2);
  fake_delay(chance() % 300);
  auto device = std::make_shared<cuda::Device>(0, library, kernels ? "fake" : "");
  void* stream = fake_stream();
  const auto compute = static_cast<cuda::StreamHandle>(stream);
  std::vector<unsigned char> source(6 << 20), here(6 << 20);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = here[i] = static_cast<unsigned char>(chance());
  fake_device_memory(source.data(), source.size());
  std::vector<rt::Piece> pieces;
  std::vector<unsigned char> expected;
  const std::size_t start = 4096, sizes[] = {0, 1, 63, 4096, 50000, 70000, 1500000};
  std::size_t at = start, begin = 0;
  while (begin + 1500000 < source.size()) {
    const std::size_t size = sizes[chance() % 7];
    const bool remote = chance() % 4 != 0;
    const auto& from = remote ? source : here;
    pieces.push_back({at, reinterpret_cast<std::uint64_t>(from.data() + begin), size, chance() % 3 == 0, remote});
    expected.insert(expected.end(), from.begin() + begin, from.begin() + begin + size);
    begin += size, at += size;
  }
  const std::size_t blocks = (expected.size() + rt::kBlock - 1) / rt::kBlock;
  std::vector<unsigned char> image(at + 4 * blocks);
  if (locked) device->lock(image.data(), image.size());
  {
    rt::Copier copier(pieces, start, at, 1 + chance() % 4, device);
    const std::vector<unsigned char> before = source;
    for (bool all_now : {false, true, false}) {
      copier.start(image.data(), all_now, compute);
      std::thread other([&] { copier.wait(); });  // Whoever is first publishes; both may wait.
      copier.fence(compute);
      fake_compute(stream, source.data(), source.size(), 7, 100);
      copier.wait();
      other.join();
      check(std::memcmp(image.data() + start, expected.data(), expected.size()) == 0, "the copy");
      check(copier.changed().empty(), "nothing changed before the fence");
      fake_stream_wait(stream);
      source = before;
    }
    fake_fail("cuEventSynchronize", 2, 2, 1);
    try {
      copier.start(image.data(), false, compute);
      copier.wait();
    } catch (const cuda::Error&) {
    }
  }
  std::vector<unsigned char> target(5 << 20);
  fake_device_memory(target.data(), target.size());
  cuda::Upload upload(device, {{reinterpret_cast<std::uint64_t>(target.data()),
                                reinterpret_cast<std::uint64_t>(here.data()), target.size()}},
                      compute, 2);
  upload.wait();
  check(std::memcmp(target.data(), here.data(), target.size()) == 0, "the upload");
  if (locked) device->unlock(image.data());
  fake_stream_wait(stream);
  fake_stream_free(stream);
  fake_device_memory(source.data(), 0);
  fake_device_memory(target.data(), 0);
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 chance(1);
  for (int version : {12000, 12080, 13000})
    for (bool kernels : {false, true})
      for (bool locked : {false, true}) copies(arguments[1], chance, kernels, locked, version);
  char misuse[200];
  check(fake_misuse(misuse, sizeof misuse) == 0, misuse);
  check(fake_alive() == 0, "everything was given back to the driver");
  std::puts("native engine on a device: all checks passed");
}
