// Levenshtein distance of token sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace stepagent {

// The least number of insertions, deletions and substitutions that turn one sequence into another.
// Keeps its buffers from call to call. A common prefix and suffix is stripped; what remains is
// first taken for nearly equal and walked diagonal by diagonal (Ukkonen 1985: O(n + d^2) for
// distance d, no look-ups), and if it has too many edits for that, column by column, 64 rows a word
// (Myers 1999, in Hyyro's blocks), inside the band that the cutoff leaves (Ukkonen).
class EditDistance {
  public:
    using Tokens = std::span<const std::int32_t>;

    // The distance, or cutoff + 1 where it exceeds the cutoff (>= 0).
    std::int64_t operator()(Tokens a, Tokens b, std::int64_t cutoff);

  private:
    // The places of one token in 64 rows of the pattern; `next` is the token's entry before this.
    struct Entry {
        std::uint64_t bits;
        std::int32_t word, next;
    };
    struct Slot {
        std::int32_t token, entry;
    };

    std::int64_t by_diagonals(Tokens a, Tokens b, std::int64_t limit);
    std::int64_t by_columns(Tokens pattern, Tokens text, std::int64_t limit);
    void index(Tokens pattern, std::size_t padding);
    void add(std::int32_t& last, std::size_t row);
    Slot& find(std::int32_t token);
    void match(std::int32_t entry, std::size_t lane, std::size_t first, std::size_t last);

    std::vector<std::int64_t> reached_;  // by diagonal, the furthest row
    std::vector<Slot> slots_;            // open addressing, a power of two
    std::vector<Entry> entries_;
    std::int32_t padding_entry_ = -1;
    int hash_shift_ = 0;
    std::vector<std::uint64_t> positive_, negative_;  // vertical differences of +1 and -1
    std::vector<std::uint64_t> matches_;              // by step and lane
};

}  // namespace stepagent
