#include "alignment.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "edit_distance.hpp"
#include "tokens.hpp"

namespace stepagent {
namespace {

// ------------------------------------------------------------------ tokens of one text

struct Interval {
    std::int64_t start, end;
    bool lent = false;  // to a token without characters of its own
    bool operator==(const Interval&) const = default;
    bool empty() const { return start == end; }
};

using Intervals = std::vector<Interval>;

std::string text(Interval interval) {
    return "[" + std::to_string(interval.start) + ", " + std::to_string(interval.end) + ")";
}

std::string described(const char* name, std::size_t index, Interval interval) {
    return place(name, index) + " is " + text(interval);
}

void check(const char* name, std::size_t index, Interval interval) {
    const char* rule = nullptr;
    if (interval.end < interval.start) rule = "must not end before it starts";
    if (interval.start < 0) rule = "must not be negative";
    if (rule)
        throw std::invalid_argument(place(name, index) + " " + rule + ", got " + text(interval));
}

// A token without characters gets the place where the one before it ends: its own offsets are often
// (0, 0) wherever it stands. Between tokens that share characters it shares them.
Intervals intervals(const Tokenization& tokens) {
    Intervals result(tokens.offsets.size() / 2);
    Interval previous{0, 0};
    std::size_t placed = 0;
    const auto place = [&](std::size_t end, std::int64_t next_start) {
        const Interval between{std::min(previous.end, next_start), previous.end, true};
        for (; placed < end; ++placed) result[placed] = between;
    };
    for (std::size_t i = 0; i < result.size(); ++i) {
        const Interval current{tokens.offsets[2 * i], tokens.offsets[2 * i + 1]};
        check(tokens.name, i, current);
        if (current.empty()) continue;
        if (current.start < previous.start || current.end < previous.end) {
            throw std::invalid_argument(stepagent::place(tokens.name, i) +
                                        " must not come before the token before it, " +
                                        text(previous) + ", got " + text(current));
        }
        place(i, current.start);
        result[i] = previous = current;
        placed = i + 1;
    }
    place(result.size(), previous.end);
    return result;
}

// Walks one tokenization in runs: of tokens that share characters, or of tokens without any at one
// place.
struct Walker {
    const Intervals& tokens;
    std::size_t begin, end;  // the run, [begin, end)

    bool done() const { return begin == tokens.size(); }
    // Of two runs, that comes first which starts first; where both start, the one without
    // characters.
    bool operator<(const Walker& other) const {
        if (done() || other.done()) return !done();
        const auto &a = tokens[begin], &b = other.tokens[other.begin];
        return a.start != b.start ? a.start < b.start : a.empty() && !b.empty();
    }
    void take_empty(std::int64_t place) {
        while (end < tokens.size() && tokens[end] == Interval{place, place, true}) ++end;
    }
    // Takes tokens that start before `reach`, and returns how far they reach.
    std::int64_t take(std::int64_t reach) {
        while (end < tokens.size() && tokens[end].start < reach) {
            reach = std::max(reach, tokens[end++].end);
        }
        return reach;
    }
};

void take_run(Walker& a, Walker& b) {
    const auto first = b < a ? b.tokens[b.begin] : a.tokens[a.begin];
    if (first.empty()) {
        a.take_empty(first.start);
        b.take_empty(first.start);
        return;
    }
    for (auto reach = first.end;;) {
        const auto further = b.take(a.take(reach));
        if (further == reach) return;
        reach = further;
    }
}

class TokenAligner {
  public:
    TokenAligner(const Tokenization& a, const Tokenization& b)
        : a_ids_(a.ids), b_ids_(b.ids), a_(intervals(a)), b_(intervals(b)) {}

    TokenAlignment align() {
        const auto prefix =
            static_cast<std::size_t>(std::ranges::mismatch(a_ids_, b_ids_).in1 - a_ids_.begin());
        pair(0, 0, prefix);
        Walker a{a_, prefix, prefix}, b{b_, prefix, prefix};
        while (!a.done() || !b.done()) {
            take_run(a, b);
            if (equal(a, b)) pair(a.begin, b.begin, a.end - a.begin);
            a.begin = a.end;
            b.begin = b.end;
        }
        close(a_.size(), b_.size());
        return std::move(result_);
    }

  private:
    bool equal(const Walker& a, const Walker& b) const {
        const auto same = [&](const auto& left, const auto& right) {
            return std::equal(left.begin() + static_cast<std::ptrdiff_t>(a.begin),
                              left.begin() + static_cast<std::ptrdiff_t>(a.end),
                              right.begin() + static_cast<std::ptrdiff_t>(b.begin),
                              right.begin() + static_cast<std::ptrdiff_t>(b.end));
        };
        return same(a_, b_) && (a_ids_.empty() || same(a_ids_, b_ids_));
    }

