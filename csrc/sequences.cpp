// Any sequences as their prefix tree: a radix tree whose nodes are runs of tokens.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "parallel.hpp"
#include "tree.hpp"

namespace stepagent {
namespace {

using Mask = std::span<const std::uint8_t>;

constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

// How many tokens two runs have in common at their beginnings.
std::size_t common_prefix(Tokens a, Tokens b) {
    constexpr std::size_t chunk = 256;  // memcmp is vectorized, a loop with an early exit is not
    const auto size = std::min(a.size(), b.size());
    std::size_t n = 0;
    while (n + chunk <= size &&
           std::memcmp(a.data() + n, b.data() + n, chunk * sizeof(std::int32_t)) == 0) {
        n += chunk;
    }
    while (n < size && a[n] == b[n]) ++n;
    return n;
}

// The tokens [start, end) of a sequence that are scored one after another.
struct Run {
    std::size_t start, end;
};

std::size_t find_scored(Mask mask, std::size_t p) {
    for (std::uint64_t word; p + sizeof word <= mask.size(); p += sizeof word) {
        std::memcpy(&word, mask.data() + p, sizeof word);
        if (word != 0) break;
    }
    while (p < mask.size() && mask[p] == 0) ++p;
    return p;
}

std::vector<Run> scored_runs(Mask mask) {
    std::vector<Run> runs;
    for (auto start = find_scored(mask, 0); start < mask.size();) {
        const auto* end = static_cast<const std::uint8_t*>(
            std::memchr(mask.data() + start, 0, mask.size() - start));
        const auto stop =
            end == nullptr ? mask.size() : static_cast<std::size_t>(end - mask.data());
        runs.push_back({start, stop});
        start = find_scored(mask, stop);
    }
    return runs;
}

// The sequences that begin with one token.
class Block {
  public:
    std::vector<std::size_t> members;  // ascending

    void build(const TokenRows& tokens) {
        for (const auto sequence : members) last_.push_back(insert(tokens, sequence));
        lay_out();
    }

    std::size_t size() const { return size_; }

    // The members in the order of the tree, a sequence before those that go on from it.
    std::vector<std::size_t> members_in_order(const TokenRows& tokens) const {
        std::vector<std::size_t> ends(members.size()), result(members.size());
        for (std::size_t m = 0; m < members.size(); ++m) {
            const auto last = tokens[members[m]].size() - 1;
            auto n = last_[m];
            while (nodes_[n].start > last) n = nodes_[n].parent;
            ends[m] = nodes_[n].row + last - nodes_[n].start;
            result[m] = m;
        }
        std::stable_sort(result.begin(), result.end(),
                         [&](std::size_t a, std::size_t b) { return ends[a] < ends[b]; });
        for (auto& m : result) m = members[m];
        return result;
    }

    void append(TokenTree& tree, const TokenRows& tokens) {
        const auto base = tree.input_ids.size();
        for (const auto n : order_) {
            auto& node = nodes_[n];
            node.row += base;
            tree.append_run(tokens[node.sequence].subspan(node.start, node.end - node.start),
                            node.start, node.row + node.subtree);
        }
    }

    // Writes the rows that predict the scored tokens of the m-th member, the last one's before
    // `rows_end`: backwards, node by node towards the root.
    void write_rows(std::size_t m, std::span<const Run> runs, std::int32_t* rows_end) const {
        auto n = last_[m];
        for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
            const auto first = run->start - 1;  // each token is predicted by the one before it
            for (auto end = run->end - 1; end > first;) {
                while (nodes_[n].start >= end) n = nodes_[n].parent;
                const auto begin = std::max(first, nodes_[n].start);
                rows_end -= end - begin;
                std::iota(rows_end, rows_end + (end - begin),
                          static_cast<std::int32_t>(nodes_[n].row + begin - nodes_[n].start));
                end = begin;
            }
        }
    }

  private:
    // The tokens [start, end) of a sequence, which begin at depth `start` below the parent's.
    struct Node {
        std::size_t sequence, start, end, parent;
        std::size_t row = 0, subtree = 0;  // set by lay_out: first row, and tokens from it on
    };

    struct Edge {
        std::size_t parent;
        std::int32_t token;
        bool operator==(const Edge&) const = default;
    };

