#include "edit_distance.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace stepagent {
namespace {

using Tokens = EditDistance::Tokens;
using Word = std::uint64_t;

// Four words that GCC and Clang compute on at once, with whatever vectors the target has.
typedef Word Lanes __attribute__((vector_size(32)));
constexpr std::size_t lanes = 4;
constexpr std::size_t columns = 2 * lanes;  // that one sweep takes together

void strip_common(Tokens& a, Tokens& b) {
    const auto prefix = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
    a = a.subspan(static_cast<std::size_t>(prefix));
    b = b.subspan(static_cast<std::size_t>(prefix));
    const auto suffix =
        std::mismatch(a.rbegin(), a.rend(), b.rbegin(), b.rend()).first - a.rbegin();
    a = a.first(a.size() - static_cast<std::size_t>(suffix));
    b = b.first(b.size() - static_cast<std::size_t>(suffix));
}

// How many tokens a and b begin with in common, of `size`.
std::int64_t common_prefix(const std::int32_t* a, const std::int32_t* b, std::int64_t size) {
    constexpr std::int64_t block = 8;
    std::int64_t i = 0;
    if (size == 0 || a[0] != b[0]) return 0;  // the usual case
    for (; i + block <= size; i += block) {
        std::int32_t differ = 0;
        for (std::int64_t k = 0; k < block; ++k) differ |= a[i + k] ^ b[i + k];
        if (differ) break;
    }
    while (i < size && a[i] == b[i]) ++i;
    return i;
}

// Four columns at work: the vertical differences (+1, -1) of the words they stand at, and the
// horizontal ones that go from each word into the next.
struct Wave {
    Lanes vp{}, vn{}, hp = {1, 1, 1, 1}, hn{};  // above the first row, distances ascend

    // Each lane hands its vertical differences to the next one; `vp_in` and `vn_in` enter.
    [[gnu::always_inline]] void shift(Word vp_in, Word vn_in) {
        vp = Lanes{vp_in, vp[0], vp[1], vp[2]};
        vn = Lanes{vn_in, vn[0], vn[1], vn[2]};
    }

