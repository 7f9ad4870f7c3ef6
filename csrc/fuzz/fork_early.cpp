// fork_early: every row predicts one token, from what it was predicted before; hostile arrays are
// refused or give a tree.
#include "forks.hpp"
#include "trees.hpp"

namespace {

using fuzz::Row;
using stepagent::Forked;
using stepagent::TokenTree;

// Of sequences with shared beginnings, or of a step with branches, some of which begin alike.
TokenTree read_tree(fuzz::Input& input) {
    std::vector<Row> rows(1 + input.size(5));
    std::vector<std::vector<std::uint8_t>> masks;
    for (auto& row : rows) {
        row = input.tokens(7);
        row.insert(row.begin(), static_cast<int>(input.raw(1) % 2));
        masks.emplace_back(row.size());
        const auto bits = input.raw(1);
        for (std::size_t p = 1; p < row.size(); ++p) {
            masks.back()[p] = static_cast<std::uint8_t>((bits >> (p % 8)) & 1);
        }
    }
    const std::vector<stepagent::AnyIds> ids(rows.begin(), rows.end());
    if (rows[0].size() < 2 || input.raw(1) % 2 == 0) {
        const std::vector<std::span<const std::uint8_t>> views(masks.begin(), masks.end());
        return stepagent::pack_sequences({ids, views}, std::nullopt, 1).front();
    }
    const Row bounds{1, 2};
    const std::vector<std::span<const std::int32_t>> spans{bounds};
    const auto all = std::span(ids);
    const std::vector<std::int64_t> counts{static_cast<std::int64_t>(ids.size()) - 1};
    return stepagent::pack_step_pairs({all.first(1), spans, all.subspan(1), counts}, std::nullopt,
                                      1)
        .front();
}

Forked forked(const TokenTree& tree) {
    return stepagent::fork_early({tree.input_ids, tree.position_ids, tree.subtree_end, tree.labels,
                                  tree.label_rows, tree.step_offsets});
}

std::vector<Row> children(const Row& ids, const Row& subtree_end) {
    std::vector<Row> result(ids.size());
    for (std::size_t k = 0; k < ids.size(); ++k) {
        for (auto c = k + 1; c < fuzz::at(subtree_end, k); c = fuzz::at(subtree_end, c)) {
            result[k].push_back(ids[c]);
        }
    }
    return result;
}

void check_forked(const Forked& result, const TokenTree& tree) {
    fuzz::check_nested(result.position_ids, result.subtree_end);
    auto length = tree.input_ids.size();
    for (const auto& tokens : children(tree.input_ids, tree.subtree_end)) {
        if (tokens.size() > 1) length += tokens.size() - 1;
    }
    REQUIRE(result.input_ids.size() == length && result.subtree_end.size() == length);
    for (const auto& tokens : children(result.input_ids, result.subtree_end)) {
        for (const auto token : tokens) REQUIRE(token == tokens[0]);
    }
    REQUIRE(result.label_rows.size() == tree.labels.size());
    for (std::size_t n = 0; n < tree.labels.size(); ++n) {
        const auto row = fuzz::at(result.label_rows, n);
        REQUIRE(fuzz::path(result.input_ids, result.subtree_end, row) ==
                fuzz::path(tree.input_ids, tree.subtree_end, fuzz::at(tree.label_rows, n)));
        for (std::size_t m = 0; m < n; ++m) {
            REQUIRE(result.label_rows[m] != result.label_rows[n] ||
                    tree.labels[m] == tree.labels[n]);
        }
    }
}

// Changes an entry of an array, or its length.
void spoil(fuzz::Input& input, TokenTree& tree) {
    auto* arrays =
        std::array{&tree.input_ids, &tree.position_ids, &tree.subtree_end,
                   &tree.labels,    &tree.label_rows,   &tree.step_offsets}[input.size(5)];
    const auto kind = input.raw(1);
    if (kind == 0 || arrays->empty()) return arrays->push_back(static_cast<int>(input.raw(1)));
    if (kind == 1) return arrays->pop_back();
    (*arrays)[input.size(arrays->size() - 1)] =
        kind < 200 ? static_cast<int>(kind % 32) - 2 : static_cast<int>(input.raw(4));
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto spoils = input.raw(1) % 4;
    auto tree = read_tree(input);
    check_forked(forked(tree), tree);
    for (auto i = spoils; i > 0; --i) spoil(input, tree);
    try {
        const auto result = forked(tree);
        Row depths;
        for (std::size_t q = 0; q < result.input_ids.size(); ++q) {
            const auto seen = fuzz::path(result.input_ids, result.subtree_end, q);
            depths.push_back(static_cast<int>(seen.size()) - 1);
        }
        fuzz::check_nested(depths, result.subtree_end);
        for (std::size_t n = 0; n < tree.labels.size(); ++n) {
            REQUIRE(fuzz::at(result.label_rows, n) < result.input_ids.size());
        }
    } catch (const std::invalid_argument&) {
        REQUIRE(spoils > 0);
    }
    return 0;
}
