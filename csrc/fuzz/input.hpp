// What the fuzz targets share: values read from the fuzzer's bytes, and checks that end the run.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "alignment.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

#define REQUIRE(condition)                                                                \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                 \
        }                                                                                 \
    } while (false)

// Reads values off the front; past the end, all are the least of their range.
class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}

    bool empty() const { return bytes_.empty(); }

    std::uint64_t raw(std::size_t count) {
        std::uint64_t value = 0;
        for (; count > 0 && !bytes_.empty(); --count, bytes_ = bytes_.subspan(1)) {
            value = value << 8 | bytes_.front();
        }
        return value;
    }
    // In [low, high].
    std::int64_t integer(std::int64_t low, std::int64_t high) {
        const auto width = static_cast<std::uint64_t>(high - low);
        return low + static_cast<std::int64_t>(raw(width < 256 ? 1 : 8) % (width + 1));
    }
    std::size_t size(std::size_t high) {
        return static_cast<std::size_t>(integer(0, static_cast<std::int64_t>(high)));
    }
    // Few different tokens, or any at all.
    std::vector<std::int32_t> tokens(std::size_t max_size, bool any = false) {
        std::vector<std::int32_t> result(size(max_size));
        for (auto& token : result) {
            token = any ? static_cast<std::int32_t>(raw(4)) : static_cast<std::int32_t>(raw(1) % 4);
        }
        return result;
    }

  private:
    std::span<const std::uint8_t> bytes_;
};

// Rows laid end to end, which a Ragged looks at.
struct Rows {
    std::vector<std::int32_t> values;
    std::vector<std::int64_t> offsets{0};

    void add(const std::vector<std::int32_t>& row) {
        values.insert(values.end(), row.begin(), row.end());
        offsets.push_back(static_cast<std::int64_t>(values.size()));
    }
    stepagent::Ragged view() const { return {values, offsets}; }
};

}  // namespace fuzz
