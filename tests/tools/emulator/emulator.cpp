#include "emulator.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#include "races.h"

// Saves the callee's registers on the stack, leaves its end in *from and goes on where another stack was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kGuard = 4096;  // bytes after a block's shared memory that must stay as they are
alignas(1024) unsigned char shared_memory[kMaxSharedBytes + kGuard];
int64_t stretch = 4096;
int objects = 0, until_failure = -1;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMaxThreads = 1024, kBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread {
  void* resumed;  // where it was left
  Index index;
  int warp, lane;
  bool done;
  // While it waits for its warp:
  unsigned mask;
  const char* name;
  void* mine;
  std::vector<Copy> copies;
  int groups;  // committed
};

struct Warp {
  unsigned alive, runnable, meeting;  // lanes
};

struct Barrier {
  std::vector<int> waiting;
  int count;
  bool value, result;
  Place place;
};

struct Turns {
  int count, arrived = 0, over = 0;
  std::vector<int> waiting;
  races::Arrived ordered, before;  // by this turn, and by the turn before it
};

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
Barrier barriers[kBarriers];
std::map<const void*, Turns> turns;
Thread* current = nullptr;
char* stacks = nullptr;  // of all threads
int alive = 0;
void* scheduler = nullptr;
void (*entry)(const void*) = nullptr;
const void* entry_arguments = nullptr;
std::string failure;
size_t shared_bytes = 0;
bool copies_are_early = false;
uint64_t state = 1;

uint32_t random_number() {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

std::string name_of(const Thread& t) { return "thread " + std::to_string(t.warp * kLanes + t.lane); }

std::string name_of(Place place) {
  const char* const slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

void leave() {
  Thread* const self = current;
  emulator_switch(&self->resumed, scheduler);
}

void release(Barrier& barrier) {
  uint32_t met = 0;
  for (const int i : barrier.waiting) {
    warps[threads[i].warp].runnable |= 1u << threads[i].lane;
    met |= 1u << threads[i].warp;
  }
  races::sync_warps(met);
  barrier.waiting.clear();
  barrier.result = barrier.value;
}

void release_if_all(Barrier& barrier) {
  const int met = static_cast<int>(barrier.waiting.size());
  if (met > 0 && met == (barrier.count ? barrier.count : alive)) release(barrier);
}

void begin_thread() {
  entry(entry_arguments);
  current->done = true;
  --alive;
  warps[current->warp].alive &= ~(1u << current->lane);
  warps[current->warp].runnable &= ~(1u << current->lane);
  for (Barrier& barrier : barriers) release_if_all(barrier);
  leave();
}

void map_stacks() {
  void* const mapped =
      mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
  stacks = static_cast<char*>(mapped);
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
}

void prepare(Thread& t) {
  void** top = reinterpret_cast<void**>(stacks + (&t - threads + 1) * kStack);
  *--top = nullptr;  // begin_thread() never returns
  *--top = reinterpret_cast<void*>(begin_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.resumed = top;
  t.done = false;
  t.copies.clear();
  t.groups = 0;
}

std::string who_waits() {
  std::string text;
  for (int id = 0; id < kBarriers; ++id) {
    if (barriers[id].waiting.empty()) continue;
    text += "; " + std::to_string(barriers[id].waiting.size()) + " threads wait at barrier " + std::to_string(id) +
            " (" + name_of(barriers[id].place) + ")";
  }
  for (const auto& [barrier, turn] : turns) {
    if (turn.waiting.empty()) continue;
    text += "; " + std::to_string(turn.waiting.size()) + " threads wait for a turn at which " +
            std::to_string(turn.arrived) + " of " + std::to_string(turn.count) + " arrived";
  }
  for (const Warp& warp : warps) {
    for (int l = 0; l < kLanes; ++l) {
      if (!(warp.meeting >> l & 1)) continue;
      const Thread& t = threads[(&warp - warps) * kLanes + l];
      text += "; " + name_of(t) + " waits in " + t.name;
      break;
    }
  }
  return text;
}

void run_block(int count) {
  const int warp_count = (count + kLanes - 1) / kLanes;
  std::memset(shared_memory, 0xff, shared_bytes + kGuard);
  copies_are_early = random_number() % 4 == 0;
  races::begin_block();
  alive = count;
  for (Barrier& barrier : barriers) barrier = {};
  turns.clear();
  for (Warp& warp : warps) warp = Warp{};
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.warp = i / kLanes;
    t.lane = i % kLanes;
    const unsigned n = static_cast<unsigned>(i);
    t.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    prepare(t);
    warps[t.warp].alive |= 1u << t.lane;
    warps[t.warp].runnable |= 1u << t.lane;
  }
  int w = 0;
  while (alive > 0) {
    // Another warp now and then, and always where this one waits.
    if (warps[w].runnable == 0 || random_number() % 8 == 0) {
      w = static_cast<int>(random_number() % warp_count);
      for (int i = 0; i < warp_count && warps[w].runnable == 0; ++i) w = (w + 1) % warp_count;
      if (warps[w].runnable == 0) fail("deadlock" + who_waits());
    }
    Warp& warp = warps[w];
    const unsigned turn = warp.runnable, order = random_number();
    const unsigned first = order % kLanes, step = order & 64 ? (order & 128 ? 1 : kLanes - 1) : (order >> 8) | 1;
    for (unsigned i = 0; i < kLanes; ++i) {
      const unsigned l = (first + i * step) % kLanes;
      if (!(turn >> l & 1)) continue;
      current = &threads[w * kLanes + l];
      threadIdx = current->index;
      emulator_switch(&scheduler, current->resumed);
      current = nullptr;
      if (!failure.empty()) return;
    }
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (shared_memory[shared_bytes + i] != 0xff) {
      fail("byte " + std::to_string(shared_bytes + i) + " of shared memory was written; the launch has " +
           std::to_string(shared_bytes));
    }
  }
}

}  // namespace

void seed(uint64_t number) { state = (number + 1) * 0xd1342543de82ef95u; }

void fail(const std::string& what) {
  if (!current) throw std::runtime_error("emulator: " + what);
  failure = what + " (block " + std::to_string(blockIdx.x) + ", " + name_of(*current) + ")";
  while (true) leave();
}

size_t& shared_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.emplace(kernel, 48 * 1024).first->second;
}