    // Myers' column step in every lane; `matches` is used up, that is, set to zero.
    [[gnu::always_inline]] void advance(Word* matches) {
        Lanes eq;
        __builtin_memcpy(&eq, matches, sizeof eq);
        __builtin_memset(matches, 0, sizeof eq);
        eq |= hn;
        const Lanes d0 = (((eq & vp) + vp) ^ vp) | eq | vn;
        const Lanes up = vn | ~(d0 | vp), down = d0 & vp;
        const Lanes up_in = (up << 1) | hp, down_in = (down << 1) | hn;
        hp = up >> 63;
        hn = down >> 63;
        vp = down_in | ~(d0 | up_in);
        vn = d0 & up_in;
    }
};

// Takes eight columns of the text through `words` words of the pattern. Lane k works on column k,
// one word behind lane k - 1, whose vertical differences it takes over: eight independent
// computations a step. A lane outside the pattern holds zeros, which leave its carry as it is.
// `positive` and `negative` point at the first word; the seven before it are overwritten.
[[gnu::always_inline]] inline void sweep(Word* positive, Word* negative, Word* matches,
                                         std::size_t words) {
    constexpr auto delay = columns - 1;
    Wave front, back;
    for (std::size_t step = 0; step < words + delay; ++step) {
        back.shift(front.vp[lanes - 1], front.vn[lanes - 1]);
        front.shift(positive[step], negative[step]);
        front.advance(matches + step * columns);
        back.advance(matches + step * columns + lanes);
        (positive - delay)[step] = back.vp[lanes - 1];
        (negative - delay)[step] = back.vn[lanes - 1];
    }
}

using Sweep = void (*)(Word*, Word*, Word*, std::size_t);

void sweep_portable(Word* positive, Word* negative, Word* matches, std::size_t words) {
    sweep(positive, negative, matches, words);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void sweep_avx2(Word* positive, Word* negative, Word* matches,
                                        std::size_t words) {
    sweep(positive, negative, matches, words);
}

Sweep fastest_sweep() {
    return __builtin_cpu_supports("avx2") ? sweep_avx2 : sweep_portable;
}
#else
Sweep fastest_sweep() {
    return sweep_portable;
}
#endif

std::int64_t ones(Word positive, Word negative) {
    return std::popcount(positive) - std::popcount(negative);
}

}  // namespace

std::int64_t EditDistance::operator()(Tokens a, Tokens b, std::int64_t cutoff) {
    strip_common(a, b);
    if (a.size() < b.size()) std::swap(a, b);
    const auto m = static_cast<std::int64_t>(a.size()), n = static_cast<std::int64_t>(b.size());
    const auto limit = std::min(cutoff, m);  // m edits always suffice
    auto distance = limit + 1;
    if (n == 0) {
        distance = m;
    } else if (m - n <= limit) {
        // Measured: d^2 steps on diagonals cost as much as m n / 64 words at d = sqrt(m n) / 8. A
        // larger cutoff, or none, lets diagonals try for a sixteenth of that time.
        const auto size =
            static_cast<std::int64_t>(std::sqrt(static_cast<double>(m) * static_cast<double>(n)));
        const auto few = limit <= size / 8 ? limit : size / 32;
        distance = by_diagonals(a, b, few);
        if (distance > few && few < limit) distance = by_columns(a, b, limit);
    }
    return std::min(distance, cutoff + 1);
}

// reached_[k] is, for d edits, the furthest i such that a[:i] becomes b[:i + k]. Diagonals from
// which more than limit - d edits lead to the end are left out. Returns limit + 1 for more edits.
std::int64_t EditDistance::by_diagonals(Tokens a, Tokens b, std::int64_t limit) {
    const auto m = static_cast<std::int64_t>(a.size()), n = static_cast<std::int64_t>(b.size());
    constexpr auto never = std::numeric_limits<std::int64_t>::min() / 2;
    reached_.assign(static_cast<std::size_t>(2 * limit + 3), never);
    const auto reached = reached_.data() + limit + 1;
    for (std::int64_t d = 0; d <= limit; ++d) {
        const auto low = std::max({-d, -m, n - m - (limit - d)});
        const auto high = std::min({d, n, n - m + (limit - d)});
        auto before = reached[low - 1];
        for (auto k = low; k <= high; ++k) {
            auto i = std::max({before, reached[k] + 1, reached[k + 1] + 1});
            before = reached[k];
            if (d == 0) i = 0;
            const auto end = std::min(m, n - k);
            i = std::min(i, end);
            i += common_prefix(a.data() + i, b.data() + i + k, end - i);
            reached[k] = i;
        }
        if (low <= n - m && n - m <= high && reached[n - m] == m) return d;
    }
    return limit + 1;
}

// Both sequences are padded with the same tokens, which leaves their distance as it is, until the
// text is a whole number of sweeps.
std::int64_t EditDistance::by_columns(Tokens pattern, Tokens text, std::int64_t limit) {
    static const Sweep sweep_columns = fastest_sweep();
    const auto padding = (columns - text.size() % columns) % columns;
    const auto rows = pattern.size() + padding, words = (rows + 63) / 64;
    index(pattern, padding);
    constexpr auto margin = columns - 1;
    positive_.assign(words + 2 * margin, ~Word{0});
    negative_.assign(words + 2 * margin, 0);
    matches_.assign((words + margin) * columns, 0);
    Word* const positive = positive_.data() + margin;
    Word* const negative = negative_.data() + margin;

    // A path of at most `limit` edits has row - column in [-slack, excess + slack]. Outside, the
    // distances are taken to rise by 1 a step, which some path does.
    const auto excess = pattern.size() - text.size();
    const auto slack = (static_cast<std::size_t>(limit) - excess) / 2;
    std::size_t first = 0, last = 0;
    std::int64_t top = 0;  // the distance above the first word
    for (std::size_t column = 0; column < text.size(); column += columns) {
        for (; first < (column > slack ? (column - slack) / 64 : 0); ++first) {
            top += ones(positive[first], negative[first]);
        }
        last = std::min(words - 1, (column + columns + excess + slack) / 64);
        for (std::size_t lane = 0; lane < columns; ++lane) {
            const auto place = column + lane;
            match(place < text.size() ? find(text[place]).entry : padding_entry_, lane, first,
                  last);
        }
        sweep_columns(positive + first, negative + first, matches_.data(), last - first + 1);
        top += columns;
    }
    for (auto word = first; word < words; ++word) {
        const auto valid =
            word + 1 < words || rows % 64 == 0 ? ~Word{0} : (Word{1} << rows % 64) - 1;
        top += ones(positive[word] & valid, negative[word] & valid);
    }
    return top;
}

void EditDistance::index(Tokens pattern, std::size_t padding) {
    const auto size = std::bit_ceil(2 * pattern.size());
    hash_shift_ = 32 - std::countr_zero(size);
    slots_.assign(size, {0, -1});
    entries_.clear();
    for (std::size_t row = 0; row < pattern.size(); ++row) {
        auto& slot = find(pattern[row]);
        slot.token = pattern[row];
        add(slot.entry, row);
    }
    padding_entry_ = -1;
    for (std::size_t row = 0; row < padding; ++row) add(padding_entry_, pattern.size() + row);
}

void EditDistance::add(std::int32_t& last, std::size_t row) {
    const auto word = static_cast<std::int32_t>(row / 64);
    if (last < 0 || entries_[static_cast<std::size_t>(last)].word != word) {
        entries_.push_back({0, word, last});
        last = static_cast<std::int32_t>(entries_.size()) - 1;
    }
    entries_[static_cast<std::size_t>(last)].bits |= Word{1} << row % 64;
}

// The token's slot, or the free one where it would be.
EditDistance::Slot& EditDistance::find(std::int32_t token) {
    auto place =
        static_cast<std::size_t>((static_cast<std::uint32_t>(token) * 2654435769u) >> hash_shift_);
    while (slots_[place].entry >= 0 && slots_[place].token != token) {
        place = (place + 1) & (slots_.size() - 1);
    }
    return slots_[place];
}

// Lays out a token's matches for its lane, which meets word w of the sweep at step w + lane.
void EditDistance::match(std::int32_t entry, std::size_t lane, std::size_t first,
                         std::size_t last) {
    while (entry >= 0) {
        const auto& found = entries_[static_cast<std::size_t>(entry)];
        const auto word = static_cast<std::size_t>(found.word);
        if (word < first) return;
        if (word <= last) matches_[(word - first + lane) * columns + lane] = found.bits;
        entry = found.next;
    }
}

}  // namespace stepagent
