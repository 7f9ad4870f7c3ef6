// fill_mask, block_lists and segments against the rule, entry by entry, on trees and on hostile
// ends of subtrees.
#include "masks.hpp"

#include <optional>
#include <stdexcept>
#include <utility>

#include "input.hpp"

namespace {

using Ends = std::vector<std::int32_t>;
using Table = std::vector<std::vector<bool>>;

// Mostly nested; hostile ones may end anywhere.
Ends read_ends(fuzz::Input& input, bool hostile) {
    Ends ends(input.size(40));
    const auto length = static_cast<std::int32_t>(ends.size());
    for (std::int32_t k = 0; k < length; ++k) {
        auto limit = length;
        for (std::int32_t j = 0; j < k; ++j) {
            const auto end = ends[static_cast<std::size_t>(j)];
            if (end > k) limit = std::min(limit, end);
        }
        const auto kind = input.raw(1);
        ends[static_cast<std::size_t>(k)] =
            hostile && kind == 255  ? static_cast<std::int32_t>(input.raw(4))
            : hostile && kind > 240 ? k + static_cast<std::int32_t>(kind) - 248
            : kind < 128            ? limit
                                    : k + 1 + static_cast<std::int32_t>(kind) % (limit - k);
    }
    return ends;
}

bool nested(const Ends& ends) {
    const auto length = static_cast<std::int64_t>(ends.size());
    for (std::int64_t k = 0; k < length; ++k) {
        const auto end = ends[static_cast<std::size_t>(k)];
        if (end <= k || end > length) return false;
        for (std::int64_t j = 0; j < k; ++j) {
            const auto around = ends[static_cast<std::size_t>(j)];
            if (around > k && end > around) return false;
        }
    }
    return true;
}

// The path of each token: what it sees without a window, itself last.
std::vector<Ends> paths(const Ends& ends) {
    std::vector<Ends> result(ends.size());
    for (std::size_t q = 0; q < ends.size(); ++q) {
        for (std::size_t k = 0; k <= q; ++k) {
            if (std::cmp_less(q, ends[k])) result[q].push_back(static_cast<std::int32_t>(k));
        }
    }
    return result;
}

Table visible(const Ends& ends, std::size_t window) {
    Table result(ends.size(), std::vector<bool>(ends.size()));
    const auto all = paths(ends);
    for (std::size_t q = 0; q < ends.size(); ++q) {
        for (std::size_t d = all[q].size() - std::min(window, all[q].size()); d < all[q].size();
             ++d) {
            result[q][static_cast<std::size_t>(all[q][d])] = true;
        }
    }
    return result;
}

// The result of a call, or none where it refuses.
template <typename Call>
auto result_of(const Call& call) -> std::optional<decltype(call())> {
    try {
        return call();
    } catch (const std::invalid_argument&) {
        return std::nullopt;
    }
}

template <typename Value>
void check_mask(fuzz::Input& input, const Ends& ends, std::size_t window, bool valid) {
    const auto kind = input.raw(1);
    const auto length = ends.size();
    const auto threads = kind % 16 == 5 ? static_cast<std::size_t>(kind / 16) % 8 : 1;
    const auto shown = static_cast<Value>(input.raw(8)), hidden = static_cast<Value>(~shown);
    std::vector<Value> mask(kind == 2 ? input.size(2 * length * length) : length * length,
                            static_cast<Value>(shown + 1));
    valid &= mask.size() == length * length;
    const auto filled = result_of([&] {
        stepagent::fill_mask<Value>(ends, window, shown, hidden, mask, threads);
        return true;
    });
    REQUIRE(filled.has_value() == valid);
    if (!filled) return;
    const auto expected = visible(ends, window);
    for (std::size_t q = 0; q < length; ++q) {
        for (std::size_t k = 0; k < length; ++k) {
            REQUIRE(mask[q * length + k] == (expected[q][k] ? shown : hidden));
        }
    }
}

// A row of the lists: the blocks of the kind first, then the others, both ascending.
void check_list(const Ends& counts, const Ends& indices, std::size_t i,
                const std::vector<bool>& is_kind) {
    Ends expected;
    for (const bool kind : {true, false}) {
        for (std::size_t j = 0; j < is_kind.size(); ++j) {
            if (is_kind[j] == kind) expected.push_back(static_cast<std::int32_t>(j));
        }
    }
    const auto row = indices.begin() + static_cast<std::ptrdiff_t>(i * is_kind.size());
    REQUIRE(std::equal(expected.begin(), expected.end(), row));
    REQUIRE(counts[i] == std::count(is_kind.begin(), is_kind.end(), true));
}

void check_blocks(const Ends& ends, std::size_t window, std::size_t size, bool valid) {
    const auto lists = result_of([&] { return stepagent::block_lists(ends, window, size); });
    REQUIRE(lists.has_value() == (valid && size > 0));
    if (!lists) return;
    const auto length = ends.size();
    std::size_t blocks = 0;
    for (std::size_t q = 0; q < length; ++q) blocks += q % size == 0;
    REQUIRE(lists->blocks == blocks);
    for (const auto* counts : {&lists->partial_counts, &lists->full_counts}) {
        REQUIRE(counts->size() == blocks);
    }
    for (const auto* indices : {&lists->partial_indices, &lists->full_indices}) {
        REQUIRE(indices->size() == blocks * blocks);
    }
    std::vector<std::size_t> pairs(blocks * blocks);
    const auto table = visible(ends, window);
    for (std::size_t q = 0; q < length; ++q) {
        for (std::size_t k = 0; k < length; ++k) {
            pairs[q / size * blocks + k / size] += table[q][k];
        }
    }
    for (std::size_t i = 0; i < blocks; ++i) {
        std::vector<bool> partial(blocks), full(blocks);
        for (std::size_t j = 0; j < blocks; ++j) {
            const auto count = pairs[i * blocks + j];
            // A block of more than the length is never whole, nor can its square be counted.
            full[j] = size <= length && count == size * size;
            partial[j] = count > 0 && !full[j];
        }
        check_list(lists->partial_counts, lists->partial_indices, i, partial);
        check_list(lists->full_counts, lists->full_indices, i, full);
    }
}

void check_segments(const Ends& ends, bool valid) {
    const auto segments = result_of([&] { return stepagent::segments(ends); });
    REQUIRE(segments.has_value() == valid);
    if (!segments) return;
    const auto all = paths(ends);
    stepagent::Segments expected;
    const auto parent = [&](std::size_t q) {
        return all[q].size() == 1 ? q : static_cast<std::size_t>(all[q][all[q].size() - 2]);
    };
    std::vector<int> children(ends.size());
    for (std::size_t q = 0; q < ends.size(); ++q) children[parent(q)] += parent(q) != q;
    std::vector<std::int32_t> segment_of;
    for (std::size_t q = 0; q < ends.size(); ++q) {
        const bool root = parent(q) == q;
        if (root || children[parent(q)] > 1) {  // else it goes on from the token before it
            const auto above = root ? -1 : segment_of[parent(q)];
            expected.parents.push_back(above);
            expected.depths.push_back(root ? 0
                                           : expected.depths[static_cast<std::size_t>(above)] + 1);
            expected.offsets.push_back(0);
            expected.path_offsets.push_back(0);
        }
        segment_of.push_back(static_cast<std::int32_t>(expected.parents.size()) - 1);
        expected.offsets.back() = static_cast<std::int32_t>(q) + 1;
    }
    for (std::size_t s = 0; s < expected.parents.size(); ++s) {
        const auto& path = all[static_cast<std::size_t>(expected.offsets[s + 1]) - 1];
        expected.path_rows.insert(expected.path_rows.end(), path.begin(), path.end());
        expected.path_offsets[s + 1] = static_cast<std::int32_t>(expected.path_rows.size());
    }
    REQUIRE(segments->offsets == expected.offsets && segments->parents == expected.parents);
    REQUIRE(segments->depths == expected.depths && segments->path_rows == expected.path_rows);
    REQUIRE(segments->path_offsets == expected.path_offsets);
}

// Mostly small, at times any number, or none.
std::size_t extent(fuzz::Input& input, std::size_t none) {
    const auto kind = input.raw(1);
    return kind > 250 ? input.raw(8) : kind > 180 ? none : kind % 12;
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const auto window = extent(input, stepagent::no_window);
    const auto block_size = extent(input, 16);
    const auto ends = read_ends(input, kind % 4 == 0);
    const bool valid = nested(ends);
    const auto check = kind % 8 < 2   ? check_mask<std::uint8_t>
                       : kind % 8 < 4 ? check_mask<std::uint16_t>
                       : kind % 8 < 6 ? check_mask<std::uint32_t>
                                      : check_mask<std::uint64_t>;
    check(input, ends, window, valid && window > 0);
    check_blocks(ends, window, block_size, valid && window > 0);
    check_segments(ends, valid);
    return 0;
}