    struct EdgeHash {
        std::size_t operator()(const Edge& edge) const {
            // Multiplied by 2^64 / golden ratio, which spreads consecutive parents and tokens.
            const auto key = (static_cast<std::uint64_t>(edge.parent) << 32) ^
                             static_cast<std::uint64_t>(edge.token);
            return static_cast<std::size_t>((key * 0x9e3779b97f4a7c15ULL) >> 16);
        }
    };

    // Returns the node in which, or below which, the sequence ends.
    std::size_t insert(const TokenRows& tokens, std::size_t sequence) {
        const auto ids = tokens[sequence];
        if (nodes_.empty()) return add(sequence, 0, ids.size(), none);
        auto n = root_;
        for (;;) {
            const auto& node = nodes_[n];
            const auto run = tokens[node.sequence].subspan(node.start, node.end - node.start);
            const auto depth = node.start + common_prefix(run, ids.subspan(node.start));
            if (depth == ids.size()) return n;
            if (depth < node.end) return link(tokens, sequence, depth, split(tokens, n, depth));
            const auto child = children_.find({n, ids[depth]});
            if (child == children_.end()) return link(tokens, sequence, depth, n);
            n = child->second;
        }
    }

    std::size_t add(std::size_t sequence, std::size_t start, std::size_t end, std::size_t parent) {
        nodes_.push_back({sequence, start, end, parent});
        return nodes_.size() - 1;
    }

    // Adds what is left of a sequence from `depth` on as a child.
    std::size_t link(const TokenRows& tokens, std::size_t sequence, std::size_t depth,
                     std::size_t parent) {
        const auto leaf = add(sequence, depth, tokens[sequence].size(), parent);
        children_.emplace(Edge{parent, tokens[sequence][depth]}, leaf);
        return leaf;
    }

    // Puts a new node over n, with n's tokens before `depth`: n and all below it stay as they are.
    std::size_t split(const TokenRows& tokens, std::size_t n, std::size_t depth) {
        const auto ids = tokens[nodes_[n].sequence];
        const auto upper = add(nodes_[n].sequence, nodes_[n].start, depth, nodes_[n].parent);
        if (n == root_) {
            root_ = upper;
        } else {
            children_[{nodes_[upper].parent, ids[nodes_[upper].start]}] = upper;
        }
        nodes_[n].start = depth;
        nodes_[n].parent = upper;
        children_.emplace(Edge{upper, ids[depth]}, n);
        return upper;
    }

    // Orders the nodes depth first, siblings by the first sequence that has them, and counts rows.
    void lay_out() {
        std::vector<std::size_t> by_age(nodes_.size());
        for (std::size_t n = 0; n < nodes_.size(); ++n) by_age[n] = n;
        // A sequence adds one child to a node at most, so that siblings never tie.
        std::sort(by_age.begin(), by_age.end(), [&](std::size_t a, std::size_t b) {
            return nodes_[a].sequence < nodes_[b].sequence;
        });
        std::vector<std::size_t> first_child(nodes_.size(), none), next(nodes_.size(), none);
        for (auto n = by_age.rbegin(); n != by_age.rend(); ++n) {  // pushed in front: oldest last
            if (*n == root_) continue;
            auto& first = first_child[nodes_[*n].parent];
            next[*n] = first;
            first = *n;
        }
        order_.reserve(nodes_.size());
        for (auto n = root_; n != none;) {
            auto& node = nodes_[n];
            node.row = size_;
            size_ += node.end - node.start;
            order_.push_back(n);
            if (first_child[n] != none) {
                n = first_child[n];
                continue;
            }
            while (n != none && next[n] == none) n = nodes_[n].parent;
            if (n != none) n = next[n];
        }
        for (auto n = order_.rbegin(); n != order_.rend(); ++n) {
            auto& node = nodes_[*n];
            node.subtree += node.end - node.start;
            if (node.parent != none) nodes_[node.parent].subtree += node.subtree;
        }
    }