    void pair(std::size_t i, std::size_t j, std::size_t count) {
        if (count == 0) return;
        close(i, j);
        for (std::size_t k = 0; k < count; ++k) append(result_.pairs, {i + k, j + k});
        a_end_ = i + count;
        b_end_ = j + count;
    }

    // Up to here, whatever came after the last pair is a seam.
    void close(std::size_t i, std::size_t j) {
        if (a_end_ < i || b_end_ < j) append(result_.seams, {a_end_, i, b_end_, j});
    }

    static void append(std::vector<std::int32_t>& values,
                       std::initializer_list<std::size_t> indices) {
        for (const auto index : indices) values.push_back(static_cast<std::int32_t>(index));
    }

    std::span<const std::int32_t> a_ids_, b_ids_;
    Intervals a_, b_;
    std::size_t a_end_ = 0, b_end_ = 0;  // after the last pair
    TokenAlignment result_;
};

}  // namespace

TokenAlignment align_tokens(const Tokenization& a, const Tokenization& b) {
    return TokenAligner(a, b).align();
}

std::vector<std::int32_t> token_spans(std::span<const std::int64_t> char_spans,
                                      const Tokenization& tokens) {
    constexpr auto name = "char_spans";
    const auto places = intervals(tokens);
    std::vector<std::int32_t> result(char_spans.size());
    for (std::size_t s = 0; s < char_spans.size() / 2; ++s) {
        const Interval span{char_spans[2 * s], char_spans[2 * s + 1]};
        check(name, s, span);
        const auto first = std::ranges::upper_bound(places, span.start, {}, &Interval::end);
        auto last = std::ranges::lower_bound(first, places.end(), span.end, {}, &Interval::start);
        while (last != first && (last - 1)->empty()) --last;  // in the gap after the last one
        const auto refuse_cut = [&](auto token) {
            throw std::invalid_argument(
                place(name, s) + " must not cut through a token, got " + text(span) + ", and " +
                described(tokens.name, static_cast<std::size_t>(token - places.begin()), *token));
        };
        if (first != places.end() && first->start < span.start) refuse_cut(first);
        if (first != last && (last - 1)->end > span.end) refuse_cut(last - 1);
        result[2 * s] = static_cast<std::int32_t>(first - places.begin());
        result[2 * s + 1] = static_cast<std::int32_t>(last - places.begin());
    }
    return result;
}

std::vector<std::int64_t> char_spans(std::span<const std::int64_t> token_spans,
                                     const Tokenization& tokens) {
    constexpr auto name = "token_spans";
    const auto places = intervals(tokens);
    const auto size = static_cast<std::int64_t>(places.size());
    std::vector<std::int64_t> result(token_spans.size());
    for (std::size_t s = 0; s < token_spans.size() / 2; ++s) {
        const Interval span{token_spans[2 * s], token_spans[2 * s + 1]};
        check(name, s, span);
        if (span.end > size) {
            throw std::invalid_argument(place(name, s) + " must lie within the " +
                                        std::to_string(size) + " tokens, got " + text(span));
        }
        const auto refuse_shared = [&](std::int64_t token) {
            if (token == 0 || token == size) return;
            const auto next = places.begin() + token;
            if (next->start < (next - 1)->end) {
                throw std::invalid_argument(place(name, s) +
                                            " must not cut through a character, got " + text(span) +
                                            ", and tokens " + std::to_string(token - 1) + " and " +
                                            std::to_string(token) + " share it");
            }
        };
        refuse_shared(span.start);
        refuse_shared(span.end);
        const auto begin = places.begin() + span.start, end = places.begin() + span.end;
        const auto has_characters = [](const Interval& token) { return !token.empty(); };
        const auto first = std::find_if(begin, end, has_characters);
        const auto before = begin == places.begin() ? 0 : (begin - 1)->end;
        result[2 * s] = first == end ? before : first->start;
        result[2 * s + 1] = begin == end ? before : (end - 1)->end;
    }
    return result;
}

// ------------------------------------------------------------------ steps of two trajectories

namespace {

// The columns j of a row i with |i - j| <= band, of n.
struct Columns {
    std::size_t begin, end;
    bool contains(std::size_t j) const { return begin <= j && j < end; }
};

Columns in_band(std::size_t row, std::size_t n, std::int64_t band) {
    const auto i = static_cast<std::int64_t>(row), last = static_cast<std::int64_t>(n);
    const auto begin = std::clamp<std::int64_t>(i - band, 0, last);
    const auto end = std::clamp<std::int64_t>(i + band + 1, 0, last);
    return {static_cast<std::size_t>(begin), static_cast<std::size_t>(end)};
}

constexpr double infinity = std::numeric_limits<double>::infinity();

// Where a cell's best path comes from, in the order that breaks ties.
enum class Move : std::uint8_t { both, expert, agent };

// table[i][j] is the least cost of the first i expert steps and the first j agent steps; two rows
// of it are kept, and of every cell the move that led there.
class StepAligner {
  public:
    StepAligner(std::span<const double> costs, std::size_t m, std::size_t n, StepMethod method,
                std::int64_t band)
        : costs_(costs),
          m_(m),
          n_(n),
          method_(method),
          band_(band),
          // one step of each side left alone must find room beside a band of 0
          reach_(method == StepMethod::dtw ? band : std::max<std::int64_t>(band, 1)),
          moves_(m * n) {}

