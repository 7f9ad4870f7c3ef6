#include "tree.hpp"

#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

namespace stepagent {
namespace {

using Tokens = std::span<const std::int32_t>;

std::int32_t index32(std::size_t value) {
    if (value > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw std::length_error("a token tree of " + std::to_string(value) +
                                " entries exceeds 32-bit indices: set a smaller max_tokens");
    }
    return static_cast<std::int32_t>(value);
}

std::size_t at(std::span<const std::int64_t> offsets, std::size_t i) {
    return static_cast<std::size_t>(offsets[i]);
}

struct Action {
    std::size_t start;
    Tokens tokens;
};

Action own_action(const StepPairs& pairs, std::size_t trunk, std::size_t step) {
    const auto start = static_cast<std::size_t>(pairs.action_spans[2 * step]);
    const auto end = static_cast<std::size_t>(pairs.action_spans[2 * step + 1]);
    return {start, pairs.trunks[trunk].subspan(start, end - start)};
}

// A branch's original: the first branch of its step with the same tokens, or the trunk's own
// action.
constexpr std::size_t own = std::numeric_limits<std::size_t>::max();

std::string_view bytes(Tokens tokens) {
    return {reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()};
}

std::vector<std::size_t> find_originals(const StepPairs& pairs) {
    std::vector<std::size_t> originals(pairs.branches.size());
    std::unordered_map<std::string_view, std::size_t> seen;
    for (std::size_t trunk = 0; trunk < pairs.trunks.size(); ++trunk) {
        for (auto step = at(pairs.trunk_steps, trunk); step < at(pairs.trunk_steps, trunk + 1);
             ++step) {
            seen.clear();
            seen.emplace(bytes(own_action(pairs, trunk, step).tokens), own);
            for (auto b = at(pairs.step_branches, step); b < at(pairs.step_branches, step + 1);
                 ++b) {
                originals[b] = seen.emplace(bytes(pairs.branches[b]), b).first->second;
            }
        }
    }
    return originals;
}

class Packer {
  public:
    explicit Packer(const StepPairs& pairs)
        : pairs_(pairs), originals_(find_originals(pairs)), rows_(originals_.size()) {}

    // Tokens of a trunk and its branches, each unique one counted once.
    std::size_t block_size(std::size_t trunk) const {
        const auto first = at(pairs_.step_branches, at(pairs_.trunk_steps, trunk));
        const auto last = at(pairs_.step_branches, at(pairs_.trunk_steps, trunk + 1));
        auto size = pairs_.trunks[trunk].size();
        for (auto b = first; b < last; ++b) {
            if (originals_[b] == b) size += pairs_.branches[b].size();
        }
        return size;
    }

    void append_block(TokenTree& tree, std::size_t trunk) {
        const auto tokens = pairs_.trunks[trunk];
        const auto block_end = tree.input_ids.size() + block_size(trunk);
        const auto first_step = at(pairs_.trunk_steps, trunk);
        const auto last_step = at(pairs_.trunk_steps, trunk + 1);
        std::size_t done = 0;  // trunk tokens already in the tree
        for (auto step = first_step; step < last_step; ++step) {
            const auto action = own_action(pairs_, trunk, step);
            append_tokens(tree, tokens.subspan(done, action.start - done), done, block_end);
            append_step(tree, trunk, step, action);
            done = action.start;
        }
        append_tokens(tree, tokens.subspan(done), done, block_end);
    }

  private:
    static void append_tokens(TokenTree& tree, Tokens tokens, std::size_t depth,
                              std::size_t subtree_end) {
        const auto size = tree.input_ids.size();
        tree.input_ids.insert(tree.input_ids.end(), tokens.begin(), tokens.end());
        tree.subtree_end.resize(size + tokens.size(), index32(subtree_end));
        tree.position_ids.resize(size + tokens.size());
        std::iota(tree.position_ids.begin() + static_cast<std::ptrdiff_t>(size),
                  tree.position_ids.end(), index32(depth));
    }

    // Appends the new branches of a step and scores all its actions. The trunk's own action is not
    // here yet: it begins at the row after the last branch, where append_block goes on.
    void append_step(TokenTree& tree, std::size_t trunk, std::size_t step, const Action& action) {
        const auto parent = tree.input_ids.size() - 1;
        const auto first = at(pairs_.step_branches, step);
        const auto last = at(pairs_.step_branches, step + 1);
        for (auto b = first; b < last; ++b) {
            if (originals_[b] != b) continue;
            const auto branch = pairs_.branches[b];
            rows_[b] = tree.input_ids.size();
            append_tokens(tree, branch, action.start, rows_[b] + branch.size());
        }
        const auto own_row = tree.input_ids.size();
        const auto t = step - at(pairs_.trunk_steps, trunk);
        append_scores(tree, action.tokens, parent, own_row);
        append_key(tree, trunk, t, 0);
        for (auto b = first; b < last; ++b) {
            const auto row = originals_[b] == own ? own_row : rows_[originals_[b]];
            append_scores(tree, pairs_.branches[b], parent, row);
            append_key(tree, trunk, t, b - first + 1);
        }
    }

    // The first token is predicted by the state's last token, each other by the one before it.
    static void append_scores(TokenTree& tree, Tokens tokens, std::size_t parent, std::size_t row) {
        const auto size = tree.labels.size();
        tree.labels.insert(tree.labels.end(), tokens.begin(), tokens.end());
        tree.step_offsets.push_back(index32(tree.labels.size()));
        if (tokens.empty()) return;
        tree.label_rows.resize(size + tokens.size());
        const auto rows = tree.label_rows.begin() + static_cast<std::ptrdiff_t>(size);
        *rows = index32(parent);
        std::iota(rows + 1, tree.label_rows.end(), index32(row));
    }

    static void append_key(TokenTree& tree, std::size_t trunk, std::size_t step,
                           std::size_t branch) {
        tree.step_trunk.push_back(index32(trunk));
        tree.step_index.push_back(index32(step));
        tree.step_branch.push_back(index32(branch));
    }

    const StepPairs& pairs_;
    const std::vector<std::size_t> originals_;
    std::vector<std::size_t> rows_;  // tree index of the first token of each original branch
};

}  // namespace

std::vector<TokenTree> pack_step_pairs(const StepPairs& pairs, std::int64_t max_tokens) {
    Packer packer(pairs);
    std::vector<TokenTree> trees;
    const auto limit = static_cast<std::size_t>(max_tokens);
    for (std::size_t trunk = 0; trunk < pairs.trunks.size(); ++trunk) {
        const auto size = packer.block_size(trunk);
        if (size > limit) {
            throw std::invalid_argument("trunks[" + std::to_string(trunk) + "] takes " +
                                        std::to_string(size) + " tokens with its branches, but " +
                                        "max_tokens=" + std::to_string(max_tokens) +
                                        " and a trunk is never split");
        }
        if (trees.empty() || trees.back().input_ids.size() + size > limit) trees.emplace_back();
        packer.append_block(trees.back(), trunk);
    }
    return trees;
}

}  // namespace stepagent