    std::vector<Node> nodes_;
    std::unordered_map<Edge, std::size_t, EdgeHash> children_;
    std::vector<std::size_t> last_;   // for each member, the node in which it ends, or one below
    std::vector<std::size_t> order_;  // nodes depth first
    std::size_t root_ = 0, size_ = 0;
};

// Cuts sequences that follow each other in a prefix tree into parts of at most `limit` tokens:
// where each part begins, and one more. A part repeats what its first sequence has in common with
// the one before. The fewest tokens repeated, then the fewest parts, then the latest last cut.
// Every sequence alone fits.
std::vector<std::size_t> cuts(const TokenRows& tokens, std::span<const std::size_t> ordered,
                              std::size_t limit) {
    struct Best {
        std::size_t repeated, parts, start;  // start: where the last part begins
    };
    const auto n = ordered.size();
    std::vector<std::size_t> shared(n, 0), before(n + 1, 0);
    for (std::size_t i = 0; i < n; ++i) {
        const auto ids = tokens[ordered[i]];
        if (i > 0) shared[i] = common_prefix(tokens[ordered[i - 1]], ids);
        before[i + 1] = before[i] + ids.size() - shared[i];  // tokens of the tree so far
    }
    std::vector<Best> best(n + 1, Best{0, 0, 0});
    // The cost of a last part from `start` on.
    const auto cost = [&](std::size_t start) {
        return std::pair(best[start].repeated + shared[start], best[start].parts + 1);
    };
    // Starts wait in the order of their cost, and leave for good when a part from there on is full.
    using Entry = std::tuple<std::size_t, std::size_t, std::size_t>;  // repeated, parts, n - start
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> starts;
    for (std::size_t end = 1; end <= n; ++end) {
        const auto [repeated, parts] = cost(end - 1);
        starts.emplace(repeated, parts, n - (end - 1));
        for (;;) {
            const auto start = n - std::get<2>(starts.top());
            if (shared[start] + before[end] - before[start] <= limit) break;
            starts.pop();
        }
        const auto [least, count, place] = starts.top();
        best[end] = {least, count, n - place};
    }
    std::vector<std::size_t> result{n};
    while (result.back() != 0) result.push_back(best[result.back()].start);
    std::reverse(result.begin(), result.end());
    return result;
}

class PrefixPacker {
  public:
    PrefixPacker(const Sequences& sequences, std::size_t limit, std::size_t threads)
        : tokens_(
              sequences.tokens, [](std::size_t i) { return place("sequences", i); }, threads),
          runs_(tokens_.size()),
          home_(tokens_.size()) {
        if (sequences.masks.size() != tokens_.size()) {
            throw std::invalid_argument("action_masks must have a mask for each of the " +
                                        std::to_string(tokens_.size()) + " sequences, got " +
                                        std::to_string(sequences.masks.size()));
        }
        parallel_for(tokens_.size(), threads, [&](std::size_t i) {
            check(i, sequences.masks[i]);
            runs_[i] = scored_runs(sequences.masks[i]);
        });
        group();
        check_lengths(limit);
        parallel_for(blocks_.size(), threads, [&](std::size_t b) { blocks_[b].build(tokens_); });
        cut(limit, threads);
        for (std::size_t b = 0; b < blocks_.size(); ++b) {
            for (std::size_t m = 0; m < blocks_[b].members.size(); ++m) {
                home_[blocks_[b].members[m]] = {b, m};
            }
        }
    }

    std::vector<std::size_t> block_sizes() const {
        std::vector<std::size_t> sizes;
        for (const auto& block : blocks_) sizes.push_back(block.size());
        return sizes;
    }

    // The tree of the blocks [first, last), its steps in the order of the sequences.
    TokenTree tree(std::size_t first, std::size_t last) {
        TokenTree tree;
        const auto members = ordered_members(first, last);
        reserve(tree, first, last, members);
        for (auto b = first; b < last; ++b) blocks_[b].append(tree, tokens_);
        for (const auto sequence : members) append_steps(tree, sequence);
        return tree;
    }

  private:
    struct Home {
        std::size_t block, member;
    };

    void check(std::size_t i, Mask mask) const {
        if (tokens_[i].empty())
            throw std::invalid_argument(place("sequences", i) +
                                        " must have a token at least, got none");
        if (mask.size() != tokens_[i].size()) {
            throw std::invalid_argument(
                place("action_masks", i) + " must have an entry for each of the " +
                std::to_string(tokens_[i].size()) + " tokens of " + place("sequences", i) +
                ", got " + std::to_string(mask.size()));
        }
        if (mask[0] != 0) {
            throw std::invalid_argument(
                place(place("action_masks", i), 0) +
                " must be False, as no row predicts a first token, got True");
        }
    }

