// Token trees: a trajectory and the actions tried at its steps, every unique token once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace stepagent {

// Rows of different lengths, laid end to end: row i is values[offsets[i], offsets[i + 1]).
struct Ragged {
    std::span<const std::int32_t> values;
    std::span<const std::int64_t> offsets;

    std::span<const std::int32_t> operator[](std::size_t i) const {
        const auto begin = static_cast<std::size_t>(offsets[i]);
        return values.subspan(begin, static_cast<std::size_t>(offsets[i + 1]) - begin);
    }
    std::size_t size() const { return offsets.size() - 1; }
};

// Expert trajectories and the actions tried at their steps. Steps are counted through all trunks,
// branches through all steps.
struct StepPairs {
    Ragged trunks;                               // token ids of each trunk
    std::span<const std::int64_t> trunk_steps;   // trunk i owns steps [trunk_steps[i], [i + 1])
    std::span<const std::int32_t> action_spans;  // start and end of each step's action, in pairs
    Ragged branches;                             // token ids of each branch
    std::span<const std::int64_t>
        step_branches;  // step s owns branches [step_branches[s], [s + 1])
};

// Tokens in depth-first pre-order: token q sees token k iff k <= q < subtree_end[k].
struct TokenTree {
    std::vector<std::int32_t> input_ids, position_ids, subtree_end;  // one per token
    std::vector<std::int32_t> labels, label_rows;                    // one per scored token
    std::vector<std::int32_t> step_offsets{0};                       // one per step, and one more
    std::vector<std::int32_t> step_trunk, step_index, step_branch;   // one per step
};

// Packs whole trunks, in order, into trees of at most max_tokens tokens (next fit). Linear in the
// tokens given. Throws std::invalid_argument if one trunk with its branches exceeds max_tokens, and
// std::length_error if a tree outgrows 32-bit indices.
std::vector<TokenTree> pack_step_pairs(const StepPairs& pairs, std::int64_t max_tokens);

}  // namespace stepagent
