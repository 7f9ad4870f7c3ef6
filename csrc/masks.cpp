#include "masks.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.hpp"
#include "tree.hpp"

namespace stepagent {
namespace {

using Ends = std::span<const std::int32_t>;

std::size_t end_of(Ends ends, std::size_t k) {
    return static_cast<std::size_t>(ends[k]);
}

// Walks the tokens in order and says what changes in what they see. The path holds the tokens from
// the root to the current one; every token enters and leaves it, and the window, once.
class Sight {
  public:
    Sight(Ends ends, std::size_t window) : ends_(ends), window_(window) {}

    // Goes on to the next token: hide(k) for what it no longer sees, show(k) for what it now does.
    template <typename Hide, typename Show>
    void advance(const Hide& hide, const Show& show) {
        const auto q = next_++;
        auto kept = path_.size();
        while (kept > 0 && end_of(ends_, path_[kept - 1]) <= q) --kept;
        const auto was_first = first_visible(path_.size());
        const auto first = first_visible(kept + 1);
        for (auto d = std::max(kept, was_first); d < path_.size(); ++d) hide(path_[d]);
        for (auto d = was_first; d < std::min(kept, first); ++d) hide(path_[d]);
        for (auto d = first; d < std::min(kept, was_first); ++d) show(path_[d]);
        path_.resize(kept);
        path_.push_back(q);
        show(q);
    }

  private:
    // The first depth that the last token of a path of `size` sees.
    std::size_t first_visible(std::size_t size) const {
        return size > window_ ? size - window_ : 0;
    }