void run_grid(Index grid, Index block, size_t bytes, void (*kernel)(const void*), const void* arguments,
              size_t argument_bytes) {
  entry = kernel;
  entry_arguments = arguments;
  shared_bytes = bytes;
  blockDim = block;
  gridDim = grid;
  if (!stacks) map_stacks();
  races::know(arguments, argument_bytes);
  races::begin_launch();
  const unsigned count = grid.x * grid.y * grid.z, shift = random_number() % count;
  const bool backwards = random_number() % 2;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned n = ((backwards ? count - 1 - i : i) + shift) % count;
    blockIdx = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    failure.clear();
    run_block(static_cast<int>(block.x * block.y * block.z));
    if (!failure.empty()) break;
  }
  races::forget(arguments);
  if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
}

namespace {
Barrier& come_to_barrier(int id, int count, Place place) {
  Barrier& barrier = barriers[id];
  if (barrier.waiting.empty()) {
    barrier.count = count;
    barrier.value = false;
    barrier.place = place;
  } else if (barrier.count != count) {
    fail("barrier " + std::to_string(id) + " with different counts at " + name_of(place));
  } else if (count == 0 && (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file))) {
    fail("divergent barrier: " + name_of(place) + ", where others wait at " + name_of(barrier.place));
  }
  return barrier;
}
}  // namespace

bool wait_at_barrier(int id, int count, bool value, Place place) {
  Barrier& barrier = come_to_barrier(id, count, place);
  Thread* const self = current;
  barrier.value = barrier.value || value;
  barrier.waiting.push_back(static_cast<int>(self - threads));
  warps[self->warp].runnable &= ~(1u << self->lane);
  release_if_all(barrier);
  leave();
  return barrier.result;
}

