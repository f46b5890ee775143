// The threads behind parallel_for.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

// What the threads work on. They take parts from `next` until none is left.
struct Pool {
  std::mutex in_use;  // held by the caller whose work this is
  std::mutex mutex;   // guards all below but `next`
  std::condition_variable wake, idle;
  const std::function<void(int64_t)>* body = nullptr;
  std::atomic<int64_t> next{0};
  int64_t parts = 0;
  int wanted = 0;   // workers still to join the present work
  int working = 0;  // workers that have joined and not finished
  int workers = 0;

  void take_parts() {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) (*body)(part);
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return wanted > 0; });
      --wanted;
      ++working;
      lock.unlock();
      take_parts();
      lock.lock();
      if (--working == 0) idle.notify_one();
    }
  }

  void run(int64_t count, int threads, const std::function<void(int64_t)>& function) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      body = &function;
      parts = count;
      next = 0;
      wanted = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
      for (; workers < wanted; ++workers) std::thread(&Pool::work, this).detach();
    }
    wake.notify_all();
    take_parts();
    std::unique_lock<std::mutex> lock(mutex);
    wanted = 0;  // who has not come yet finds nothing left
    idle.wait(lock, [&] { return working == 0; });
  }
};

bool forked = false;

// Never destroyed: its threads may outlive the end of main. A forked child has none of them and gets a new one.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    pool = new Pool;
  });
  return new Pool;
}();

// libgomp's entry for a parallel region, which LLVM's and Intel's runtimes have too: function, data, threads, flags.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Job {
  const std::function<void(int64_t)>& body;
  int64_t parts;
  std::atomic<int64_t> next{0};

  static void take_parts(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t part; (part = job.next.fetch_add(1)) < job.parts;) job.body(part);
  }
};

}  // namespace

void run_parts(int64_t parts, int threads, const std::function<void(int64_t)>& body) {
  static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (region && !forked) {
    Job job{body, parts};
    return region(Job::take_parts, &job, static_cast<unsigned>(std::min<int64_t>(threads, parts)), 0);
  }
  Pool& shared = *pool;
  const std::unique_lock<std::mutex> alone(shared.in_use, std::try_to_lock);
  if (alone.owns_lock()) return shared.run(parts, threads, body);
  for (int64_t part = 0; part < parts; ++part) body(part);
}
