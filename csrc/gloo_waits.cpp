#include "gloo_waits.hpp"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <mutex>
#include <stdexcept>

namespace resilient_train {

namespace {

// As in gloo/transport/tcp/unbound_buffer.h: members are functions whose first argument is the object.
using Timeout = std::chrono::milliseconds;
using Wait = bool (*)(void* buffer, int* rank, Timeout timeout);
using Signal = void (*)(void* buffer, std::exception_ptr error);

constexpr char LIBRARY[] = "libtorch_cpu.so";
constexpr char TABLE[] = "_ZTVN4gloo9transport3tcp13UnboundBufferE";
constexpr char WAIT_RECV[] =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitRecvEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr char WAIT_SEND[] =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitSendEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr char SIGNAL[] =
    "_ZN4gloo9transport3tcp13UnboundBuffer15signalExceptionENSt15__exception_ptr13exception_ptrE";

Wait recv_of_gloo = nullptr;
Wait send_of_gloo = nullptr;
Signal signal_of_gloo = nullptr;

std::mutex guard;

// A wait under way, on the stack of the thread that waits.
class Waiting {
 public:
  explicit Waiting(void* buffer) : buffer_(buffer) {
    const std::lock_guard<std::mutex> locked(guard);
    next_ = first;
    if (next_ != nullptr) next_->before_ = this;
    first = this;
  }
  // Nobody can be telling the buffer of an error any more when the wait returns to whoever owns it.
  ~Waiting() {
    const std::lock_guard<std::mutex> locked(guard);
    if (next_ != nullptr) next_->before_ = before_;
    (before_ != nullptr ? before_->next_ : first) = next_;
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

  static std::size_t end_all() {
    const std::lock_guard<std::mutex> locked(guard);
    std::size_t count = 0;
    for (Waiting* waiting = first; waiting != nullptr; waiting = waiting->next_, ++count)
      signal_of_gloo(waiting->buffer_,
                     std::make_exception_ptr(std::runtime_error("gloo: a transfer was aborted before its end")));
    return count;
  }

 private:
  static Waiting* first;
  void* buffer_;
  Waiting* next_ = nullptr;
  Waiting* before_ = nullptr;
};

Waiting* Waiting::first = nullptr;

bool wait_recv(void* buffer, int* rank, Timeout timeout) {
  const Waiting waiting(buffer);
  return recv_of_gloo(buffer, rank, timeout);
}

bool wait_send(void* buffer, int* rank, Timeout timeout) {
  const Waiting waiting(buffer);
  return send_of_gloo(buffer, rank, timeout);
}

// Whether the page of an address can be written to.
bool writable(std::uintptr_t address) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return false;
  char line[512];
  bool found = false;
  while (!found && std::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long begin = 0, end = 0;
    char rights[5] = "";
    if (std::sscanf(line, "%lx-%lx %4s", &begin, &end, rights) == 3 && begin <= address && address < end)
      found = rights[1] == 'w';
  }
  std::fclose(maps);
  return found;
}

// Tables of virtual functions are read-only once their library is loaded.
bool replace(void** slot, void* function) {
  const auto address = reinterpret_cast<std::uintptr_t>(slot);
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  void* const begin = reinterpret_cast<void*>(address / page * page);
  const bool opened = !writable(address);
  if (opened && mprotect(begin, page, PROT_READ | PROT_WRITE) != 0) return false;
  std::atomic_ref<void*>(*slot).store(function, std::memory_order_release);
  if (opened) mprotect(begin, page, PROT_READ);
  return true;
}

void** find(void** table, std::size_t entries, void* function) {
  for (std::size_t index = 0; index < entries; ++index)
    if (table[index] == function) return table + index;
  return nullptr;
}

bool install() {
  void* const library = dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  void** const table = static_cast<void**>(dlsym(library, TABLE));
  void* const recv = dlsym(library, WAIT_RECV);
  void* const send = dlsym(library, WAIT_SEND);
  void* const signal = dlsym(library, SIGNAL);
  if (table == nullptr || recv == nullptr || send == nullptr || signal == nullptr) return false;
  Dl_info info;
  const ElfW(Sym)* symbol = nullptr;
  if (dladdr1(table, &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&symbol)), RTLD_DL_SYMENT) == 0 ||
      symbol == nullptr || info.dli_saddr != table)
    return false;
  const std::size_t entries = symbol->st_size / sizeof(void*);
  void** const recv_slot = find(table, entries, recv);
  void** const send_slot = find(table, entries, send);
  if (recv_slot == nullptr || send_slot == nullptr) return false;
  recv_of_gloo = reinterpret_cast<Wait>(recv);
  send_of_gloo = reinterpret_cast<Wait>(send);
  signal_of_gloo = reinterpret_cast<Signal>(signal);
  // One alone does no harm: what is in the list can be ended, and what is not is as before.
  return replace(recv_slot, reinterpret_cast<void*>(wait_recv)) &&
         replace(send_slot, reinterpret_cast<void*>(wait_send));
}

}  // namespace

bool watch_gloo_waits() {
  static std::mutex once;
  static bool installed = false;
  const std::lock_guard<std::mutex> locked(once);
  // Torch may be loaded later than this was first asked for.
  if (!installed) installed = install();
  return installed;
}

std::size_t end_gloo_waits() { return Waiting::end_all(); }

}  // namespace resilient_train
