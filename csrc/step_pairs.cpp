// Trajectories and the actions tried at their steps as token trees.
#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "parallel.hpp"
#include "tree.hpp"

namespace stepagent {
namespace {

// offsets[i]: how many entries the first i groups have in all.
template <typename Count>
std::vector<std::size_t> offsets(std::size_t groups, const Count& count) {
    std::vector<std::size_t> result(groups + 1, 0);
    for (std::size_t i = 0; i < groups; ++i) result[i + 1] = result[i] + count(i);
    return result;
}

// The group that holds an entry: the last offset <= entry, over groups without any.
std::size_t group_of(std::span<const std::size_t> offsets, std::size_t entry) {
    const auto after = std::upper_bound(offsets.begin(), offsets.end(), entry);
    return static_cast<std::size_t>(after - offsets.begin()) - 1;
}

struct Action {
    std::size_t start;
    Tokens tokens;
};

// A branch's original: the first branch of its step with the same tokens, or the trunk's own
// action.
constexpr std::size_t own = std::numeric_limits<std::size_t>::max();

std::string_view bytes(Tokens tokens) {
    return {reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()};
}

// The tokens of a trunk as they go into a tree: one line, until a rewind ends the subtrees of the
// tokens that it goes back over.
class Spine {
  public:
    Spine(TokenTree& tree, Tokens tokens, std::span<const std::int32_t> rewinds, std::size_t end)
        : tree_(tree), tokens_(tokens), rewinds_(rewinds), end_(end) {}

    // Appends the tokens before `stop`; the depth of the one there.
    std::size_t append_until(std::size_t stop) {
        while (!rewinds_.empty() && static_cast<std::size_t>(rewinds_[0]) < stop) {
            append(static_cast<std::size_t>(rewinds_[0]));
            rewind(static_cast<std::size_t>(rewinds_[1]));
            rewinds_ = rewinds_.subspan(2);
        }
        append(stop);
        return depth_;
    }

  private:
    struct Run {
        std::size_t row, depth;  // of its first token
    };

    void append(std::size_t stop) {
        if (stop == done_) return;
        path_.push_back({tree_.input_ids.size(), depth_});
        tree_.append_run(tokens_.subspan(done_, stop - done_), depth_, end_);
        depth_ += stop - done_;
        done_ = stop;
    }

    void rewind(std::size_t depth) {
        const auto end = index32(tree_.input_ids.size());
        while (depth_ > depth) {
            const auto run = path_.back();
            const auto kept = std::max(depth, run.depth);
            const auto first =
                tree_.subtree_end.begin() + static_cast<std::ptrdiff_t>(run.row + kept - run.depth);
            std::fill_n(first, depth_ - kept, end);
            depth_ = kept;
            if (kept == run.depth) path_.pop_back();
        }
    }

    TokenTree& tree_;
    const Tokens tokens_;
    std::span<const std::int32_t> rewinds_;  // those to come
    const std::size_t end_;
    std::size_t done_ = 0, depth_ = 0;
    std::vector<Run> path_;  // what the next token sees
};

class Packer {
  public:
    Packer(const StepPairs& pairs, std::size_t threads)
        : spans_(pairs.spans),
          rewinds_(checked_rewinds(pairs)),
          trunk_steps_(checked_steps(pairs)),
          step_branches_(checked_branches(pairs, trunk_steps_.back())),
          trunks_(
              pairs.trunks, [](std::size_t i) { return place("trunks", i); }, threads),
          branches_(
              pairs.branches, [&](std::size_t b) { return branch_place(b); }, threads),
          originals_(pairs.branches.size()),
          rows_(pairs.branches.size()),
          sizes_(pairs.trunks.size()),
          scored_(pairs.trunks.size()) {
        parallel_for(trunks_.size(), threads, [&](std::size_t trunk) { measure(trunk); });
    }

    // Tokens of each trunk with its branches, each unique one counted once.
    std::span<const std::size_t> block_sizes() const { return sizes_; }

    // The tree of the trunks [first, last).
    TokenTree tree(std::size_t first, std::size_t last) {
        TokenTree tree;
        reserve(tree, first, last);
        for (auto trunk = first; trunk < last; ++trunk) append_block(tree, trunk);
        return tree;
    }

  private:
    static std::vector<std::size_t> checked_steps(const StepPairs& pairs) {
        if (pairs.spans.size() != pairs.trunks.size()) {
            throw std::invalid_argument("action_spans must have those of each of the " +
                                        std::to_string(pairs.trunks.size()) + " trunks, got " +
                                        std::to_string(pairs.spans.size()));
        }
        return offsets(pairs.trunks.size(), [&](std::size_t trunk) {
            const auto bounds = pairs.spans[trunk].size();
            if (bounds % 2 != 0) {
                throw std::invalid_argument(place("trunks", trunk) +
                                            ".action_spans must come in pairs, got " +
                                            std::to_string(bounds) + " bounds");
            }
            return bounds / 2;
        });
    }

