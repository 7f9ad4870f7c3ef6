// What the targets of trees share: ids as callers hold them, one result whatever the threads, and
// the rules of a tree.
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>

#include "input.hpp"
#include "tree.hpp"

namespace fuzz {

using stepagent::TokenTree;
using Row = std::vector<std::int32_t>;

// Rows of ids of any width, now and then with one of any value: `valid` says whether all are ids.
class IdRows {
  public:
    std::vector<Row> rows;  // what the core is to see
    bool valid = true;

    void add(Input& input, const Row& row) {
        const auto kind = input.raw(1);
        switch (kind % 4) {
            case 0:
                return add_as<std::int64_t>(input, row, kind % 64 == 60);
            case 1:
                return add_as<std::uint64_t>(input, row, kind % 64 == 60);
            default:
                return add_as<std::int32_t>(input, row, kind % 64 == 60);
        }
    }
    std::vector<stepagent::AnyIds> view() const {
        std::vector<stepagent::AnyIds> result;
        for (const auto& row : held_) {
            std::visit([&](const auto& ids) { result.emplace_back(std::span(ids)); }, row);
        }
        return result;
    }

  private:
    template <typename Id>
    void add_as(Input& input, const Row& row, bool any) {
        std::vector<Id> ids(row.begin(), row.end());
        rows.push_back(row);
        if (any && !ids.empty()) {
            const auto at = input.size(ids.size() - 1);
            ids[at] = static_cast<Id>(input.raw(8));
            valid &= std::in_range<std::int32_t>(ids[at]) && std::cmp_greater_equal(ids[at], 0);
            rows.back()[at] = static_cast<std::int32_t>(ids[at]);
        }
        held_.emplace_back(std::move(ids));
    }

    std::vector<std::variant<Row, std::vector<std::int64_t>, std::vector<std::uint64_t>>> held_;
};

// Mostly a limit that some trees would break; none, or any number at all.
inline std::optional<std::int64_t> max_tokens(Input& input) {
    const auto kind = input.raw(1);
    if (kind == 255) return static_cast<std::int64_t>(input.raw(8));
    if (kind > 128) return std::nullopt;
    return static_cast<std::int64_t>(kind);
}

// The tokens of each tree: blocks in order, each into the last tree while it fits. None where a
// block fits into no tree.
inline std::optional<std::vector<std::size_t>> tree_sizes(const std::vector<std::size_t>& blocks,
                                                          std::optional<std::int64_t> limit) {
    constexpr auto largest = std::numeric_limits<std::int32_t>::max();
    const auto max = limit.value_or(largest);
    if (max < 1 || max > largest) return std::nullopt;
    std::vector<std::size_t> sizes;
    for (const auto block : blocks) {
        if (std::cmp_greater(block, max)) return std::nullopt;
        if (sizes.empty() || std::cmp_greater(sizes.back() + block, max)) sizes.push_back(0);
        sizes.back() += block;
    }
    return sizes;
}

inline auto arrays(const TokenTree& tree) {
    return std::tie(tree.input_ids, tree.position_ids, tree.subtree_end, tree.labels,
                    tree.label_rows, tree.step_offsets, tree.step_trunk, tree.step_index,
                    tree.step_branch);
}

struct Packed {
    std::vector<TokenTree> trees;
    std::string refusal;

    bool operator==(const Packed& other) const {
        return refusal == other.refusal &&
               std::equal(trees.begin(), trees.end(), other.trees.begin(), other.trees.end(),
                          [](const auto& a, const auto& b) { return arrays(a) == arrays(b); });
    }
};

// pack(threads) on one thread, which more of them must equal, to the word where they refuse.
template <typename Pack>
Packed packed(const Pack& pack, bool on_more) {
    const auto on = [&](std::size_t threads) -> Packed {
        try {
            return {pack(threads), ""};
        } catch (const std::invalid_argument& error) {
            return {{}, error.what()};
        }
    };
    const auto result = on(1);
    if (on_more) REQUIRE(on(0) == result && on(2) == result && on(5) == result);
    return result;
}

inline std::size_t at(const Row& values, std::size_t i) {
    REQUIRE(i < values.size() && values[i] >= 0);
    return static_cast<std::size_t>(values[i]);
}

// Subtrees lie inside each other, and positions count what a token sees.
inline void check_nested(const Row& position_ids, const Row& subtree_end) {
    const auto length = subtree_end.size();
    REQUIRE(position_ids.size() == length);
    for (std::size_t q = 0; q < length; ++q) {
        REQUIRE(q < at(subtree_end, q) && at(subtree_end, q) <= length);
        std::size_t seen = 0;
        for (std::size_t k = 0; k < q; ++k) {
            if (at(subtree_end, k) <= q) continue;
            REQUIRE(subtree_end[q] <= subtree_end[k]);
            ++seen;
        }
        REQUIRE(seen == at(position_ids, q));
    }
}

inline void check_tree(const TokenTree& tree) {
    check_nested(tree.position_ids, tree.subtree_end);
    REQUIRE(tree.input_ids.size() == tree.subtree_end.size());
    REQUIRE(tree.label_rows.size() == tree.labels.size());
    const auto steps = tree.step_trunk.size();
    REQUIRE(tree.step_index.size() == steps && tree.step_branch.size() == steps);
    REQUIRE(tree.step_offsets.size() == steps + 1 && tree.step_offsets[0] == 0);
    REQUIRE(at(tree.step_offsets, steps) == tree.labels.size());
}

// What a row sees, in order: its path from the root.
inline Row path(const Row& input_ids, const Row& subtree_end, std::size_t row) {
    REQUIRE(row < input_ids.size());
    Row tokens;
    for (std::size_t k = 0; k <= row; ++k) {
        if (row < at(subtree_end, k)) tokens.push_back(input_ids[k]);
    }
    return tokens;
}

// Step s is this one, and each of its tokens, which follow `state`, is predicted from exactly those
// before it.
inline void check_step(const TokenTree& tree, std::size_t s, const std::array<std::size_t, 3>& step,
                       Row state, std::span<const std::int32_t> tokens) {
    REQUIRE(s < tree.step_trunk.size());
    REQUIRE((std::array{at(tree.step_trunk, s), at(tree.step_index, s), at(tree.step_branch, s)} ==
             step));
    const auto first = at(tree.step_offsets, s);
    REQUIRE(at(tree.step_offsets, s + 1) - first == tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        REQUIRE(tree.labels[first + i] == tokens[i]);
        REQUIRE(path(tree.input_ids, tree.subtree_end, at(tree.label_rows, first + i)) == state);
        state.push_back(tokens[i]);
    }
}

}  // namespace fuzz
