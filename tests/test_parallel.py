"""The pool of threads behind the CPU kernels: every part once, many callers, forks, exits."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from quantize_truth import same
from torch import Tensor

import pyft

ROOT = Path(__file__).parents[1]

PROGRAM = r"""
#include <stdio.h>

#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

static int wrong = 0;

// Each item of [0, n) exactly once, parts in order and not below the grain.
static void covers(int64_t n, int64_t grain, int threads) {
  std::vector<std::atomic<int>> seen(n);
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    if (n && (begin >= end || begin % grain || (end % grain && end != n))) seen[begin] += 100;
    for (int64_t i = begin; i < end; ++i) ++seen[i];
  });
  for (auto& count : seen) wrong += count != 1;
}

static int64_t sum(int threads) {
  std::vector<int64_t> parts(64);
  run_parts(64, threads, [&](int64_t part) {
    for (int64_t i = 0; i < 2000; ++i) parts[part] += i ^ part;
  });
  int64_t total = 0;
  for (int64_t value : parts) total += value;
  return total;
}

int main() {
  for (int threads : {1, 2, 3, 7}) {
    for (int64_t n : {0, 1, 5, 64, 65, 1000}) {
      for (int64_t grain : {1, 3, 64, 5000}) covers(n, grain, threads);
    }
  }
  const int64_t expected = sum(1);
  for (int i = 0; i < 300; ++i) wrong += sum(1 + i % 5) != expected;
  std::atomic<int> differing{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) differing += sum(3) != expected;
    });
  }
  for (auto& caller : callers) caller.join();
  run_parts(8, 4, [&](int64_t) { differing += sum(4) != expected; });  // inside the pool's work
  wrong += differing;
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_pool_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    source, binary = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    flags = ["-O1", "-g", "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}"]
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    files = [str(source), str(ROOT / "csrc" / "cpu" / "parallel.cpp")]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *sanitize, *files, "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert (done.stdout, done.returncode) == ("0 wrong\n", 0)


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """A process of its own on two threads; killed when it hangs."""
    start = f"import torch, pyft\ntorch.set_num_threads(2)\n{script}"
    return subprocess.run(
        [sys.executable, "-c", start], cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


FORK = """
import os, sys, threading
w = torch.randn(512, 1024)
before = pyft.quantize(w)
stop = threading.Event()
def busy():
    while not stop.is_set():
        pyft.quantize(w)
threads = [threading.Thread(target=busy) for _ in range(BUSY)]
for thread in threads: thread.start()
failed = 0
for _ in range(5):
    child = os.fork()
    if child == 0:
        for _ in range(3):
            again = pyft.quantize(w)
            for found, expected in zip(again.parts(), before.parts(), strict=True):
                if found.numpy().tobytes() != expected.numpy().tobytes(): os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
stop.set()
for thread in threads: thread.join()
after = pyft.quantize(w)
assert all(map(torch.equal, after.parts(), before.parts()))
print("failed", failed)
"""


@pytest.mark.parametrize("busy", [0, 2])
def test_fork_after_the_pool_has_started(busy: int) -> None:
    """As data loaders do; also while threads are at work for other callers. torch's own parallel
    functions hang in such a child (OpenMP's threads are not in it): nothing is compared with them.
    """
    done = run_script(FORK.replace("BUSY", str(busy)))
    assert (done.stdout, done.returncode) == ("failed 0\n", 0), done.stderr[-500:]


EXITS = {
    "sys.exit": "import sys; sys.exit(0)",
    "after threads": """
import threading
def work(): pyft.quantize(torch.randn(512, 1024))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_process_ends(how: str) -> None:
    done = run_script(f"pyft.quantize(torch.randn(512, 1024))\n{EXITS[how]}")
    assert (done.returncode, done.stderr) == (0, "")


def test_many_threads_call_kernels_at_once() -> None:
    torch.set_num_threads(3)
    weights = [torch.randn(300 + 20 * i, 1024) for i in range(4)]
    expected = [(pyft.quantize(w), pyft.quantize(w).dequantize()) for w in weights]
    inputs = torch.randn(3, 1024)
    products = [torch.nn.functional.linear(inputs, q) for q, _ in expected]
    wrong: list[int] = []

    def right(i: int, w: Tensor) -> bool:
        q, (wanted, decoded) = pyft.quantize(w), expected[i]
        y = torch.nn.functional.linear(inputs, q)
        stored = all(map(torch.equal, q.parts(), wanted.parts()))
        return stored and same(q.dequantize(), decoded) and same(y, products[i])

    def work(i: int) -> None:
        wrong.extend(i for _ in range(10) if not right(i, weights[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_more_threads_than_work_or_processors(threads: int) -> None:
    w = torch.randn(70, 1000)
    expected = pyft.quantize(w).parts()
    torch.set_num_threads(threads)
    assert all(map(torch.equal, pyft.quantize(w).parts(), expected))
    assert pyft.quantize(w[:1, :1]).numel() == 1
