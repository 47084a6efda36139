#include "races.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

extern const char __executable_start, _end;  // the program's own memory

namespace emulator::races {

namespace {

constexpr int kWarps = 32;

// Who accessed a byte last, and in which epoch of its warp: numbers that only grow; a warp takes the next at a barrier.
struct Access {
  enum By : uint64_t { lane, warp, block };  // `thread` alone, or several of its warp, or of several warps

  uint64_t epoch : 51;  // the latest
  uint64_t thread : 10;
  uint64_t by : 2;
  uint64_t others : 1;  // so did another block of the launch
};
// Of a byte that several warps read: each warp's reads, as far as they may be unordered with what follows.
struct Readers {
  Access by_warp[kWarps];
};
struct Cell {
  Access write, read;
  uint32_t write_place, read_place;  // after __executable_start
  uint32_t readers;                  // where several warps read: number in `readers`
};
struct Region {
  const unsigned char* begin;
  size_t bytes;
  Cell* cells;
  bool shared;  // the program's own memory, which holds shared memory: each block has its own
};

bool enabled = false;
bool reports = false;  // what composes a report may be compiled with -fsanitize=thread, too
uint64_t counter = 0, launch_begin = 0, block_begin = 0;
std::vector<Readers> readers;  // of the block that runs
uint64_t now[kWarps];
uint64_t known[kWarps][kWarps];  // [warp][other]: what other did in epochs below lies before what warp does now
std::map<const unsigned char*, Region> regions;
Region* latest = nullptr;

Region* find(const unsigned char* at) {
  if (latest && at >= latest->begin && at < latest->begin + latest->bytes) return latest;
  auto next = regions.upper_bound(at);
  if (next == regions.begin()) return nullptr;
  Region& region = std::prev(next)->second;
  return at < region.begin + region.bytes ? latest = &region : nullptr;
}

std::string line_of(uint32_t place) {
  if (place == 0) return "an asynchronous copy";
  char command[200], line[1000];
  std::snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe 0x%x 2>&1", static_cast<int>(getpid()),
                place - 1);
  std::string text;
  if (FILE* const pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      const char* const slash = std::strrchr(line, '/');
      std::string name = slash ? slash + 1 : line;
      text += (text.empty() ? "" : " < ") + name.substr(0, name.find_first_of(" \n"));
    }
    pclose(pipe);
  }
  return text;
}

bool ordered(const Access& a, unsigned me, bool shared) {
  if (a.epoch < launch_begin) return true;
  if (a.epoch < block_begin) return shared;
  if (a.by == Access::lane && a.thread == me) return true;
  const unsigned warp = static_cast<unsigned>(a.thread) / kLanes, mine = me / kLanes;
  return a.epoch < (warp == mine ? now[warp] : known[mine][warp]);
}

bool several_warps(const Access& a) { return a.epoch >= block_begin && a.by == Access::block; }

// Of the reads of a byte, one that is not ordered with what comes now, or null.
const Access* unordered_read(const Cell& cell, unsigned me, bool shared) {
  if (!several_warps(cell.read)) return ordered(cell.read, me, shared) ? nullptr : &cell.read;
  for (const Access& a : readers[cell.readers].by_warp) {
    if (!ordered(a, me, shared)) return &a;
  }
  return nullptr;
}

[[noreturn]] void report(const void* at, const Access& a, bool wrote, uint32_t before, bool writes, uint32_t place) {
  reports = true;
  const ptrdiff_t in_shared = static_cast<const unsigned char*>(at) - shared_memory;
  const bool shared = in_shared >= 0 && in_shared < static_cast<ptrdiff_t>(kMaxSharedBytes);
  std::string who = a.by == Access::warp ? "several lanes of warp " + std::to_string(a.thread / kLanes)
                                         : "thread " + std::to_string(a.thread);
  if (a.epoch < block_begin || a.others) who += " of another block";
  fail(std::string("race at ") +
       (shared ? "byte " + std::to_string(in_shared) + " of shared memory" : "global or static shared memory") + ": " +
       (writes ? "written" : "read") + " in " + line_of(place) + ", not ordered with what " + who +
       (wrote ? " wrote in " : " read in ") + line_of(before));
}

void set_read(Cell& cell, unsigned me, bool shared) {
  const uint64_t epoch = now[me / kLanes];
  Access& a = cell.read;
  const bool in_launch = a.epoch >= launch_begin, in_block = a.epoch >= block_begin;
  const uint64_t others = !shared && in_launch && (a.others || !in_block);
  const auto add = [&](Access& to) {
    const bool alone = to.epoch < block_begin || ordered(to, me, shared);
    to = {epoch, me, alone ? Access::lane : Access::warp, 0};
  };
  if (!several_warps(a)) {
    if (!in_block || ordered(a, me, shared)) {
      a = {epoch, me, Access::lane, others};
      return;
    }
    if (a.thread / kLanes == me / kLanes) {
      a = {epoch, me, Access::warp, others};
      return;
    }
    cell.readers = static_cast<uint32_t>(readers.size());
    readers.push_back({});
    readers.back().by_warp[a.thread / kLanes] = a;
  }
  add(readers[cell.readers].by_warp[me / kLanes]);
  a = {epoch, me, Access::block, others};
}

}  // namespace

