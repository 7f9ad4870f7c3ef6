// pack_step_pairs: trees that keep their rules, tokens that see their own sequence only, and a
// refusal wherever ids, spans or counts break theirs.
#include <set>

#include "trees.hpp"

namespace {

using fuzz::Row;

struct Pairs {
    fuzz::IdRows trunks, branches;
    std::vector<Row> spans;
    std::vector<std::int64_t> branch_counts;

    bool valid() const {
        if (!trunks.valid || !branches.valid || spans.size() != trunks.rows.size()) return false;
        std::size_t bounds = 0;
        for (std::size_t i = 0; i < spans.size(); ++i) {
            bounds += spans[i].size();
            if (spans[i].size() % 2 != 0 || !in_order(spans[i], trunks.rows[i].size()))
                return false;
        }
        auto left = static_cast<std::int64_t>(branches.rows.size());
        for (const auto count : branch_counts) {
            if (count < 0 || count > left) return false;
            left -= count;
        }
        return left == 0 && 2 * branch_counts.size() == bounds;
    }

    std::vector<stepagent::TokenTree> pack(std::optional<std::int64_t> max_tokens,
                                           std::size_t threads) const {
        const auto trunk_ids = trunks.view(), branch_ids = branches.view();
        const std::vector<std::span<const std::int32_t>> views(spans.begin(), spans.end());
        return stepagent::pack_step_pairs({trunk_ids, views, {}, branch_ids, branch_counts},
                                          max_tokens, threads);
    }

  private:
    static bool in_order(const Row& bounds, std::size_t length) {
        std::int32_t done = 1;
        for (std::size_t t = 0; t < bounds.size(); t += 2) {
            if (bounds[t] < done || bounds[t + 1] <= bounds[t]) return false;
            done = bounds[t + 1];
        }
        return bounds.empty() || std::cmp_less_equal(done, length);
    }
};

void append(Row& values, const Row& more) {
    values.insert(values.end(), more.begin(), more.end());
}

Pairs read_pairs(fuzz::Input& input) {
    Pairs pairs;
    for (auto trunks = input.size(4); trunks > 0; --trunks) {
        const auto steps = input.size(4);
        Row bounds, tokens = steps == 0 ? Row{} : Row{1};
        for (std::size_t t = 0; t < steps; ++t) {
            append(tokens, input.tokens(4));
            bounds.push_back(static_cast<std::int32_t>(tokens.size()));
            tokens.push_back(2);
            append(tokens, input.tokens(3));
            bounds.push_back(static_cast<std::int32_t>(tokens.size()));
            const auto branches = input.size(3);
            for (std::size_t b = 0; b < branches; ++b) pairs.branches.add(input, input.tokens(4));
            pairs.branch_counts.push_back(static_cast<std::int64_t>(branches));
        }
        append(tokens, input.tokens(2));
        pairs.trunks.add(input, tokens);
        pairs.spans.push_back(bounds);
    }
    return pairs;
}

// Any number, or one near those that are right.
std::int64_t other(fuzz::Input& input) {
    const auto kind = input.raw(1);
    return kind < 200 ? static_cast<std::int64_t>(kind % 32) - 4
                      : static_cast<std::int64_t>(input.raw(8));
}

// Changes one thing about the spans or counts, which may still be valid then.
void spoil(fuzz::Input& input, Pairs& pairs) {
    const auto kind = input.raw(1) % 8;
    if (kind == 0) return pairs.spans.emplace_back(), void();
    if (kind == 1) return pairs.branch_counts.push_back(other(input));
    if (kind == 2) return pairs.branches.add(input, {3});
    if (kind == 3 && !pairs.branch_counts.empty()) return pairs.branch_counts.pop_back();
    if (kind == 4 && !pairs.branch_counts.empty()) {
        pairs.branch_counts[input.size(pairs.branch_counts.size() - 1)] = other(input);
        return;
    }
    if (pairs.spans.empty()) return;
    auto& bounds = pairs.spans[input.size(pairs.spans.size() - 1)];
    if (bounds.empty()) return;
    if (kind == 5) return bounds.pop_back();
    bounds[input.size(bounds.size() - 1)] = static_cast<std::int32_t>(other(input));
}

// Walks the steps in order and calls visit(trunk, t, state, actions), the trunk's own action first.
template <typename Visit>
void each_step(const Pairs& pairs, const Visit& visit) {
    std::size_t step = 0, branch = 0;
    for (std::size_t trunk = 0; trunk < pairs.spans.size(); ++trunk) {
        const auto begin = pairs.trunks.rows[trunk].begin();
        for (std::size_t t = 0; 2 * t < pairs.spans[trunk].size(); ++t, ++step) {
            const auto start = begin + pairs.spans[trunk][2 * t];
            std::vector<Row> actions{{start, begin + pairs.spans[trunk][2 * t + 1]}};
            for (auto count = pairs.branch_counts[step]; count > 0; --count) {
                actions.push_back(pairs.branches.rows[branch++]);
            }
            visit(trunk, t, Row(begin, start), actions);
        }
    }
}

// The tokens of each trunk with its branches, each unique one counted once.
std::vector<std::size_t> block_sizes(const Pairs& pairs) {
    std::vector<std::size_t> sizes;
    for (const auto& trunk : pairs.trunks.rows) sizes.push_back(trunk.size());
    each_step(pairs, [&](auto trunk, auto, const Row&, const std::vector<Row>& actions) {
        for (const auto& action : std::set(actions.begin(), actions.end())) {
            if (action != actions[0]) sizes[trunk] += action.size();
        }
    });
    return sizes;
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const auto max_tokens = fuzz::max_tokens(input);
    auto pairs = read_pairs(input);
    if (kind % 4 == 0) spoil(input, pairs);
    const auto packed = fuzz::packed(
        [&](std::size_t threads) { return pairs.pack(max_tokens, threads); }, kind % 16 / 2 == 2);
    const auto sizes =
        pairs.valid() ? fuzz::tree_sizes(block_sizes(pairs), max_tokens) : std::nullopt;
    REQUIRE(sizes.has_value() == packed.refusal.empty());
    if (!sizes) return 0;

    const auto& trees = packed.trees;
    REQUIRE(trees.size() == sizes->size());
    for (std::size_t i = 0; i < trees.size(); ++i) {
        REQUIRE(trees[i].input_ids.size() == (*sizes)[i]);
        fuzz::check_tree(trees[i]);
    }
    std::size_t i = 0, s = 0;  // the tree, and the step in it
    const auto skip_done = [&] {
        for (; i < trees.size() && s == trees[i].step_trunk.size(); ++i) s = 0;
    };
    each_step(pairs, [&](auto trunk, auto t, const Row& state, const std::vector<Row>& actions) {
        for (std::size_t branch = 0; branch < actions.size(); ++branch, ++s) {
            skip_done();
            REQUIRE(i < trees.size());
            fuzz::check_step(trees[i], s, {trunk, t, branch}, state, actions[branch]);
        }
    });
    skip_done();
    REQUIRE(i == trees.size());
    return 0;
}
