#include "tree.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace stepagent {

std::int32_t index32(std::size_t value) {
    if (value > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw std::length_error("a token tree must have 2147483647 entries at most, got " +
                                std::to_string(value) + ": set a smaller max_tokens");
    }
    return static_cast<std::int32_t>(value);
}

std::size_t token_limit(std::optional<std::int64_t> max_tokens) {
    if (!max_tokens) return std::numeric_limits<std::size_t>::max();
    if (*max_tokens < 1 || *max_tokens > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("max_tokens must lie in [1, 2147483647], got " +
                                    std::to_string(*max_tokens));
    }
    return static_cast<std::size_t>(*max_tokens);
}

std::vector<std::size_t> next_fit(std::span<const std::size_t> block_sizes, std::size_t limit) {
    std::vector<std::size_t> starts;
    std::size_t filled = 0;
    for (std::size_t block = 0; block < block_sizes.size(); ++block) {
        if (starts.empty() || filled + block_sizes[block] > limit) {
            starts.push_back(block);
            filled = 0;
        }
        filled += block_sizes[block];
    }
    starts.push_back(block_sizes.size());
    return starts;
}

void TokenTree::reserve(std::size_t tokens, std::size_t scored, std::size_t steps) {
    index32(std::max({tokens, scored, steps}));
    for (auto* array : {&input_ids, &position_ids, &subtree_end}) array->reserve(tokens);
    for (auto* array : {&labels, &label_rows}) array->reserve(scored);
    for (auto* array : {&step_trunk, &step_index, &step_branch}) array->reserve(steps);
    step_offsets.reserve(steps + 1);
}

void TokenTree::append_run(Tokens tokens, std::size_t depth, std::size_t end) {
    const auto size = input_ids.size();
    input_ids.insert(input_ids.end(), tokens.begin(), tokens.end());
    subtree_end.resize(size + tokens.size(), index32(end));
    position_ids.resize(size + tokens.size());
    std::iota(position_ids.begin() + static_cast<std::ptrdiff_t>(size), position_ids.end(),
              index32(depth));
}

void TokenTree::append_step(std::size_t trunk, std::size_t index, std::size_t branch) {
    step_offsets.push_back(index32(labels.size()));
    step_trunk.push_back(index32(trunk));
    step_index.push_back(index32(index));
    step_branch.push_back(index32(branch));
}

}  // namespace stepagent
