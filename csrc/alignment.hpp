// What belongs together in two sequences: tokens of one text, and steps of two trajectories.
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

// One tokenization of a text: each token's first character and the one after its last, in pairs.
// Tokens without characters (special tokens, whatever their offsets say) stand where the token
// before them ends.
struct Tokenization {
    const char* name;                        // in error messages
    std::span<const std::int64_t> offsets;   // 2 a token
    std::span<const std::int32_t> ids = {};  // one a token, or none
};

struct TokenAlignment {
    std::vector<std::int32_t> pairs;  // 2 each: a token of the one, its equal in the other
    std::vector<std::int32_t> seams;  // 4 each: [a0, a1) and [b0, b1), all that lies between pairs
};

// Pairs the tokens of two tokenizations of one text that cover the same characters, and with ids
// are the same tokens. Tokens that share characters (the bytes of one symbol) or all lack them at
// one place are paired only if their whole run is the same in both. A common prefix of ids is
// paired whatever its offsets. Linear. Throws std::invalid_argument for offsets that are negative,
// end before they start, or descend.
TokenAlignment align_tokens(const Tokenization& a, const Tokenization& b);

// The tokens that make up each span of characters: those that have a character in it. Throws
// std::invalid_argument for bad offsets or spans, and where a span begins or ends inside a token.
std::vector<std::int32_t> token_spans(std::span<const std::int64_t> char_spans,
                                      const Tokenization& tokens);

// The characters that each span of tokens covers, without what surrounds it; for tokens without
// any, the place where they stand. Throws std::invalid_argument for bad offsets or spans, and where
// a character is shared by a token inside and one outside.
std::vector<std::int64_t> char_spans(std::span<const std::int64_t> token_spans,
                                     const Tokenization& tokens);

// The edit distance of every two steps within `band` of the diagonal, over the longer one's length:
// in [0, 1], row-major, 0 for two empty steps and outside the band.
std::vector<double> step_costs(const Ragged& expert, const Ragged& agent, std::int64_t band);

enum class StepMethod { needleman_wunsch, lcs, dtw };

struct StepAlignment {
    std::vector<std::int32_t> pairs;  // 2 each: an expert step and an agent step, ascending
    double distance;                  // infinite, and no pairs, where it exceeds the cutoff
};

// The cheapest alignment whose pairs stay within `band` of the diagonal (>= |m - n|). `costs` has
// m x n entries, row-major, finite and >= 0.
//   needleman_wunsch: a pair costs its entry, a step left alone 1
//   lcs:              only pairs of cost 0; a step left alone costs 1
//   dtw:              the costs along a monotone path from the first pair to the last; m, n >= 1
//                     unless both are 0
// Ties, decided from the end: a pair (in dtw: both advance), then the expert's step, the agent's.
StepAlignment align_steps(std::span<const double> costs, std::size_t m, std::size_t n,
                          StepMethod method, std::int64_t band, double cutoff);

}  // namespace stepagent