void know(const void* memory, size_t bytes) {
  if (!enabled || bytes == 0) return;
  if (regions.empty() && memory != &__executable_start) know(&__executable_start, &_end - &__executable_start);
  void* const cells =
      mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) fail("no memory to watch accesses");
  const unsigned char* const begin = static_cast<const unsigned char*>(memory);
  regions[begin] = {begin, bytes, static_cast<Cell*>(cells), memory == &__executable_start};
}
void forget(const void* memory) {
  const auto found = regions.find(static_cast<const unsigned char*>(memory));
  if (found == regions.end()) return;
  munmap(found->second.cells, found->second.bytes * sizeof(Cell));
  regions.erase(found);
  latest = nullptr;
}

void begin_launch() {
  launch_begin = ++counter;
  reports = false;
}
void begin_block() {
  block_begin = ++counter;
  readers.clear();
  ++counter;
  for (int w = 0; w < kWarps; ++w) {
    now[w] = counter;
    std::fill_n(known[w], kWarps, block_begin);
  }
}
void sync_warp(int warp) { now[warp] = ++counter; }
void arrive(Arrived& arrived, int warp) {
  for (int v = 0; v < kWarps; ++v) arrived.before[v] = std::max(arrived.before[v], known[warp][v]);
  arrived.before[warp] = now[warp] + 1;
  now[warp] = ++counter;
}
void join(const Arrived& arrived, int warp) {
  for (int v = 0; v < kWarps; ++v) {
    if (v != warp) known[warp][v] = std::max(known[warp][v], arrived.before[v]);
  }
}

void sync_warps(uint32_t warps) {
  uint64_t joined[kWarps] = {};
  for (int w = 0; w < kWarps; ++w) {
    if (!(warps >> w & 1)) continue;
    for (int v = 0; v < kWarps; ++v) joined[v] = std::max(joined[v], known[w][v]);
    joined[w] = now[w] + 1;
  }
  ++counter;
  for (int w = 0; w < kWarps; ++w) {
    if (!(warps >> w & 1)) continue;
    std::copy_n(joined, kWarps, known[w]);
    now[w] = counter;
  }
}

void access(const void* memory, size_t bytes, bool writes, const void* from, size_t alignment) {
  const int number = thread_number();
  if (!enabled || reports || number < 0 || is_stack(memory)) return;
  const unsigned me = static_cast<unsigned>(number);
  const unsigned char* const begin = static_cast<const unsigned char*>(memory);
  const uint32_t place = from ? static_cast<uint32_t>(static_cast<const char*>(from) - &__executable_start) : 0;
  const ptrdiff_t in_shared = begin - shared_memory;
  const bool shared = in_shared >= 0 && in_shared < static_cast<ptrdiff_t>(kMaxSharedBytes);
  Region* const region = find(begin);
  if (!region || begin + bytes > region->begin + region->bytes || (shared && in_shared + bytes > shared_size())) {
    reports = true;
    fail(std::to_string(bytes) + " bytes out of bounds are " + (writes ? "written" : "read") + " in " + line_of(place));
  }
  if (reinterpret_cast<uintptr_t>(memory) % alignment) {
    reports = true;
    fail(std::to_string(bytes) + " bytes that are not aligned are accessed at once in " + line_of(place));
  }
  Cell* const cells = region->cells + (begin - region->begin);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    // A flag, one byte, may be set by several threads of a block.
    const bool flag = writes && bytes == 1 && cell.write.epoch >= block_begin;
    if (!flag && !ordered(cell.write, me, region->shared)) {
      report(begin + i, cell.write, true, cell.write_place, writes, place);
    }
    if (!writes) {
      set_read(cell, me, region->shared);
      cell.read_place = place;
      continue;
    }
    const bool read_by_others = cell.read.others && cell.read.epoch >= launch_begin;
    if (const Access* const read = read_by_others ? &cell.read : unordered_read(cell, me, region->shared)) {
      report(begin + i, *read, false, cell.read_place, true, place);
    }
    cell.write = {now[me / kLanes], me, Access::lane, 0};
    cell.write_place = place;
  }
}

void enable() { enabled = true; }

}  // namespace emulator::races

// What code compiled with -fsanitize=thread calls.
#define EMULATOR_ACCESS(bytes)                                                     \
  extern "C" void __tsan_read##bytes(const void* at) {                             \
    emulator::races::access(at, bytes, false, __builtin_return_address(0), bytes); \
  }                                                                                \
  extern "C" void __tsan_write##bytes(const void* at) {                            \
    emulator::races::access(at, bytes, true, __builtin_return_address(0), bytes);  \
  }                                                                                \
  extern "C" void __tsan_unaligned_read##bytes(const void* at) {                   \
    emulator::races::access(at, bytes, false, __builtin_return_address(0), 1);     \
  }                                                                                \
  extern "C" void __tsan_unaligned_write##bytes(const void* at) {                  \
    emulator::races::access(at, bytes, true, __builtin_return_address(0), 1);      \
  }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
extern "C" void __tsan_read_range(const void* at, size_t bytes) {
  emulator::races::access(at, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(const void* at, size_t bytes) {
  emulator::races::access(at, bytes, true, __builtin_return_address(0));
}
// Host code's own.
extern "C" char __tsan_atomic8_load(const volatile char* at, int order) { return __atomic_load_n(at, order); }
extern "C" int __tsan_atomic32_load(const volatile int* at, int order) { return __atomic_load_n(at, order); }
extern "C" void __tsan_atomic32_store(volatile int* at, int x, int order) { __atomic_store_n(at, x, order); }
extern "C" void __tsan_init() { emulator::races::enable(); }
