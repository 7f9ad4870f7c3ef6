// Token trees: sequences that share their beginnings, every unique token once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "tokens.hpp"

namespace stepagent {

// Tokens in depth-first pre-order: token q sees token k iff k <= q < subtree_end[k].
struct TokenTree {
    std::vector<std::int32_t> input_ids, position_ids, subtree_end;  // one per token
    std::vector<std::int32_t> labels, label_rows;                    // one per scored token
    std::vector<std::int32_t> step_offsets{0};                       // one per step, and one more
    std::vector<std::int32_t> step_trunk, step_index, step_branch;   // one per step

    // Makes room; throws std::length_error where 32-bit indices cannot count the entries.
    void reserve(std::size_t tokens, std::size_t scored, std::size_t steps);
    // Appends tokens that follow one another, the first of them at `depth`.
    void append_run(Tokens tokens, std::size_t depth, std::size_t subtree_end);
    // Ends a step, whose scored tokens have been appended.
    void append_step(std::size_t trunk, std::size_t index, std::size_t branch);
};

// The value as a 32-bit index; throws std::length_error beyond them.
std::int32_t index32(std::size_t value);

// Fills trees with whole blocks in order, each up to `limit` tokens: tree i takes the blocks
// [starts[i], starts[i + 1]). Every block fits.
std::vector<std::size_t> next_fit(std::span<const std::size_t> block_sizes, std::size_t limit);

// The tokens of a tree at most; without max_tokens all go into one, however large. Throws
// std::invalid_argument where 32-bit indices cannot count max_tokens.
std::size_t token_limit(std::optional<std::int64_t> max_tokens);

// Trajectories and the actions tried at their steps. Steps are counted through all trunks, branches
// through all steps.
struct StepPairs {
    std::span<const AnyIds> trunks;                        // token ids of each trunk
    std::span<const std::span<const std::int32_t>> spans;  // (start, end) of its actions
    // (at, depth): from token `at` on, what goes on after the first `depth` tokens before it. Empty
    // where no trunk has any.
    std::span<const std::span<const std::int32_t>> rewinds;
    std::span<const AnyIds> branches;             // token ids of each branch
    std::span<const std::int64_t> branch_counts;  // branches of each step
};

// Packs whole trunks, in order, into trees of at most max_tokens tokens (next fit). Linear in the
// tokens given; the trees do not depend on `threads`. Throws std::invalid_argument where ids, spans
// or counts break the rules or one trunk with its branches exceeds max_tokens, and
// std::length_error if a tree outgrows 32-bit indices.
std::vector<TokenTree> pack_step_pairs(const StepPairs& pairs,
                                       std::optional<std::int64_t> max_tokens, std::size_t threads);

// Sequences and which of their tokens are scored: masks[i][p] != 0 for token p of sequence i.
struct Sequences {
    std::span<const AnyIds> tokens;
    std::span<const std::span<const std::uint8_t>> masks;
};

// Packs the prefix tree of the sequences: those that begin with one token are a block, blocks fill
// trees in order of first appearance (next fit), children follow each other in that order too. A
// block beyond max_tokens is cut between its sequences, in the order of the tree, where the fewest
// tokens are repeated, then into the fewest parts. Linear in the tokens given; the trees do not
// depend on `threads`. Throws as pack_step_pairs does, here for a sequence beyond max_tokens.
std::vector<TokenTree> pack_sequences(const Sequences& sequences,
                                      std::optional<std::int64_t> max_tokens, std::size_t threads);

}  // namespace stepagent
