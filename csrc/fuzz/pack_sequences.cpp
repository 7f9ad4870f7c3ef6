// pack_sequences against the tree that its rule draws, and every scored token against its prefix.
#include "trees.hpp"

namespace {

using fuzz::Row;
using stepagent::TokenTree;

struct Batch {
    fuzz::IdRows sequences;
    std::vector<std::vector<std::uint8_t>> masks;

    bool valid() const {
        if (!sequences.valid || masks.size() != sequences.rows.size()) return false;
        for (std::size_t i = 0; i < masks.size(); ++i) {
            if (masks[i].empty() || masks[i][0] != 0) return false;
            if (masks[i].size() != sequences.rows[i].size()) return false;
        }
        return true;
    }
    std::vector<TokenTree> pack(std::optional<std::int64_t> max_tokens, std::size_t threads) const {
        const auto tokens = sequences.view();
        const std::vector<std::span<const std::uint8_t>> views(masks.begin(), masks.end());
        return stepagent::pack_sequences({tokens, views}, max_tokens, threads);
    }
};

// A beginning of an earlier sequence, often, and tokens of its own.
Row sequence(fuzz::Input& input, const std::vector<Row>& earlier) {
    Row tokens;
    if (!earlier.empty() && input.raw(1) % 4 != 0) {
        const auto& other = earlier[input.size(earlier.size() - 1)];
        const auto shared = static_cast<std::ptrdiff_t>(input.size(other.size()));
        tokens.assign(other.begin(), other.begin() + shared);
    }
    const auto more = input.tokens(6);
    const auto repeats = input.raw(1) == 77 ? 60 : 1;  // long runs, from few bytes
    for (auto i = 0; i < repeats; ++i) tokens.insert(tokens.end(), more.begin(), more.end());
    if (tokens.empty()) tokens.push_back(0);
    return tokens;
}

Batch read_batch(fuzz::Input& input, bool hostile) {
    Batch batch;
    for (auto count = input.size(8); count > 0; --count) {
        auto tokens = sequence(input, batch.sequences.rows);
        if (tokens.size() > 400) tokens.resize(400);
        std::vector<std::uint8_t> mask(tokens.size());
        const auto bits = input.raw(2);
        for (std::size_t p = 1; p < mask.size(); ++p) {
            mask[p] = static_cast<std::uint8_t>(((bits >> (p % 13)) & 1) * (1 + p % 255));
        }
        if (hostile) {
            const auto kind = input.raw(1);
            if (kind == 2) tokens.clear();
            if (kind == 3) mask.clear();
            if (kind == 4) mask.push_back(1);
            if (kind == 5 && !mask.empty()) mask[0] = 255;
        }
        batch.sequences.add(input, tokens);
        batch.masks.push_back(mask);
    }
    if (hostile && input.raw(1) == 2) batch.masks.emplace_back(1);
    return batch;
}

// The sequences that begin with one token, in the order of the first of them.
std::vector<std::vector<std::size_t>> blocks(const std::vector<Row>& sequences) {
    std::vector<std::vector<std::size_t>> result;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
        const auto same = std::find_if(result.begin(), result.end(), [&](const auto& block) {
            return sequences[block[0]][0] == sequences[i][0];
        });
        if (same == result.end()) {
            result.push_back({i});
        } else {
            same->push_back(i);
        }
    }
    return result;
}

// Lays out what goes on from a prefix that all members share, in the order of first appearance.
void lay_out(const std::vector<Row>& sequences, std::vector<std::size_t> members, std::size_t depth,
             TokenTree& tree) {
    for (;;) {
        std::erase_if(members, [&](auto i) { return sequences[i].size() <= depth; });
        if (members.empty()) return;
        const auto token = sequences[members[0]][depth];
        const auto first_other = std::stable_partition(
            members.begin(), members.end(), [&](auto i) { return sequences[i][depth] == token; });
        const auto row = tree.input_ids.size();
        tree.input_ids.push_back(token);
        tree.position_ids.push_back(static_cast<std::int32_t>(depth));
        tree.subtree_end.push_back(0);
        lay_out(sequences, {members.begin(), first_other}, depth + 1, tree);
        tree.subtree_end[row] = static_cast<std::int32_t>(tree.input_ids.size());
        members.erase(members.begin(), first_other);
    }
}

TokenTree tree_of(const std::vector<Row>& sequences, const std::vector<std::size_t>& members) {
    TokenTree tree;
    lay_out(sequences, members, 0, tree);
    return tree;
}

