// Any sequences as their prefix tree: a radix tree whose nodes are runs of tokens.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>

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

class PrefixPacker {
  public:
    PrefixPacker(const Sequences& sequences, std::size_t threads)
        : tokens_(
              sequences.tokens, [](std::size_t i) { return place("sequences", i); }, threads),
          runs_(tokens_.size()),
          home_(tokens_.size()) {
        if (sequences.masks.size() != tokens_.size()) {
            throw std::invalid_argument(std::to_string(sequences.masks.size()) +
                                        " action_masks for " + std::to_string(tokens_.size()) +
                                        " sequences");
        }
        parallel_for(tokens_.size(), threads, [&](std::size_t i) {
            check(i, sequences.masks[i]);
            runs_[i] = scored_runs(sequences.masks[i]);
        });
        group();
        parallel_for(blocks_.size(), threads, [&](std::size_t b) { blocks_[b].build(tokens_); });
    }

    std::vector<std::size_t> block_sizes(std::size_t limit) const {
        std::vector<std::size_t> sizes;
        for (const auto& block : blocks_) {
            sizes.push_back(block.size());
            if (block.size() <= limit) continue;
            const auto others = block.members.size() - 1;
            throw std::invalid_argument(
                place("sequences", block.members.front()) +
                (others == 0 ? " takes "
                             : " and the " + std::to_string(others) +
                                   " that begin with its first token take ") +
                std::to_string(block.size()) + " tokens, but max_tokens=" + std::to_string(limit) +
                " and sequences that share a beginning are never split");
        }
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
        if (tokens_[i].empty()) throw std::invalid_argument(place("sequences", i) + " is empty");
        if (mask.size() != tokens_[i].size()) {
            throw std::invalid_argument(place("action_masks", i) + " has " +
                                        std::to_string(mask.size()) + " entries, but " +
                                        place("sequences", i) + " has " +
                                        std::to_string(tokens_[i].size()) + " tokens");
        }
        if (mask[0] != 0) {
            throw std::invalid_argument(place(place("action_masks", i), 0) +
                                        " is True, but no row predicts a first token");
        }
    }

    void group() {
        std::unordered_map<std::int32_t, std::size_t> block_of;
        for (std::size_t i = 0; i < tokens_.size(); ++i) {
            const auto block = block_of.emplace(tokens_[i][0], blocks_.size()).first->second;
            if (block == blocks_.size()) blocks_.emplace_back();
            home_[i] = {block, blocks_[block].members.size()};
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
    PrefixPacker packer(sequences, threads);
    const auto starts = next_fit(packer.block_sizes(limit), limit);
    std::vector<TokenTree> trees(starts.size() - 1);
    parallel_for(trees.size(), threads,
                 [&](std::size_t i) { trees[i] = packer.tree(starts[i], starts[i + 1]); });
    return trees;
}

}  // namespace stepagent
