// In the place of torch's threads, whose start and end the thread sanitizer cannot see: a thread for each part of the
// work. Two items are enough for two threads, so that the sizes of the tests are shared out.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace sanitized {

template <typename Part>
void parallel_for(int64_t begin, int64_t end, int64_t, const Part& part) {
  const int64_t items = end - begin, parts = items < 3 ? items : 3;
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < parts; ++k)
    threads.emplace_back([=, &part] { part(begin + items * k / parts, begin + items * (k + 1) / parts); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace sanitized
