// Items into bins under a budget, and items over parts of equal cost.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace stepagent {

// Item indices by group: group i is items[offsets[i], offsets[i + 1]).
struct Groups {
    std::vector<std::int64_t> items, offsets{0};
};

// Best-fit decreasing: the longest item first, each into the fullest bin that still takes it, bins
// in the order in which they were opened, items as they came in. O(n log n). Throws
// std::invalid_argument for a length outside [1, capacity].
Groups pack_bins(std::span<const std::int64_t> lengths, std::int64_t capacity);

// Largest differencing method of Karmarkar and Karp (1982), k-way: partial partitions, one per item
// at first, are combined in the order of their spread, the largest sums of one with the smallest of
// the other. With equal_size, partial partitions start with one item in every part, so that sizes
// differ by one at most. O(n k log k) at most. Parts have the largest sum first, items ascending.
// Throws std::invalid_argument for a cost that is negative or not finite, as their sum must be, and
// for fewer items than parts.
Groups balance(std::span<const double> costs, std::size_t parts, bool equal_size);

}  // namespace stepagent