namespace {
Turns& turns_of(const void* barrier) {
  const auto found = turns.find(barrier);
  if (found == turns.end()) fail("a barrier in shared memory without a count");
  return found->second;
}
}  // namespace

void init_turns(void* barrier, int count) {
  turns[barrier] = Turns{};
  turns[barrier].count = count;
}

void arrive_at_turn(void* barrier) {
  Turns& t = turns_of(barrier);
  races::arrive(t.ordered, current->warp);
  if (++t.arrived < t.count) return;
  t.arrived = 0;
  ++t.over;
  t.before = t.ordered;
  for (const int i : t.waiting) warps[threads[i].warp].runnable |= 1u << threads[i].lane;
  t.waiting.clear();
}

void wait_for_turn(void* barrier, int parity) {
  Turns& t = turns_of(barrier);
  Thread* const self = current;
  while ((t.over & 1) == parity) {
    t.waiting.push_back(static_cast<int>(self - threads));
    warps[self->warp].runnable &= ~(1u << self->lane);
    leave();
  }
  races::join(t.before, self->warp);
}

void meet(unsigned mask, const char* name, void* mine, const void* body, void (*run)(const void*, void* const*)) {
  Thread* const self = current;
  Warp& warp = warps[self->warp];
  Thread* const lanes = threads + self->warp * kLanes;
  const unsigned bit = 1u << self->lane;
  if (!(mask & bit)) fail(std::string(name) + ": the mask lacks the lane that calls");
  if (mask & ~warp.alive) fail(std::string(name) + ": the mask has lanes that have ended or do not exist");
  self->mask = mask;
  self->name = name;
  self->mine = mine;
  warp.meeting |= bit;
  if (mask & ~warp.meeting) {
    warp.runnable &= ~bit;
    return leave();
  }
  void* all[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const Thread& other = lanes[l];
    if (other.mask != mask || std::strcmp(other.name, name)) {
      fail("divergent warp: " + std::string(name) + ", where " + name_of(other) + " waits in " + other.name);
    }
    all[l] = other.mine;
  }
  run(body, all);
  if (!std::strcmp(name, "__syncwarp")) races::sync_warp(self->warp);
  warp.meeting &= ~mask;
  warp.runnable |= mask;
}

int lane() { return current->lane; }
int thread_number() { return current ? static_cast<int>(current - threads) : -1; }
bool is_stack(const void* pointer) {
  const ptrdiff_t at = static_cast<const char*>(pointer) - stacks;
  return at >= 0 && at < static_cast<ptrdiff_t>(kMaxThreads * kStack);
}
size_t shared_size() { return shared_bytes; }

namespace {
void land(const Copy& c) {
  races::access(c.to, c.bytes, true);
  if (!c.from) {
    std::memset(c.to, 0, c.bytes);
    return;
  }
  races::access(c.from, c.bytes, false);
  std::memcpy(c.to, c.from, c.bytes);
}
}  // namespace

void copy_async(void* to, const void* from, int bytes) {
  check_shared(to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("the source of an asynchronous copy is not aligned");
  const Copy copy{to, from, bytes, current->groups};
  if (copies_are_early) return land(copy);
  races::access(to, bytes, true);
  current->copies.push_back(copy);
}

void commit_copies() { ++current->groups; }

void wait_copies(int pending) {
  std::vector<Copy>& copies = current->copies;
  size_t i = 0;
  while (i < copies.size() && copies[i].group < current->groups - pending) land(copies[i++]);
  copies.erase(copies.begin(), copies.begin() + i);
}

unsigned char* shared_at(uint32_t address, int bytes) {
  unsigned char* const at = shared_memory + static_cast<int32_t>(address - kSharedBase);
  check_shared(at, bytes);
  return at;
}

void check_shared(const void* pointer, int bytes) {
  const ptrdiff_t at = static_cast<const unsigned char*>(pointer) - shared_memory;
  if (at < 0 || at + bytes > static_cast<ptrdiff_t>(shared_bytes) || at % bytes) {
    fail(std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of " + std::to_string(shared_bytes) +
         " of shared memory");
  }
}

}  // namespace emulator