    static std::span<const std::span<const std::int32_t>> checked_rewinds(const StepPairs& pairs) {
        if (!pairs.rewinds.empty() && pairs.rewinds.size() != pairs.trunks.size()) {
            throw std::invalid_argument("rewinds must have those of each of the " +
                                        std::to_string(pairs.trunks.size()) + " trunks, got " +
                                        std::to_string(pairs.rewinds.size()));
        }
        return pairs.rewinds;
    }

    static std::vector<std::size_t> checked_branches(const StepPairs& pairs, std::size_t steps) {
        if (pairs.branch_counts.size() != steps) {
            throw std::invalid_argument("branch_counts must have one for each of the " +
                                        std::to_string(steps) + " steps, got " +
                                        std::to_string(pairs.branch_counts.size()));
        }
        auto result = offsets(steps, [&](std::size_t step) {
            const auto count = pairs.branch_counts[step];
            if (count < 0 || static_cast<std::size_t>(count) > pairs.branches.size()) {
                throw std::invalid_argument(place("branch_counts", step) + " must lie in [0, " +
                                            std::to_string(pairs.branches.size()) +
                                            "], the number of branches, got " +
                                            std::to_string(count));
            }
            return static_cast<std::size_t>(count);
        });
        if (result.back() != pairs.branches.size()) {
            throw std::invalid_argument("branch_counts must sum to the number of branches, " +
                                        std::to_string(pairs.branches.size()) + ", got " +
                                        std::to_string(result.back()));
        }
        return result;
    }

    std::string branch_place(std::size_t branch) const {
        const auto step = group_of(step_branches_, branch);
        const auto trunk = group_of(trunk_steps_, step);
        return place(place(place("branches", trunk), step - trunk_steps_[trunk]),
                     branch - step_branches_[step]);
    }

    Action own_action(std::size_t trunk, std::size_t t) const {
        const auto start = static_cast<std::size_t>(spans_[trunk][2 * t]);
        const auto end = static_cast<std::size_t>(spans_[trunk][2 * t + 1]);
        return {start, trunks_[trunk].subspan(start, end - start)};
    }

    // Half-open, ascending, within the trunk, never empty, and after a token that predicts them.
    void check_spans(std::size_t trunk) const {
        std::int64_t done = 1;
        for (std::size_t t = 0; 2 * t + 1 < spans_[trunk].size(); ++t) {
            const std::int64_t start = spans_[trunk][2 * t], end = spans_[trunk][2 * t + 1];
            const auto length = static_cast<std::int64_t>(trunks_[trunk].size());
            if (start < done || end <= start || end > length) {
                throw std::invalid_argument(place(place("trunks", trunk) + ".action_spans", t) +
                                            " must lie in [" + std::to_string(done) + ", " +
                                            std::to_string(length) + ") and not be empty, got [" +
                                            std::to_string(start) + ", " + std::to_string(end) +
                                            ")");
            }
            done = end;
        }
    }

    std::span<const std::int32_t> rewinds(std::size_t trunk) const {
        return rewinds_.empty() ? std::span<const std::int32_t>{} : rewinds_[trunk];
    }

    // Ascending, between actions with a token of the state left before the next, back to a depth
    // above their own.
    void check_rewinds(std::size_t trunk) const {
        const auto all = rewinds(trunk);
        const auto spans = spans_[trunk];
        const auto name = place("trunks", trunk) + ".rewinds";
        if (all.size() % 2 != 0)
            throw std::invalid_argument(name + " must come in pairs, got " +
                                        std::to_string(all.size()) + " numbers");
        std::int64_t before = 0, depth = 0;  // of the rewind before
        std::size_t t = 0;
        for (std::size_t i = 0; i < all.size(); i += 2) {
            const std::int64_t at = all[i], back = all[i + 1];
            while (2 * t < spans.size() && spans[2 * t] <= at) ++t;
            const std::int64_t done = t == 0 ? 0 : spans[2 * t - 1];
            if (at <= before || at < done || 2 * t >= spans.size() || back < 0 ||
                back >= depth + at - before) {
                throw std::invalid_argument(
                    place(name, i / 2) +
                    " must come after the one before, between actions, and go back, got [" +
                    std::to_string(at) + ", " + std::to_string(back) + "]");
            }
            before = at;
            depth = back;
        }
    }

