// EditDistance against the plain table where that is small, else against what a metric must be.
#include "edit_distance.hpp"

#include <limits>

#include "input.hpp"

namespace {

using Tokens = std::vector<std::int32_t>;

std::int64_t table_distance(const Tokens& a, const Tokens& b) {
    std::vector<std::int64_t> row(b.size() + 1);
    for (std::size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<std::int64_t>(j);
    for (std::size_t i = 0; i < a.size(); ++i) {
        auto diagonal = row[0]++;
        for (std::size_t j = 0; j < b.size(); ++j) {
            const auto pair = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = std::min({pair, row[j + 1] + 1, row[j] + 1});
        }
    }
    return row[b.size()];
}

// A copy of `tokens`, repeated, with a few edits: long and similar, from few bytes.
Tokens edited(fuzz::Input& input, const Tokens& tokens) {
    Tokens result;
    for (auto repeats = input.size(20); repeats > 0 && result.size() < 1500; --repeats) {
        result.insert(result.end(), tokens.begin(), tokens.end());
    }
    for (auto edits = input.size(12); edits > 0 && !result.empty(); --edits) {
        const auto at = input.size(result.size() - 1);
        if (input.raw(1) % 2 == 0) {
            result.erase(result.begin() + static_cast<std::ptrdiff_t>(at));
        } else {
            result[at] = static_cast<std::int32_t>(input.raw(1));
        }
    }
    return result;
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    auto a = input.tokens(200, kind % 2 == 1);
    auto b = kind % 4 < 2 ? input.tokens(200, kind % 2 == 1) : edited(input, a);
    if (kind % 8 == 7) a = edited(input, a);
    const auto c = input.tokens(20, kind % 2 == 1);
    const auto cutoff = input.integer(0, kind % 3 == 0 ? 10 : 2000);

    stepagent::EditDistance edit_distance;
    constexpr auto none = std::numeric_limits<std::int64_t>::max() - 1;
    const auto distance = edit_distance(a, b, none);
    const auto longer = static_cast<std::int64_t>(std::max(a.size(), b.size()));
    const auto shorter = static_cast<std::int64_t>(std::min(a.size(), b.size()));
    REQUIRE(longer - shorter <= distance && distance <= longer);
    REQUIRE((distance == 0) == (a == b));
    REQUIRE(edit_distance(b, a, none) == distance);
    REQUIRE(edit_distance(a, b, cutoff) == std::min(distance, cutoff + 1));
    if (distance > 0) REQUIRE(edit_distance(a, b, distance - 1) == distance);
    REQUIRE(edit_distance(a, b, distance) == distance);
    REQUIRE(distance <= edit_distance(a, c, none) + edit_distance(c, b, none));
    if (a.size() * b.size() <= 20000) REQUIRE(table_distance(a, b) == distance);
    return 0;
}