    void check_lengths(std::size_t limit) const {
        for (std::size_t i = 0; i < tokens_.size(); ++i) {
            if (tokens_[i].size() <= limit) continue;
            throw std::invalid_argument(place("sequences", i) +
                                        " must fit max_tokens=" + std::to_string(limit) +
                                        ", as a sequence is never split, got " +
                                        std::to_string(tokens_[i].size()) + " tokens");
        }
    }

    // Puts parts in the place of blocks that are too large.
    void cut(std::size_t limit, std::size_t threads) {
        std::vector<Block> whole;
        std::vector<std::size_t> made;  // places of the parts
        std::swap(whole, blocks_);
        for (auto& block : whole) {
            if (block.size() <= limit) {
                blocks_.push_back(std::move(block));
                continue;
            }
            const auto ordered = block.members_in_order(tokens_);
            const auto starts = cuts(tokens_, ordered, limit);
            for (std::size_t part = 0; part + 1 < starts.size(); ++part) {
                made.push_back(blocks_.size());
                auto& members = blocks_.emplace_back().members;
                for (auto i = starts[part]; i < starts[part + 1]; ++i) {
                    members.push_back(ordered[i]);
                }
                std::sort(members.begin(), members.end());
            }
        }
        parallel_for(made.size(), threads, [&](std::size_t i) { blocks_[made[i]].build(tokens_); });
    }

    void group() {
        std::unordered_map<std::int32_t, std::size_t> block_of;
        for (std::size_t i = 0; i < tokens_.size(); ++i) {
            const auto block = block_of.emplace(tokens_[i][0], blocks_.size()).first->second;
            if (block == blocks_.size()) blocks_.emplace_back();
            blocks_[block].members.push_back(i);
        }
    }

    std::vector<std::size_t> ordered_members(std::size_t first, std::size_t last) const {
        std::vector<std::size_t> result;
        for (auto b = first; b < last; ++b) {
            const auto& members = blocks_[b].members;
            result.insert(result.end(), members.begin(), members.end());
        }
        std::sort(result.begin(), result.end());
        return result;
    }

    void reserve(TokenTree& tree, std::size_t first, std::size_t last,
                 const std::vector<std::size_t>& members) const {
        std::size_t tokens = 0, scored = 0, steps = 0;
        for (auto b = first; b < last; ++b) tokens += blocks_[b].size();
        for (const auto sequence : members) {
            steps += runs_[sequence].size();
            for (const auto run : runs_[sequence]) scored += run.end - run.start;
        }
        tree.reserve(tokens, scored, steps);
    }

    void append_steps(TokenTree& tree, std::size_t sequence) const {
        for (std::size_t t = 0; t < runs_[sequence].size(); ++t) {
            const auto run = runs_[sequence][t];
            const auto labels = tokens_[sequence].subspan(run.start, run.end - run.start);
            tree.labels.insert(tree.labels.end(), labels.begin(), labels.end());
            tree.append_step(sequence, t, 0);
        }
        tree.label_rows.resize(tree.labels.size());
        const auto [block, member] = home_[sequence];
        blocks_[block].write_rows(member, runs_[sequence],
                                  tree.label_rows.data() + tree.label_rows.size());
    }

    const TokenRows tokens_;
    std::vector<std::vector<Run>> runs_;  // of each sequence
    std::vector<Home> home_;              // of each sequence
    std::vector<Block> blocks_;           // in the order of their first sequences
};

}  // namespace

std::vector<TokenTree> pack_sequences(const Sequences& sequences,
                                      std::optional<std::int64_t> max_tokens, std::size_t threads) {
    const auto limit = token_limit(max_tokens);
    PrefixPacker packer(sequences, limit, threads);
    const auto starts = next_fit(packer.block_sizes(), limit);
    std::vector<TokenTree> trees(starts.size() - 1);
    parallel_for(trees.size(), threads,
                 [&](std::size_t i) { trees[i] = packer.tree(starts[i], starts[i + 1]); });
    return trees;
}

}  // namespace stepagent
