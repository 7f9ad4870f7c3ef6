// Independent pieces of work over a few threads, with one result however many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace stepagent {

// Threads that are waited for, as std::jthread's are, which Apple's library has only of late.
struct Joined {
    std::vector<std::thread> threads;
    ~Joined() {
        for (auto& thread : threads) thread.join();
    }
};

// Calls work(i) once for each i in [0, count), on the calling thread and up to threads - 1 others.
// Where calls throw, the exception of the lowest i leaves here: indices are handed out in order, so
// all before it have run.
template <typename Work>
void parallel_for(std::size_t count, std::size_t threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::exception_ptr error;
    std::size_t failed = count;
    const auto run = [&] {
        for (auto i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
            try {
                work(i);
            } catch (...) {
                next = count;
                const std::lock_guard lock(mutex);
                if (i < failed) {
                    failed = i;
                    error = std::current_exception();
                }
            }
        }
    };
    {
        Joined others;
        try {
            while (others.threads.size() + 1 < std::min(threads, count)) {
                others.threads.emplace_back(run);
            }
        } catch (const std::system_error&) {  // no more threads to be had: fewer do the work
        }
        run();
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace stepagent
