#include "forks.hpp"

#include <limits>
#include <stdexcept>
#include <string>

#include "masks.hpp"
#include "tree.hpp"

namespace stepagent {
namespace {

constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

class Forker {
  public:
    explicit Forker(const TreeView& tree)
        : tree_(tree), parents_(tree.input_ids.size(), none), is_fork_(tree.input_ids.size()) {
        check();
        find_forks();
        place_tokens();
    }

    Forked forked() const {
        Forked result;
        for (std::size_t k = 0; k < parents_.size(); ++k) {
            const auto end = index32(before_[at(tree_.subtree_end, k)]);
            if (after_fork(k)) append(result, parents_[k], end);
            if (!is_fork_[k]) append(result, k, end);
        }
        for (std::size_t s = 0; s + 1 < tree_.step_offsets.size(); ++s) {
            const auto last = at(tree_.step_offsets, s + 1);
            for (auto n = at(tree_.step_offsets, s); n < last; ++n) {
                // The row of a step's next label is that of this label's token.
                const auto token = n + 1 < last ? at(tree_.label_rows, n + 1) : child(n);
                result.label_rows.push_back(index32(row_before(token)));
            }
        }
        return result;
    }

  private:
    static std::size_t at(Tokens values, std::size_t i) {
        return static_cast<std::size_t>(values[i]);
    }

    static void require(bool condition, const std::string& message) {
        if (!condition) throw std::invalid_argument(message);
    }

    void check() const {
        const auto length = tree_.input_ids.size(), scored = tree_.labels.size();
        require(tree_.position_ids.size() == length && tree_.subtree_end.size() == length,
                "position_ids and subtree_end must be as long as input_ids, " +
                    std::to_string(length) + ", got " + std::to_string(tree_.position_ids.size()) +
                    " and " + std::to_string(tree_.subtree_end.size()));
        require(tree_.label_rows.size() == scored, "label_rows must be as long as labels, " +
                                                       std::to_string(scored) + ", got " +
                                                       std::to_string(tree_.label_rows.size()));
        check_subtree_ends(tree_.subtree_end);
        std::int32_t done = 0;
        for (std::size_t s = 0; s < tree_.step_offsets.size(); ++s) {
            const auto offset = tree_.step_offsets[s];
            require(offset >= done && (s > 0 || offset == 0),
                    "step_offsets must ascend from 0, got " + std::to_string(offset) + " at " +
                        std::to_string(s));
            done = offset;
        }
        require(static_cast<std::size_t>(done) == scored,
                "step_offsets must end with the number of labels, " + std::to_string(scored) +
                    ", got " + std::to_string(done));
        for (std::size_t n = 0; n < scored; ++n) {
            require(tree_.label_rows[n] >= 0 && at(tree_.label_rows, n) < length,
                    place("label_rows", n) + " must lie in [0, " + std::to_string(length) +
                        "), got " + std::to_string(tree_.label_rows[n]));
        }
    }

    void find_forks() {
        for (std::size_t k = 0; k < parents_.size(); ++k) {
            std::size_t children = 0;
            for (auto c = k + 1; c < at(tree_.subtree_end, k); c = at(tree_.subtree_end, c)) {
                parents_[c] = k;
                ++children;
            }
            is_fork_[k] = children > 1;
        }
    }

    // before_[k]: tokens of the result that come before token k and its parent's copy.
    void place_tokens() {
        before_.reserve(parents_.size() + 1);
        before_.push_back(0);
        for (std::size_t k = 0; k < parents_.size(); ++k) {
            before_.push_back(before_[k] + (after_fork(k) ? 1U : 0U) + (is_fork_[k] ? 0U : 1U));
        }
    }

    bool after_fork(std::size_t k) const { return parents_[k] != none && is_fork_[parents_[k]]; }

    void append(Forked& result, std::size_t k, std::int32_t end) const {
        result.input_ids.push_back(tree_.input_ids[k]);
        result.position_ids.push_back(tree_.position_ids[k]);
        result.subtree_end.push_back(end);
    }

    // The child that the n-th label is; siblings may share a token, and then predict it alike.
    std::size_t child(std::size_t n) const {
        const auto row = at(tree_.label_rows, n);
        for (auto c = row + 1; c < at(tree_.subtree_end, row); c = at(tree_.subtree_end, c)) {
            if (tree_.input_ids[c] == tree_.labels[n]) return c;
        }
        throw std::invalid_argument(
            place("labels", n) + " must be a token that follows that of row " +
            std::to_string(row) + ", got " + std::to_string(tree_.labels[n]));
    }

    // The row of the result that predicts token k.
    std::size_t row_before(std::size_t k) const {
        require(parents_[k] != none,
                "label_rows within a step must lie after a first token, got " + std::to_string(k));
        return after_fork(k) ? before_[k]
                             : before_[parents_[k]] + (after_fork(parents_[k]) ? 1 : 0);
    }

    const TreeView& tree_;
    std::vector<std::size_t> parents_, before_;
    std::vector<bool> is_fork_;
};

}  // namespace

Forked fork_early(const TreeView& tree) {
    return Forker(tree).forked();
}

}  // namespace stepagent