    StepAlignment align(double cutoff) {
        std::vector<double> above(n_ + 1, infinity), row(n_ + 1, infinity);
        for (std::size_t j = 0; j <= n_; ++j) above[j] = border(j);
        for (std::size_t i = 1; i <= m_; ++i) {
            const auto least = fill(i, above, row);
            if (least > cutoff) return {{}, infinity};  // every path crosses this row
            std::swap(above, row);
        }
        if (above[n_] > cutoff) return {{}, infinity};
        return {trace(), above[n_]};
    }

  private:
    // So many steps left alone before the first pair.
    double border(std::size_t steps) const {
        if (steps == 0) return 0;
        const auto allowed = method_ != StepMethod::dtw && std::cmp_less_equal(steps, reach_);
        return allowed ? static_cast<double>(steps) : infinity;
    }
    double pair_cost(double cost) const {
        return method_ == StepMethod::lcs && cost != 0 ? infinity : cost;
    }
    double alone_cost(double cost) const { return method_ == StepMethod::dtw ? cost : 1.0; }

    double fill(std::size_t i, const std::vector<double>& above, std::vector<double>& row) {
        const auto pairs = in_band(i - 1, n_, band_);
        const auto [begin, end] = in_band(i - 1, n_, reach_);
        row[begin] = begin == 0 ? border(i) : infinity;
        auto least = row[begin];
        for (auto j = begin; j < end; ++j) {
            const auto cell = (i - 1) * n_ + j;
            const auto alone = alone_cost(costs_[cell]);
            auto best = pairs.contains(j) ? above[j] + pair_cost(costs_[cell]) : infinity;
            auto move = Move::both;
            if (above[j + 1] + alone < best) {
                best = above[j + 1] + alone;
                move = Move::expert;
            }
            if (row[j] + alone < best) {
                best = row[j] + alone;
                move = Move::agent;
            }
            row[j + 1] = best;
            moves_[cell] = move;
            least = std::min(least, best);
        }
        return least;
    }

    std::vector<std::int32_t> trace() const {
        std::vector<std::int32_t> pairs;
        for (auto i = m_, j = n_; i > 0 && j > 0;) {
            const auto move = moves_[(i - 1) * n_ + j - 1];
            if (move == Move::both || method_ == StepMethod::dtw) {
                pairs.push_back(static_cast<std::int32_t>(j - 1));  // reversed as a whole below
                pairs.push_back(static_cast<std::int32_t>(i - 1));
            }
            i -= move != Move::agent;
            j -= move != Move::expert;
        }
        std::ranges::reverse(pairs);
        return pairs;
    }

    const std::span<const double> costs_;
    const std::size_t m_, n_;
    const StepMethod method_;
    const std::int64_t band_, reach_;  // of pairs, and of the cells on a path
    std::vector<Move> moves_;
};

}  // namespace

std::vector<double> step_costs(const Ragged& expert, const Ragged& agent, std::int64_t band) {
    EditDistance edit_distance;
    std::vector<double> costs(expert.size() * agent.size());
    for (std::size_t i = 0; i < expert.size(); ++i) {
        const auto [begin, end] = in_band(i, agent.size(), band);
        for (auto j = begin; j < end; ++j) {
            const auto longer = std::max(expert[i].size(), agent[j].size());
            const auto edits =
                edit_distance(expert[i], agent[j], static_cast<std::int64_t>(longer));
            costs[i * agent.size() + j] =
                longer == 0 ? 0.0 : static_cast<double>(edits) / static_cast<double>(longer);
        }
    }
    return costs;
}

StepAlignment align_steps(std::span<const double> costs, std::size_t m, std::size_t n,
                          StepMethod method, std::int64_t band, double cutoff) {
    return StepAligner(costs, m, n, method, band).align(cutoff);
}

}  // namespace stepagent