    // Finds the originals of a trunk's branches, and the sizes of its block.
    void measure(std::size_t trunk) {
        check_spans(trunk);
        check_rewinds(trunk);
        std::unordered_map<std::string_view, std::size_t> seen;
        sizes_[trunk] = trunks_[trunk].size();
        for (auto step = trunk_steps_[trunk]; step < trunk_steps_[trunk + 1]; ++step) {
            const auto action = own_action(trunk, step - trunk_steps_[trunk]);
            scored_[trunk] += action.tokens.size();
            seen.clear();
            seen.emplace(bytes(action.tokens), own);
            for (auto b = step_branches_[step]; b < step_branches_[step + 1]; ++b) {
                originals_[b] = seen.emplace(bytes(branches_[b]), b).first->second;
                scored_[trunk] += branches_[b].size();
                if (originals_[b] == b) sizes_[trunk] += branches_[b].size();
            }
        }
    }

    void reserve(TokenTree& tree, std::size_t first, std::size_t last) const {
        std::size_t tokens = 0, scored = 0;
        for (auto trunk = first; trunk < last; ++trunk) {
            tokens += sizes_[trunk];
            scored += scored_[trunk];
        }
        const auto first_step = trunk_steps_[first], last_step = trunk_steps_[last];
        const auto steps =
            last_step - first_step + step_branches_[last_step] - step_branches_[first_step];
        tree.reserve(tokens, scored, steps);
    }

    void append_block(TokenTree& tree, std::size_t trunk) {
        const auto tokens = trunks_[trunk];
        Spine spine(tree, tokens, rewinds(trunk), tree.input_ids.size() + sizes_[trunk]);
        for (std::size_t t = 0; t < spans_[trunk].size() / 2; ++t) {
            const auto action = own_action(trunk, t);
            append_actions(tree, trunk, t, action.tokens, spine.append_until(action.start));
        }
        spine.append_until(tokens.size());
    }

    // Appends the new branches of a step and scores all its actions. The trunk's own action is not
    // here yet: it begins at the row after the last branch, where append_block goes on.
    void append_actions(TokenTree& tree, std::size_t trunk, std::size_t t, Tokens action,
                        std::size_t depth) {
        const auto parent = tree.input_ids.size() - 1;
        const auto step = trunk_steps_[trunk] + t;
        const auto first = step_branches_[step], last = step_branches_[step + 1];
        for (auto b = first; b < last; ++b) {
            if (originals_[b] != b) continue;
            rows_[b] = tree.input_ids.size();
            tree.append_run(branches_[b], depth, rows_[b] + branches_[b].size());
        }
        const auto own_row = tree.input_ids.size();
        append_scores(tree, action, parent, own_row);
        tree.append_step(trunk, t, 0);
        for (auto b = first; b < last; ++b) {
            append_scores(tree, branches_[b], parent,
                          originals_[b] == own ? own_row : rows_[originals_[b]]);
            tree.append_step(trunk, t, b - first + 1);
        }
    }

    // The first token is predicted by the state's last token, each other by the one before it.
    static void append_scores(TokenTree& tree, Tokens tokens, std::size_t parent, std::size_t row) {
        if (tokens.empty()) return;
        const auto size = tree.labels.size();
        tree.labels.insert(tree.labels.end(), tokens.begin(), tokens.end());
        tree.label_rows.resize(size + tokens.size());
        const auto rows = tree.label_rows.begin() + static_cast<std::ptrdiff_t>(size);
        *rows = index32(parent);
        std::iota(rows + 1, tree.label_rows.end(), index32(row));
    }

    const std::span<const std::span<const std::int32_t>> spans_, rewinds_;
    const std::vector<std::size_t> trunk_steps_;    // trunk i owns the steps [i], [i + 1]
    const std::vector<std::size_t> step_branches_;  // step s owns the branches [s], [s + 1]
    const TokenRows trunks_, branches_;
    std::vector<std::size_t> originals_;
    std::vector<std::size_t> rows_;  // tree index of the first token of each original branch
    std::vector<std::size_t> sizes_, scored_;  // of each trunk with its branches: tokens, labels
};

}  // namespace

std::vector<TokenTree> pack_step_pairs(const StepPairs& pairs,
                                       std::optional<std::int64_t> max_tokens,
                                       std::size_t threads) {
    const auto limit = token_limit(max_tokens);
    Packer packer(pairs, threads);
    const auto sizes = packer.block_sizes();
    for (std::size_t trunk = 0; trunk < sizes.size(); ++trunk) {
        if (sizes[trunk] > limit) {
            throw std::invalid_argument(
                place("trunks", trunk) +
                " with its branches must fit max_tokens=" + std::to_string(limit) +
                ", as a trunk is never split, got " + std::to_string(sizes[trunk]) + " tokens");
        }
    }
    const auto starts = next_fit(sizes, limit);
    std::vector<TokenTree> trees(starts.size() - 1);
    parallel_for(trees.size(), threads,
                 [&](std::size_t i) { trees[i] = packer.tree(starts[i], starts[i + 1]); });
    return trees;
}

}  // namespace stepagent