// A block as it is, or in parts of at most `limit` tokens, by trying all ways: the fewest tokens,
// then the fewest parts, then the latest last cut.
std::vector<std::vector<std::size_t>> cut(const std::vector<Row>& sequences,
                                          const std::vector<std::size_t>& block,
                                          std::size_t limit) {
    if (tree_of(sequences, block).input_ids.size() <= limit) return {block};
    for (const auto i : block) {
        if (sequences[i].size() > limit) return {block};
    }
    const auto place = [&](std::size_t i) {  // the first sequence with each of its beginnings
        std::vector<std::size_t> firsts;
        for (std::size_t n = 1; n <= sequences[i].size(); ++n) {
            firsts.push_back(*std::find_if(block.begin(), block.end(), [&](auto m) {
                return sequences[m].size() >= n &&
                       std::equal(sequences[i].begin(),
                                  sequences[i].begin() + static_cast<std::ptrdiff_t>(n),
                                  sequences[m].begin());
            }));
        }
        return firsts;
    };
    auto ordered = block;
    std::stable_sort(ordered.begin(), ordered.end(),
                     [&](auto a, auto b) { return place(a) < place(b); });
    const auto part = [&](std::size_t first, std::size_t last) {
        std::vector<std::size_t> members(ordered.begin() + static_cast<std::ptrdiff_t>(first),
                                         ordered.begin() + static_cast<std::ptrdiff_t>(last));
        std::sort(members.begin(), members.end());
        return members;
    };
    using Best = std::tuple<std::size_t, std::size_t, std::size_t>;  // tokens, parts, - last start
    const auto n = ordered.size();
    std::vector<Best> best{{0, 0, 0}};
    for (std::size_t end = 1; end <= n; ++end) {
        Best least{std::numeric_limits<std::size_t>::max(), 0, 0};
        for (std::size_t start = 0; start < end; ++start) {
            const auto tokens = tree_of(sequences, part(start, end)).input_ids.size();
            const auto [before, parts, _] = best[start];
            if (tokens <= limit) least = std::min(least, {before + tokens, parts + 1, n - start});
        }
        best.push_back(least);
    }
    std::vector<std::vector<std::size_t>> parts;
    for (auto end = n; end > 0; end = n - std::get<2>(best[end])) {
        parts.insert(parts.begin(), part(n - std::get<2>(best[end]), end));
    }
    return parts;
}

// The runs of scored tokens of a sequence are the next steps of the tree.
void check_runs(const TokenTree& tree, std::size_t& s, std::size_t i, const Row& tokens,
                const std::vector<std::uint8_t>& mask) {
    std::size_t run = 0;
    for (std::size_t start = 0, end = 0; start < mask.size(); start = std::max(end, start + 1)) {
        for (end = start; end < mask.size() && mask[end] != 0; ++end) continue;
        if (end == start) continue;
        const Row state(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(start));
        fuzz::check_step(tree, s++, {i, run++, 0}, state,
                         std::span(tokens).subspan(start, end - start));
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const auto max_tokens = fuzz::max_tokens(input);
    const auto batch = read_batch(input, kind % 4 == 0);
    const auto packed = fuzz::packed(
        [&](std::size_t threads) { return batch.pack(max_tokens, threads); }, kind % 16 / 2 == 2);
    if (!batch.valid()) {
        REQUIRE(!packed.refusal.empty());
        return 0;
    }
    const auto& sequences = batch.sequences.rows;
    std::vector<std::vector<std::size_t>> groups;
    for (const auto& block : blocks(sequences)) {
        const auto limit = max_tokens.value_or(std::numeric_limits<std::int32_t>::max());
        // A limit below 1 is refused, as one beyond 32 bits is.
        const auto parts =
            cut(sequences, block, static_cast<std::size_t>(std::max<std::int64_t>(limit, 0)));
        groups.insert(groups.end(), parts.begin(), parts.end());
    }
    std::vector<std::size_t> block_sizes;
    for (const auto& block : groups) {
        block_sizes.push_back(tree_of(sequences, block).input_ids.size());
    }
    const auto sizes = fuzz::tree_sizes(block_sizes, max_tokens);
    REQUIRE(sizes.has_value() == packed.refusal.empty());
    if (!sizes) return 0;

    const auto& trees = packed.trees;
    REQUIRE(trees.size() == sizes->size());
    auto block = groups.begin();
    for (std::size_t i = 0; i < trees.size(); ++i) {
        std::vector<std::size_t> members;
        TokenTree expected;
        while (expected.input_ids.size() < (*sizes)[i]) {
            members.insert(members.end(), block->begin(), block->end());
            lay_out(sequences, *block++, 0, expected);
        }
        REQUIRE(trees[i].input_ids == expected.input_ids);
        REQUIRE(trees[i].position_ids == expected.position_ids);
        REQUIRE(trees[i].subtree_end == expected.subtree_end);
        fuzz::check_tree(trees[i]);
        std::sort(members.begin(), members.end());
        std::size_t s = 0;
        for (const auto m : members) check_runs(trees[i], s, m, sequences[m], batch.masks[m]);
        REQUIRE(s == trees[i].step_trunk.size());
    }
    return 0;
}
