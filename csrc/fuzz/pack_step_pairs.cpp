// pack_step_pairs: trees that keep their rules, and tokens that see their own sequence only.
#include <stdexcept>

#include "input.hpp"
#include "tree.hpp"

namespace {

using stepagent::TokenTree;

struct Pairs {
    fuzz::Rows trunks, branches;
    std::vector<std::int64_t> trunk_steps{0}, step_branches{0};
    std::vector<std::int32_t> action_spans;

    stepagent::StepPairs view() const {
        return {trunks.view(), trunk_steps, action_spans, branches.view(), step_branches};
    }
};

void append(std::vector<std::int32_t>& values, const std::vector<std::int32_t>& more) {
    values.insert(values.end(), more.begin(), more.end());
}

Pairs read_pairs(fuzz::Input& input) {
    Pairs pairs;
    for (auto trunks = input.size(4); trunks > 0; --trunks) {
        std::vector<std::int32_t> tokens{1};
        for (auto steps = 1 + input.size(3); steps > 0; --steps) {
            append(tokens, input.tokens(4));
            pairs.action_spans.push_back(static_cast<std::int32_t>(tokens.size()));
            tokens.push_back(2);
            append(tokens, input.tokens(3));
            pairs.action_spans.push_back(static_cast<std::int32_t>(tokens.size()));
            for (auto branches = input.size(3); branches > 0; --branches) {
                pairs.branches.add(input.tokens(4));
            }
            pairs.step_branches.push_back(static_cast<std::int64_t>(pairs.branches.offsets.size()) -
                                          1);
        }
        append(tokens, input.tokens(2));
        pairs.trunks.add(tokens);
        pairs.trunk_steps.push_back(static_cast<std::int64_t>(pairs.step_branches.size()) - 1);
    }
    return pairs;
}

std::size_t at(const std::vector<std::int32_t>& values, std::size_t i) {
    REQUIRE(i < values.size() && values[i] >= 0);
    return static_cast<std::size_t>(values[i]);
}

void check_tree(const TokenTree& tree) {
    const auto length = tree.input_ids.size();
    REQUIRE(tree.position_ids.size() == length && tree.subtree_end.size() == length);
    REQUIRE(tree.label_rows.size() == tree.labels.size());
    REQUIRE(at(tree.step_offsets, tree.step_trunk.size()) == tree.labels.size());
    for (std::size_t q = 0; q < length; ++q) {
        REQUIRE(q < at(tree.subtree_end, q) && at(tree.subtree_end, q) <= length);
        std::size_t seen = 0;
        for (std::size_t k = 0; k < q; ++k) {
            if (at(tree.subtree_end, k) <= q) continue;
            REQUIRE(tree.subtree_end[q] <= tree.subtree_end[k]);  // subtrees are nested
            ++seen;
        }
        REQUIRE(seen == at(tree.position_ids, q));
    }
}

// What a row sees, in order: its path from the root.
std::vector<std::int32_t> path(const TokenTree& tree, std::size_t row) {
    std::vector<std::int32_t> tokens;
    for (std::size_t k = 0; k <= row; ++k) {
        if (row < at(tree.subtree_end, k)) tokens.push_back(tree.input_ids[k]);
    }
    return tokens;
}

// Every scored token of a step is predicted from the state and the action's tokens before it.
void check_step(const TokenTree& tree, std::size_t s, const Pairs& pairs) {
    const auto view = pairs.view();
    const auto trunk = at(tree.step_trunk, s);
    const auto step = static_cast<std::size_t>(pairs.trunk_steps[trunk]) + at(tree.step_index, s);
    const auto start = at(pairs.action_spans, 2 * step);
    const auto state = view.trunks[trunk].first(start);
    const auto branch = at(tree.step_branch, s);
    const auto action =
        branch == 0
            ? view.trunks[trunk].subspan(start, at(pairs.action_spans, 2 * step + 1) - start)
            : view.branches[static_cast<std::size_t>(pairs.step_branches[step]) + branch - 1];
    std::vector<std::int32_t> expected(state.begin(), state.end());
    const auto first = at(tree.step_offsets, s);
    REQUIRE(at(tree.step_offsets, s + 1) - first == action.size());
    for (std::size_t i = 0; i < action.size(); ++i) {
        REQUIRE(tree.labels[first + i] == action[i]);
        REQUIRE(path(tree, at(tree.label_rows, first + i)) == expected);
        expected.push_back(action[i]);
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto max_tokens = input.integer(1, 120);
    const auto pairs = read_pairs(input);
    std::vector<TokenTree> trees;
    try {
        trees = stepagent::pack_step_pairs(pairs.view(), max_tokens);
    } catch (const std::invalid_argument&) {
        return 0;  // a trunk with its branches exceeds max_tokens
    }
    std::size_t steps = 0;
    for (const auto& tree : trees) {
        REQUIRE(tree.input_ids.size() <= static_cast<std::size_t>(max_tokens));
        check_tree(tree);
        for (std::size_t s = 0; s < tree.step_trunk.size(); ++s) check_step(tree, s, pairs);
        steps += tree.step_trunk.size();
    }
    REQUIRE(steps == pairs.step_branches.size() - 1 + pairs.branches.view().size());
    return 0;
}
