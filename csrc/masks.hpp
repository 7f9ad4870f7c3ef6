// What the tokens of a tree see of each other, as dense masks, lists of blocks and lists of paths.
// Everything follows from the ends of the subtrees: token q sees token k iff k <= q <
// subtree_end[k], and with a window only the last `window` of those, itself included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace stepagent {

constexpr std::size_t no_window = std::numeric_limits<std::size_t>::max();

// Throws std::invalid_argument unless the subtrees lie inside each other.
void check_subtree_ends(std::span<const std::int32_t> subtree_end);

// Fills the L x L mask, queries by keys, with one of two values. The functions of this file throw
// as check_subtree_ends does and for a window of 0, this one also where the mask is of another
// size.
template <typename Value>
void fill_mask(std::span<const std::int32_t> subtree_end, std::size_t window, Value visible,
               Value hidden, std::span<Value> mask, std::size_t threads);

// Blocks of queries by blocks of keys, n x n of them, the last ones possibly ragged: for each block
// of queries how many blocks of keys are partial (some pairs visible) or full (all of a whole
// block's), and all n blocks of keys, those first, ascending.
struct BlockLists {
    std::size_t blocks = 0;
    std::vector<std::int32_t> partial_counts, partial_indices, full_counts, full_indices;
};

// O(L + n²): pairs are counted per block, not evaluated. Throws for blocks of 0 too.
BlockLists block_lists(std::span<const std::int32_t> subtree_end, std::size_t window,
                       std::size_t block_size);

// A tree as runs of tokens without a branch inside: segment s is the tokens [offsets[s], [s + 1]),
// parents[s] the segment it goes on from (-1 for none), depths[s] how many lie above it. Its path,
// every token from the root to its end, is path_rows[path_offsets[s], [s + 1]).
struct Segments {
    std::vector<std::int32_t> offsets{0}, parents, depths, path_offsets{0}, path_rows;
};

// Linear in the paths. Throws std::length_error where they outgrow 32-bit indices.
Segments segments(std::span<const std::int32_t> subtree_end);

}  // namespace stepagent