    const Ends ends_;
    const std::size_t window_;
    std::size_t next_ = 0;
    std::vector<std::size_t> path_;
};

void check_window(std::size_t window) {
    if (window < 1) throw std::invalid_argument("window must be at least 1, got 0");
}

// Rows [first, last) of the mask: each is the one before it with what changes.
template <typename Value>
void fill_rows(Ends ends, std::size_t window, Value visible, Value hidden, Value* mask,
               std::size_t first, std::size_t last) {
    const auto length = ends.size();
    auto* row = mask + first * length;
    const auto hide = [&](std::size_t k) { row[k] = hidden; };
    const auto show = [&](std::size_t k) { row[k] = visible; };
    Sight sight(ends, window);
    std::fill_n(row, length, hidden);
    for (std::size_t q = 0; q <= first; ++q) sight.advance(hide, show);
    for (auto q = first + 1; q < last; ++q) {
        std::memcpy(row + length, row, length * sizeof(Value));
        row += length;
        sight.advance(hide, show);
    }
}

// Lists a row of blocks: those of the kind first, then the others, both ascending.
void append_list(const std::vector<bool>& is_kind, std::vector<std::int32_t>& counts,
                 std::vector<std::int32_t>& indices) {
    for (const bool kind : {true, false}) {
        for (std::size_t j = 0; j < is_kind.size(); ++j) {
            if (is_kind[j] == kind) indices.push_back(static_cast<std::int32_t>(j));
        }
    }
    counts.push_back(static_cast<std::int32_t>(std::count(is_kind.begin(), is_kind.end(), true)));
}

}  // namespace

void check_subtree_ends(Ends ends) {
    std::vector<std::int32_t> open;  // ends of the subtrees around the token
    for (std::size_t k = 0; k < ends.size(); ++k) {
        while (!open.empty() && static_cast<std::size_t>(open.back()) <= k) open.pop_back();
        const auto limit = open.empty() ? index32(ends.size()) : open.back();
        if (ends[k] <= static_cast<std::int32_t>(k) || ends[k] > limit) {
            throw std::invalid_argument(place("subtree_end", k) + " must lie in (" +
                                        std::to_string(k) + ", " + std::to_string(limit) +
                                        "], inside the subtree around it, got " +
                                        std::to_string(ends[k]));
        }
        open.push_back(ends[k]);
    }
}

template <typename Value>
void fill_mask(Ends ends, std::size_t window, Value visible, Value hidden, std::span<Value> mask,
               std::size_t threads) {
    check_subtree_ends(ends);
    check_window(window);
    const auto length = ends.size();
    if (mask.size() != length * length) {
        throw std::invalid_argument("the mask must have " + std::to_string(length) +
                                    "² entries, got " + std::to_string(mask.size()));
    }
    const auto rows = length / std::max<std::size_t>(1, threads) + 1;
    parallel_for((length + rows - 1) / rows, threads, [&](std::size_t part) {
        fill_rows(ends, window, visible, hidden, mask.data(), part * rows,
                  std::min(length, (part + 1) * rows));
    });
}

template void fill_mask(Ends, std::size_t, std::uint8_t, std::uint8_t, std::span<std::uint8_t>,
                        std::size_t);
template void fill_mask(Ends, std::size_t, std::uint16_t, std::uint16_t, std::span<std::uint16_t>,
                        std::size_t);
template void fill_mask(Ends, std::size_t, std::uint32_t, std::uint32_t, std::span<std::uint32_t>,
                        std::size_t);
template void fill_mask(Ends, std::size_t, std::uint64_t, std::uint64_t, std::span<std::uint64_t>,
                        std::size_t);

BlockLists block_lists(Ends ends, std::size_t window, std::size_t block_size) {
    check_subtree_ends(ends);
    check_window(window);
    if (block_size < 1) throw std::invalid_argument("block_size must be at least 1, got 0");
    // Larger ones make the same one ragged block, but sums and squares of them overflow.
    block_size = std::min(block_size, ends.size() + 1);
    BlockLists lists;
    lists.blocks = (ends.size() + block_size - 1) / block_size;
    std::vector<std::size_t> seen(lists.blocks), pairs(lists.blocks);
    std::vector<bool> is_partial(lists.blocks), is_full(lists.blocks);
    Sight sight(ends, window);
    for (std::size_t first = 0; first < ends.size(); first += block_size) {
        const auto last = std::min(ends.size(), first + block_size);
        // seen[j]: keys of block j that the current query sees; pairs[j]: their sum over the
        // queries of this block, to which a change at q counts for q and all after it.
        for (std::size_t j = 0; j < lists.blocks; ++j) pairs[j] = seen[j] * (last - first);
        for (auto q = first; q < last; ++q) {
            sight.advance(
                [&](std::size_t k) {
                    seen[k / block_size] -= 1;
                    pairs[k / block_size] -= last - q;
                },
                [&](std::size_t k) {
                    seen[k / block_size] += 1;
                    pairs[k / block_size] += last - q;
                });
        }
        for (std::size_t j = 0; j < lists.blocks; ++j) {
            is_full[j] = pairs[j] == block_size * block_size;
            is_partial[j] = pairs[j] != 0 && !is_full[j];
        }
        append_list(is_partial, lists.partial_counts, lists.partial_indices);
        append_list(is_full, lists.full_counts, lists.full_indices);
    }
    return lists;
}

Segments segments(Ends ends) {
    check_subtree_ends(ends);
    Segments result;
    std::vector<std::size_t> open;  // the segments from the root to the current one
    for (std::size_t first = 0; first < ends.size();) {
        // A token that follows another with the same end is its only child.
        auto last = first + 1;
        while (last < ends.size() && ends[last] == ends[last - 1]) ++last;
        while (!open.empty() &&
               end_of(ends, static_cast<std::size_t>(result.offsets[open.back()])) <= first) {
            open.pop_back();
        }
        result.parents.push_back(open.empty() ? -1 : index32(open.back()));
        result.depths.push_back(index32(open.size()));
        const auto above =
            open.empty() ? 0 : static_cast<std::size_t>(result.path_offsets[open.back()]);
        const auto above_end =
            open.empty() ? 0 : static_cast<std::size_t>(result.path_offsets[open.back() + 1]);
        const auto size = result.path_rows.size();
        result.path_offsets.push_back(index32(size + above_end - above + last - first));
        for (auto i = above; i < above_end; ++i) result.path_rows.push_back(result.path_rows[i]);
        for (auto q = first; q < last; ++q)
            result.path_rows.push_back(static_cast<std::int32_t>(q));
        open.push_back(result.offsets.size() - 1);
        result.offsets.push_back(index32(last));
        first = last;
    }
    return result;
}

}  // namespace stepagent
