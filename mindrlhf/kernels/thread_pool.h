// Threads and memory that the operators of this package share among their calls.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace mindrlhf {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that grows, at addresses that vector instructions like.
class Buffer {
 public:
  void* AtLeast(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

// Threads that take numbered pieces of work until none is left. The caller is one of them.
class ThreadPool {
 public:
  explicit ThreadPool(int size) : size_(size) {
    for (int member = 1; member < size; ++member) std::thread([this, member] { Serve(member); }).detach();
  }

  int size() const { return size_; }

  // Calls work(piece, member) for each piece; gives the last status that is not 0.
  int Run(int pieces, const std::function<int(int, int)>& work) {
    if (pieces == 1) return work(0, 0);  // nobody need wake up
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      pieces_ = pieces;
      next_ = 0;
      status_ = 0;
      working_ = size_ - 1;
      ++round_;
    }
    wake_.notify_all();
    TakePieces(0);
    for (int spins = 0; working_.load(std::memory_order_acquire) > 0; ++spins) Pause(spins);
    return status_;
  }

 private:
  static void Pause(int spins) {
    if (spins < kSpins) {
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }

  void TakePieces(int member) {
    for (int piece = next_++; piece < pieces_; piece = next_++) {
      if (int status = (*work_)(piece, member)) status_ = status;
    }
  }

  void Serve(int member) {
    for (uint64_t seen = 0;; ++seen) {
      // The next product is mostly near: waking up takes longer than waiting a little.
      for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) _mm_pause();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
      }
      TakePieces(member);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kSpins = 2000;
  const int size_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<int(int, int)>* work_ = nullptr;
  int pieces_ = 0;
  std::atomic<int> next_{0}, working_{0}, status_{0};
  std::atomic<uint64_t> round_{0};
};

constexpr int kFailed = 1;  // what an operator gives to MindSpore when it fails

inline int thread_count = 1;
inline std::mutex in_use;  // MindSpore may run independent operators at a time; each has all threads anyway

// The one of this process; never destroyed: its threads run until the process ends.
inline ThreadPool& SharedPool() {
  static ThreadPool* pool = new ThreadPool(thread_count);
  return *pool;
}

// Does `work` while no other operator does, and gives 0, or kFailed if it throws.
template <class Work>
int Exclusively(const Work& work) {
  std::lock_guard<std::mutex> lock(in_use);
  try {
    work();
    return 0;
  } catch (const std::exception&) {
    return kFailed;
  }
}

}  // namespace mindrlhf
